"""LoRAs as written on the command line and in recipes: `name=PATH@WEIGHT`. Needs no torch."""

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

# A folder with one of these is a LoRA: of PEFT, diffusers, another trainer, or PEFT by component (unet/…).
_MARKERS = (CONFIG_FILE, "*.safetensors", f"*/{WEIGHTS_FILE}", f"*/{DIFFUSERS_FILE}")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")
_WEIGHTED = re.compile(r"(?P<source>.+)@(?P<weight>[^@/\\]*)")


@dataclass(frozen=True)
class LoraSpec:
    """One LoRA as the user named it: `source` is a built-in name, a folder, a .safetensors file or a hub id."""

    name: str
    source: str
    weight: float = 1.0


class LoraLike(Protocol):
    """A LoRA with name and source: a LoraSpec, or a recipe's LoraConfig."""

    @property
    def name(self) -> str: ...

    @property
    def source(self) -> str: ...


def parse_lora(text: str) -> LoraSpec:
    """The LoRA that `text` names: "a", "runs/a", "a.safetensors", "org/repo", each with "name=" and "@WEIGHT".

    Without "name=" the name is that of the built-in LoRA, the folder, the file (its stem) or the repository.
    Raises: UsageError for an empty path, an invalid name or a weight that is not a number.
    """
    name, equals, rest = text.strip().partition("=")
    # A path may contain "=", as in "runs/lr=1e-3": the part before it is a name only if it has no slash.
    if not equals or "/" in name or "\\" in name:
        name, rest = "", text.strip()
    source, weight = _split_weight(text, rest.strip())
    if not source:
        raise UsageError(f"--loras {text}", "the path is missing", "Write name=PATH or name=PATH@WEIGHT.")
    shipped = builtin_meant(source)
    if shipped is not None:
        source = shipped[0]  # the name, which stays valid in recipes if the letters change
    name = name.strip() if equals and name else _default_name(source)
    check_name(name, text)
    return LoraSpec(name, source, weight)


def parse_loras(texts: Iterable[str]) -> tuple[LoraSpec, ...]:
    """The LoRAs in `texts`, each a comma-separated list. Raises: UsageError for a repeated name."""
    specs = tuple(parse_lora(part) for text in texts for part in text.split(",") if part.strip())
    check_distinct([spec.name for spec in specs])
    return specs


def builtin_meant(source: str) -> tuple[str, Path] | None:
    """(name, folder) of the built-in LoRA that `source` names; None if the user has a LoRA at that path."""
    path = Path(source).expanduser()
    own = path.is_file() or any(next(path.glob(marker), None) for marker in _MARKERS)
    return None if own else builtin_lora(source)


def check_name(name: str, text: str) -> None:
    """Checks that the name can be used in `--mask` and in tables. Raises: UsageError."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"--loras {text}",
            f"{name!r} is not a valid name (letters, digits, '_', '-' and '.')",
            "Choose another: name=PATH.",
        )


def check_distinct(names: Iterable[str]) -> None:
    """Checks that no name occurs twice. Raises: UsageError that names the first repeated one."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise UsageError("--loras", f"the name {name!r} is used twice", "Give each LoRA its own name: name=PATH.")
        seen.add(name)


def _default_name(source: str) -> str:
    """The name of a LoRA if none is written: that of the built-in LoRA, folder, file (its stem) or repository."""
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


# The parts of a pipeline that LoRAs adapt.
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
