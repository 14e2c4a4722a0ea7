"""Composition files: `composition.safetensors` (tensors and text metadata) next to the `recipe.yaml` of the run.

Contents: ExpertRecord, Composition, record_of, save_composition, load_composition, check_experts, check_base.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from molecli.errors import MismatchError, UsageError
from molecli.experts import Expert, ExpertBank
from molecli.files.atomic import write_text, write_with
from molecli.files.output_folder import RECIPE_FILE
from molecli.files.tensor_file import opened
from molecli.functional.fingerprint import difference

FORMAT, FORMAT_VERSION = "mole", "1"
TENSORS_FILE = "composition.safetensors"
_AGAIN = "Compose again."
_TEXT_KEYS = ("mode", "level", "base", "base_fingerprint", "recipe", "recipe_sha256", "molecli_version")


@dataclass(frozen=True)
class ExpertRecord:
    """The record of one expert in a composition; `scaling_sha256` is a hash of its scalings at all matrices."""

    name: str
    source: str
    sha256: str
    rank: int
    alpha: float
    matrices: tuple[str, ...]
    scaling_sha256: str = ""


@dataclass(frozen=True)
class Composition:
    """A composition: how it was made, its base and experts, and the learned or merged tensors."""

    mode: str
    level: str
    base: str
    base_fingerprint: str
    experts: tuple[ExpertRecord, ...]
    gate: dict[str, Any] | None
    settings: dict[str, Any]
    recipe: str
    tensors: dict[str, Tensor] = field(repr=False)
    version: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """The experts' names, in order."""
        return tuple(expert.name for expert in self.experts)


def record_of(expert: Expert) -> ExpertRecord:
    """The record of `expert` in a composition."""
    return ExpertRecord(
        name=expert.name,
        source=expert.source,
        sha256=expert.sha256,
        rank=expert.rank,
        alpha=expert.alpha,
        matrices=expert.matrices,
        scaling_sha256=_scaling_digest(expert),
    )


def save_composition(folder: str | Path, composition: Composition) -> Path:
    """The path of composition.safetensors, written after the recipe next to it.

    Both writes are atomic. A folder without composition.safetensors is a run that did not finish.
    Raises: RunError if the folder cannot be written.
    """
    folder = Path(folder)
    # Copies, because safetensors refuses tensors that share memory, such as the fixed weights of several sites.
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in composition.tensors.items()
    }
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "mode": composition.mode,
        "level": composition.level,
        "base": composition.base,
        "base_fingerprint": composition.base_fingerprint,
        "experts": json.dumps([asdict(expert) for expert in composition.experts]),
        "gate": json.dumps(composition.gate),
        "settings": json.dumps(composition.settings),
        "recipe": composition.recipe,
        "recipe_sha256": _sha256(composition.recipe),
        "molecli_version": composition.version or _own_version(),
    }
    write_text(folder / RECIPE_FILE, composition.recipe)
    return write_with(folder / TENSORS_FILE, lambda part: save_file(tensors, part, metadata=metadata))


def load_composition(path: str | Path) -> Composition:
    """The composition at `path`, a folder or a .safetensors file; its tensors are on the CPU.

    Raises: UsageError if there is none; MismatchError if it is damaged, of another kind or not finite.
    """
    file = find_composition(path)
    metadata, tensors = _read(file)
    if metadata.get("format") != FORMAT:
        raise MismatchError(str(file), "this is not a composition", "Name the output folder of mole compose.")
    if metadata.get("format_version") != FORMAT_VERSION:
        what = (
            f"it has format version {metadata.get('format_version')}, and this version of mole reads {FORMAT_VERSION}"
        )
        raise MismatchError(str(file), what, "Update mole, or compose again.")
    text = {key: _present(file, metadata, key) for key in _TEXT_KEYS}
    if _sha256(text["recipe"]) != text["recipe_sha256"]:
        raise MismatchError(str(file), "its recipe does not match recipe_sha256", _AGAIN)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise MismatchError(str(file), f"{name!r} holds NaN or infinity", _AGAIN)
    return Composition(
        mode=text["mode"],
        level=text["level"],
        base=text["base"],
        base_fingerprint=text["base_fingerprint"],
        experts=_parsed(file, metadata, "experts", _records),
        gate=_parsed(file, metadata, "gate", _mapping_or_none),
        settings=_parsed(file, metadata, "settings", lambda value: _mapping_or_none(value) or {}),
        recipe=text["recipe"],
        tensors=tensors,
        version=text["molecli_version"],
    )


