"""The section of a recipe with what composition methods other than the gates are told.

Contents: MethodConfig, share_of.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, create_model
from pydantic_core import PydanticCustomError

from molecli.catalog.methods import EVERYWHERE, FAMILIES, Option, brought, readers
from molecli.config.sections import Section
from molecli.config.shorthand import as_names

_SHARE = re.compile(r"(\d+(?:\.\d+)?)\s*%?\s*-\s*(\d+(?:\.\d+)?)\s*%?")


def share_of(text: str) -> tuple[float, float]:
    """`20-40` as (0.2, 0.4). Raises: an error that says how to write it."""
    found = _SHARE.fullmatch(text.strip())
    low, high = (float(part) / 100 for part in found.groups()) if found else (0.0, 0.0)
    if not low < high <= 1:
        remedy = "Write two percentages, such as 0-20 or 80-100."
        raise PydanticCustomError("unknown_name", "is no part of the depth", {"remedy": remedy})
    return low, high


def _checked_share(text: str) -> str:
    share_of(text)
    return text


NAMED = 6  # so many methods are named before an option's help, at most


class _Settings(Section):
    """Settings of the methods: each reads those that its row of `catalog.methods` names; others are refused.

    The help says before each description which methods read it.
    """

    scale: float = Field(default=1.0, gt=0.0, allow_inf_nan=False, description="factor on every LoRA's weight")
    layers: Annotated[str, AfterValidator(_checked_share)] | None = Field(
        default=None,
        description="only the LoRAs' part in this share of the depth acts, in percent, such as 0-20; all of it when "
        "not given",
    )
    tau: int = Field(
        default=5, ge=1, description="denoising steps of a LoRA's turn, of the longest turn where they differ"
    )
    order: Annotated[tuple[str, ...], BeforeValidator(as_names)] = Field(
        default=(), description="LoRAs in turn; their own order when not given"
    )
    base_share: float = Field(default=0.5, ge=0.0, le=1.0, description="the base's share of the free half")
    rank: int | None = Field(
        default=None,
        ge=1,
        description="rank of the result; by default so large that nothing is lost, or the LoRAs' largest where the "
        "method always cuts",
    )
    density: float | None = Field(
        default=None,
        gt=0.0,
        le=1.0,
        description="share of an update's entries that stay; by default 0.2, or 0.5 where they are dropped at random",
    )
    seed: int = Field(
        default=0, ge=0, description="of what is drawn: the entries dropped, or the start of the power iterations"
    )
    expression: str | None = Field(
        default=None, description="sums and differences of LoRAs, such as 'a + b - c' or '0.5 * a + 0.5 * b'"
    )
    evaluations: int = Field(default=40, ge=1, description="weights that the search tries")
    examples: int = Field(default=64, ge=1, description="training examples that they are scored by, at most")
    bound: float = Field(default=1.5, gt=0.0, allow_inf_nan=False, description="largest weight, either sign")
    l1: float = Field(default=0.05, ge=0.0, allow_inf_nan=False, description="regulariser on mean |weight|")
    top_k: int | None = Field(
        default=None, ge=1, description="LoRAs that a token goes to; the method's own number when not given"
    )
    temperature: float = Field(default=1.0, gt=0.0, allow_inf_nan=False, description="of the softmax over the LoRAs")
    xlora_depth: int = Field(default=1, ge=1, description="layers of the classifier")
    xlora_size: int = Field(default=2048, ge=1, description="width of the classifier's hidden layers")
    layerwise_scalings: bool = Field(default=False, description="every matrix has weights of its own, not one for all")
    on: Literal["factors", "updates"] = Field(
        default="factors", description="whether A and B are added apart, as published, or the updates"
    )


def _whose(option: str) -> str:
    """What the help of an option says first: who reads it, where these are few."""
    if option in EVERYWHERE:
        return "any mode: "
    if option in FAMILIES["merges"].options and option not in FAMILIES["outputs"].options:
        return "merges: "
    own = readers(option)
    return f"{', '.join(own)}: " if len(own) <= NAMED else ""


def _brought(option: Option) -> Any:
    """pydantic's (type, field) of a key that a row brings along."""
    kind = option.kind or (type(option.default) if option.default is not None else Any)
    return kind, Field(default=option.default, description=option.help, **option.bounds)


if TYPE_CHECKING:
    MethodConfig = _Settings
else:
    MethodConfig = create_model(
        "MethodConfig",
        __base__=_Settings,
        __doc__=_Settings.__doc__,
        __module__=__name__,
        **{name: _brought(option) for name, option in brought().items() if name not in _Settings.model_fields},
    )
    for _name, _field in MethodConfig.model_fields.items():
        _field.description = _whose(_name) + _field.description
