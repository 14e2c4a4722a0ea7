"""How a LoRA is written on the command line and in a recipe: `name=PATH@WEIGHT`. Needs no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Protocol

from molecli.catalog.builtin import builtin_lora
from molecli.errors import UsageError

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
SHIFTS_FILE = "svdiff.safetensors"  # an SVDiff adapter

# Any of these makes a folder a LoRA: PEFT's file, diffusers', another trainer's, or PEFT's by component (unet/…).
_MARKERS = (CONFIG_FILE, "*.safetensors", f"*/{WEIGHTS_FILE}")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")
_WEIGHTED = re.compile(r"(?P<source>.+)@(?P<weight>[^@/\\]*)")


@dataclass(frozen=True)
class LoraSpec:
    """One LoRA as the user named it: `source` is a built-in name, a folder, a .safetensors file or a hub id."""

    name: str
    source: str
    weight: float = 1.0


class LoraLike(Protocol):
    """What a reader needs of a LoRA's name: a LoraSpec, or a recipe's LoraConfig."""

    @property
    def name(self) -> str: ...

    @property
    def source(self) -> str: ...


def parse_lora(text: str) -> LoraSpec:
    """The LoRA that `text` names: "a", "runs/a", "a.safetensors", "org/repo", each with "name=" and "@WEIGHT".

    Without "name=" the name is the built-in LoRA's, the folder's, the file's stem or the repository's.
    Raises: UsageError for an empty path, an unusable name or a weight that is not a number.
    """
    name, equals, rest = text.strip().partition("=")
    # A path may itself hold "=", as in "runs/lr=1e-3": what precedes it is a name only if it looks like one.
    if not equals or "/" in name or "\\" in name:
        name, rest = "", text.strip()
    source, weight = _split_weight(text, rest.strip())
    if not source:
        raise UsageError(f"--loras {text}", "no path after the name", "Write name=PATH or name=PATH@WEIGHT.")
    shipped = builtin_meant(source)
    if shipped is not None:
        source = shipped[0]  # the real name: a recipe that says it outlives a change of the letters
    name = name.strip() if equals and name else _default_name(source)
    check_name(name, text)
    return LoraSpec(name, source, weight)


def parse_loras(texts: Iterable[str]) -> tuple[LoraSpec, ...]:
    """The LoRAs that texts name, each possibly a comma-separated list. Raises: UsageError on a repeated name."""
    specs = tuple(parse_lora(part) for text in texts for part in text.split(",") if part.strip())
    check_distinct([spec.name for spec in specs])
    return specs


def builtin_meant(source: str) -> tuple[str, Path] | None:
    """(real name, folder) of the built-in LoRA that `source` names; None where a LoRA of one's own lies there."""
    path = Path(source).expanduser()
    own = path.is_file() or any(next(path.glob(marker), None) for marker in _MARKERS)
    return None if own else builtin_lora(source)


def check_name(name: str, text: str) -> None:
    """Nothing, for a name usable in `--mask` and in tables. Raises: UsageError otherwise."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"--loras {text}",
            f"{name!r} is not a usable name (letters, digits, '_', '-' and '.')",
            "Give it one: name=PATH.",
        )


def check_distinct(names: Iterable[str]) -> None:
    """Nothing, when no name occurs twice. Raises: UsageError naming the first repeated one."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise UsageError("--loras", f"the name {name!r} is used twice", "Give each LoRA its own name: name=PATH.")
        seen.add(name)


def _default_name(source: str) -> str:
    """The name a LoRA gets when none is written: the built-in name, the folder's, the stem or the repository's."""
    return PurePath(source.rstrip("/\\")).name.removesuffix(".safetensors")


def _split_weight(text: str, rest: str) -> tuple[str, float]:
    match = _WEIGHTED.fullmatch(rest)
    if match is None:
        return rest, 1.0
    try:
        weight = float(match["weight"])
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise UsageError(f"--loras {text}", f"the weight {match['weight']!r} is not a number", "Write name=PATH@0.7.")
    return match["source"], weight


# The parts of a pipeline that LoRAs adapt, and what kohya's trainers call them.
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
