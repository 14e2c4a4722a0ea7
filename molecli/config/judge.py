"""The section of a recipe that switches the vision-language judge on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field

from molecli.catalog.methods import SUM
from molecli.config.sections import Section
from molecli.errors import UsageError

_PATH = "/chat/completions"
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
_OURS = ("model", "messages", "stream", "n")


def base_url(url: str) -> str:
    """`url` up to its version, such as https://host/v1.

    Raises: UsageError if it is not a plain web address. The message does not repeat `url`: it may hold a password.
    """
    try:
        parts = urlsplit(url)
        plain = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        plain = False
    if not plain or re.search(r"\s", url):
        raise UsageError("judge.endpoint", "this is not a web address", "Write one such as https://api.openai.com/v1.")
    if parts.username is not None or parts.query or parts.fragment:
        what = "it holds more than a host and a path, and a recipe is written to disk"
        raise UsageError("judge.endpoint", what, "Keep the key in the variable that judge.key_env names.")
    return url.rstrip("/").removesuffix(_PATH)


def variable_name(name: str) -> str:
    """`name`, if it can name a variable. Raises: UsageError that does not repeat it: it may be the key itself."""
    if not _VARIABLE.fullmatch(name):
        what = "this is not the name of an environment variable (capitals, digits and '_')"
        raise UsageError("judge.key_env", what, "Write the variable's name here, and the key into the environment.")
    return name


def request_options(options: Any) -> Any:
    """`options`, if a request can carry them. Raises: UsageError if they cannot be or if `mole` sets one."""
    if not isinstance(options, Mapping):
        raise UsageError("judge.options", "this is not a mapping", "Write for example judge.options: {temperature: 0}.")
    for name in options:
        if name in _OURS:
            raise UsageError(f"judge.options.{name}", "mole fills this field of the request itself", "Leave it out.")
    return dict(options)


class JudgeConfig(Section):
    """A vision-language model that compares pictures in pairs (Multi-LoRA Composition, arXiv 2402.16843)."""

    endpoint: Annotated[str, AfterValidator(base_url)] = Field(
        default="https://api.openai.com/v1", min_length=1, description="images: URL of an OpenAI-compatible endpoint"
    )
    model: str = Field(default="gpt-4o", min_length=1, description="images: vision-language model at that endpoint")
    key_env: Annotated[str, AfterValidator(variable_name)] = Field(
        default="OPENAI_API_KEY", description="environment variable that holds the key; the key is never saved"
    )
    baseline: str = Field(default=SUM, min_length=1, description="images: method to compare every other with")
    timeout_s: float = Field(default=60.0, gt=0.0, allow_inf_nan=False, description="seconds to wait for one answer")
    retries: int = Field(default=4, ge=0, description="number of retries after a failure or an answer without scores")
    pause_s: float = Field(
        default=1.0, ge=0.0, allow_inf_nan=False, description="seconds before the first retry; doubles every time"
    )
    max_pause_s: float = Field(
        default=60.0, ge=0.0, allow_inf_nan=False, description="longest pause in seconds; beyond it the pair fails"
    )
    concurrency: int = Field(default=4, ge=1, description="number of simultaneous requests")
    options: Annotated[dict[str, Any], BeforeValidator(request_options)] = Field(
        default_factory=dict, description="further fields of the request, such as {temperature: 0, max_tokens: 2048}"
    )