def find_composition(path: str | Path) -> Path:
    """The composition.safetensors at `path` (the file or its folder). Raises: UsageError if there is none."""
    path = Path(path)
    if path.is_dir():
        if not (path / TENSORS_FILE).is_file():
            raise UsageError(
                str(path), f"it has no {TENSORS_FILE}", "Name the output folder of a finished mole compose."
            )
        return path / TENSORS_FILE
    if not path.is_file():
        raise UsageError(str(path), "no such composition", "Name the output folder of mole compose.")
    return path


def check_experts(composition: Composition, bank: ExpertBank) -> None:
    """Checks that `bank` has the same experts as the composition, in its order; absent ones are compared by name.

    Raises: MismatchError that names the first difference.
    """
    if len(bank) != len(composition.experts):
        what = f"{len(bank)} LoRAs are given, and the composition was made with {len(composition.experts)}"
        raise MismatchError("--loras", what, _expected(composition))
    if sorted(bank.names) == sorted(composition.names) and bank.names != composition.names:
        raise MismatchError("--loras", f"the order is {', '.join(bank.names)}", _expected(composition))
    for record, expert in zip(composition.experts, bank.experts, strict=True):
        found = record_of(expert)
        if found.name != record.name:
            raise MismatchError(
                found.name, f"the composition has {record.name!r} in this place", _expected(composition)
            )
        if expert.absent:
            continue
        if found.sha256 != record.sha256:
            what = f"its weights differ from those in the composition ({_short(found)}, not {_short(record)})"
            raise MismatchError(found.name, what, f"Give the LoRA from {record.source}, or compose again.")
        for key in ("rank", "alpha"):
            if getattr(found, key) != getattr(record, key):
                what = (
                    f"its {key} is {getattr(found, key):g}, and the composition was made with {getattr(record, key):g}"
                )
                raise MismatchError(found.name, what, f"Restore its adapter_config.json, or {_AGAIN.lower()}")
        if found.scaling_sha256 != record.scaling_sha256:
            what = "its matrices or their scalings differ from those in the composition"
            raise MismatchError(found.name, what, f"Restore its adapter_config.json, or {_AGAIN.lower()}")


def check_base(
    composition: Composition,
    fingerprint: str,
    same: Callable[[str, str], bool] = str.__eq__,
    *,
    base: str = "",
) -> None:
    """Checks that `fingerprint` equals that of the composition's base under `same` (equality, or `same_base`).

    Raises: MismatchError that names the expected base and `base`, the given one.
    """
    if not same(composition.base_fingerprint, fingerprint):
        what = (
            f"the composition was made on {composition.base}, {difference(composition.base_fingerprint, fingerprint)}"
        )
        raise MismatchError(base or "--base", what, f"Give --base {composition.base}, or compose again.")


def _read(file: Path) -> tuple[Mapping[str, str], dict[str, Tensor]]:
    with opened(file, remedy=_AGAIN) as tensors:
        return tensors.metadata() or {}, {name: tensors.get_tensor(name) for name in list(tensors.keys())}


def _present(file: Path, metadata: Mapping[str, str], key: str) -> str:
    if key not in metadata:
        raise MismatchError(str(file), f"its metadata lacks {key!r}", _AGAIN)
    return metadata[key]


def _parsed(file: Path, metadata: Mapping[str, str], key: str, read: Callable[[Any], Any]) -> Any:
    text = _present(file, metadata, key)
    try:
        return read(json.loads(text))
    except (ValueError, TypeError, KeyError):
        raise MismatchError(str(file), f"its metadata key {key!r} is damaged", _AGAIN) from None


def _records(value: Any) -> tuple[ExpertRecord, ...]:
    return tuple(ExpertRecord(**{**entry, "matrices": tuple(entry["matrices"])}) for entry in value)


def _mapping_or_none(value: Any) -> dict[str, Any] | None:
    if value is not None and not isinstance(value, dict):
        raise TypeError
    return value


def _scaling_digest(expert: Expert) -> str:
    # Alpha is not in the hashed weights file: without this a changed alpha_pattern would go unnoticed.
    return _sha256(json.dumps({matrix: expert.factors[matrix].scaling for matrix in sorted(expert.factors)}))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _short(record: ExpertRecord) -> str:
    return record.sha256[:12]


def _expected(composition: Composition) -> str:
    return f"Give them in this order: {', '.join(composition.names)}."


def _own_version() -> str:
    try:
        return installed_version("molecli")
    except PackageNotFoundError:
        return "unknown"
