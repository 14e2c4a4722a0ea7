"""Rank, alpha and their patterns from PEFT's configuration. Any other setting with an effect is refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from molecli.errors import MismatchError, UsageError
from molecli.files.lora_spec import COMPONENTS

# PEFT configuration key -> name of the kind of adapter that sets it. Each changes the forward pass.
_REFUSED = {
    "use_dora": "DoRA",
    "lora_bias": "LoRA with bias (lora_bias)",
    "modules_to_save": "LoRA with modules_to_save",
    "trainable_token_indices": "LoRA with trainable_token_indices",
    "layer_replication": "LoRA with layer_replication",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens)",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "BD-LoRA",
    "arrow_config": "Arrow",
    "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA",
}
# These initialisations change the weights of the base, so that the adapter fits no published base.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Settings that train weights of the base itself: they are named, because only merging keeps them.
_OWN_WEIGHTS = ("modules_to_save", "trainable_token_indices")
_EMPTY: Mapping[str, Any] = {}
PLAIN = "Use a plain LoRA (or rsLoRA)."
MERGE = "Use a plain LoRA, or merge it into its base (PEFT's merge_and_unload) and use that as the base."


@dataclass(frozen=True)
class LoraSettings:
    """Rank and alpha of every matrix of one LoRA; patterns are PEFT's regular expressions.

    parameters: the ends of the names of the parameters that it adapts without a layer (PEFT's target_parameters).
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    base_model: str | None = None
    parameters: tuple[str, ...] = ()

    def rank_of(self, matrix: str) -> int:
        """The configured rank of `matrix`."""
        return int(_matched(self.rank_pattern, matrix, self.rank))

    def alpha_of(self, matrix: str) -> float:
        """The configured alpha of `matrix`."""
        return float(_matched(self.alpha_pattern, matrix, self.alpha))

    def scaling(self, alpha: float, rank: int) -> float:
        """alpha/r, or alpha/sqrt(r) for rsLoRA. Source: Kalajdzievski, arXiv:2312.03732, Eq. 6."""
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def read_config(path: Path) -> dict[str, Any]:
    """The mapping in an adapter_config.json. Raises: UsageError (unreadable), MismatchError (not JSON)."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            str(path), f"it cannot be read ({error.strerror})", "Check the path and its permissions."
        ) from None
    except ValueError as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise MismatchError(f"{path}{line}", "not valid JSON", "Export the adapter again.") from None
    if not isinstance(config, dict):
        raise MismatchError(str(path), "not a JSON object", "Export the adapter again.")
    return config


def parse_config(where: str, config: Mapping[str, Any]) -> LoraSettings:
    """The settings in PEFT's configuration `config`.

    Raises: UsageError for an unsupported setting; MismatchError for an invalid value.
    """
    refuse_unsupported(where, config)
    for key in ("r", "lora_alpha"):
        number = config.get(key)
        if isinstance(number, bool) or not isinstance(number, (int, float)) or number <= 0:
            raise MismatchError(
                where, f"{key} is {number!r}, not a positive number", f"Write the {key} of its training."
            )
    return LoraSettings(
        rank=int(config["r"]),
        alpha=float(config["lora_alpha"]),
        rank_pattern=_pattern(where, config, "rank_pattern"),
        alpha_pattern=_pattern(where, config, "alpha_pattern"),
        rslora=bool(config.get("use_rslora")),
        base_model=config.get("base_model_name_or_path") or None,
        parameters=_names(where, config, "target_parameters"),
    )


def refuse_unsupported(where: str, config: Mapping[str, Any]) -> None:
    """Checks that the adapter is a plain LoRA. Raises: UsageError that names its kind."""
    kind = str(config.get("peft_type") or "LORA").upper()
    if kind != "LORA":
        raise unsupported(where, f"the adapter type {kind}")
    for key, name in _REFUSED.items():
        if config.get(key):
            own = key in _OWN_WEIGHTS
            raise unsupported(where, name + (_named(config[key]) if own else ""), MERGE if own else PLAIN)
    if config.get("bias", "none") != "none":
        raise unsupported(where, f"LoRA with bias (bias: {config['bias']})")
    start = str(config.get("init_lora_weights", "")).lower()
    if start.startswith(_CHANGES_BASE):
        what = f"it was initialised with {start}, which changes the weights of the base"
        raise UsageError(
            where, what, "Convert it: PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)."
        )


def unsupported(where: str, name: str, remedy: str = PLAIN) -> UsageError:
    """The error for an unsupported kind of adapter."""
    return UsageError(where, f"{name} is not supported", remedy)


def _named(value: Any) -> str:
    """The modules whose own weights an adapter trains, in brackets; "" for a list of tokens."""
    names = [name for name in value if isinstance(name, str)] if isinstance(value, (list, dict)) else []
    return f" (weights of its own for {', '.join(names)})" if names else ""


def _names(where: str, config: Mapping[str, Any], key: str) -> tuple[str, ...]:
    names = config.get(key) or ()
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise MismatchError(where, f"{key} is {names!r}", "It lists names of parameters.")
    return tuple(names)


def _pattern(where: str, config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    pattern = config.get(key) or _EMPTY
    try:
        for expression, number in pattern.items():
            re.compile(expression)
            if not number > 0:
                raise ValueError
    except (AttributeError, TypeError, ValueError, re.error):
        raise MismatchError(where, f"{key} is {pattern!r}", "It maps module names to positive numbers.") from None
    return dict(pattern)


def _matched(pattern: Mapping[str, Any], matrix: str, default: float) -> Any:
    """PEFT's rule: the first key that matches the end of the name, from its start or after a dot.

    CLIP's modules are under "text_model." in some releases of transformers only, and patterns of a pipeline may name
    the component or not: all these names are accepted. Source: peft.utils.other.get_pattern_key.
    """
    component, _, path = matrix.partition(".")
    inner = path if component in COMPONENTS else matrix
    for name in dict.fromkeys((matrix, inner, inner.removeprefix("text_model."))):
        for expression, number in pattern.items():
            if re.match(rf"(.*\.)?({expression})$", name):
                return number
    return default
