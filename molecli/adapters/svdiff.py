"""SVDiff adapter files: shifts of the base's singular values, and the base that they belong to.

    svdiff.safetensors      svdiff/<matrix>/delta, [min(d_out, d_in)] in the order of the singular values, largest first

Shifts are meaningless without the singular vectors of the base. The metadata therefore have the fingerprint of the base
and a hash of every matrix. Contents: Origin, Base, is_svdiff, described, write_svdiff.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import save
from torch import Tensor

from molecli.adapters.keys import AGAIN
from molecli.adapters.metadata import BASE_KEYS
from molecli.adapters.weights import Shape
from molecli.errors import MismatchError, UsageError
from molecli.files.atomic import write_bytes
from molecli.files.lora_spec import SHIFTS_FILE
from molecli.files.tensor_file import in_fixed_order
from molecli.functional.spectral import Spectrum

FORMAT, FORMAT_VERSION = "mole-svdiff", "1"
_PREFIX, _SUFFIX = "svdiff/", "/delta"


@dataclass(frozen=True)
class Origin:
    """The base whose singular values are shifted: its name, number type and fingerprint, and a hash of every matrix, by
    the key of its shifts."""

    base: str
    dtype: str
    fingerprint: str
    digests: Mapping[str, str]


class Base(Protocol):
    """The base, as needed to read shifts and copies of its weights; see `bases.weights.BaseWeights`."""

    def fingerprint(self) -> str: ...

    def digest(self, matrix: str) -> str: ...

    def spectrum(self, matrix: str) -> Spectrum: ...

    def parameter(self, name: str) -> Tensor | None: ...


def is_svdiff(metadata: Mapping[str, str]) -> bool:
    """Whether a file with these metadata is an SVDiff adapter, not a LoRA."""
    return metadata.get("format") == FORMAT


def described(where: str, file: Any, metadata: Mapping[str, str]) -> tuple[Origin, dict[str, tuple[str, Shape]]]:
    """(the base of the shifts, matrix -> (key, shape)) of an opened file, without reading shifts.

    Raises: UsageError for a newer version, MismatchError for a damaged file.
    """
    version = metadata.get("format_version")
    if version != FORMAT_VERSION:
        what = f"it has format version {version}, and this version of mole reads {FORMAT_VERSION}"
        raise UsageError(where, what, "Upgrade mole.")
    try:
        known = json.loads(metadata["matrices"])
        found = {name: (_key(name), _shape(entry["shape"])) for name, entry in known.items()}
        digests = {_key(name): str(entry["sha256"]) for name, entry in known.items()}
        origin = Origin(metadata[BASE_KEYS[0]], metadata["base_dtype"], metadata["base_fingerprint"], digests)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise MismatchError(where, "its metadata do not name the base that it shifts", AGAIN) from None
    if not known:
        raise MismatchError(where, "there are no shifts in it", "Name an adapter that was trained and saved.")
    for key in sorted(set(digests) ^ set(file.keys())):
        what = "is missing" if key in digests else "is not one of its shifts"
        raise MismatchError(where, f"{key!r} {what}", AGAIN)
    for key, shape in found.values():
        wanted, there = [min(shape[0], prod(shape[1:]))], file.get_slice(key).get_shape()
        if there != wanted:
            raise MismatchError(where, f"{key!r} has the shape {there}, not {wanted}", AGAIN)
    return origin, found


def write_svdiff(folder: str | Path, shifts: Mapping[str, Tensor], shapes: Mapping[str, Shape], origin: Origin) -> Path:
    """Writes `shifts` (matrix -> [k]) and returns the file; `origin.digests` is by matrix here. Raises: RunError."""
    matrices = {name: {"shape": list(shapes[name]), "sha256": origin.digests[name]} for name in shifts}
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        BASE_KEYS[0]: origin.base,
        "base_dtype": origin.dtype,
        "base_fingerprint": origin.fingerprint,
        "matrices": json.dumps(matrices),
    }
    tensors = {_key(name): shift.detach().float().cpu().contiguous() for name, shift in shifts.items()}
    return write_bytes(Path(folder) / SHIFTS_FILE, in_fixed_order(save(tensors, metadata)))


def _shape(sizes: Sequence[int]) -> Shape:
    if len(sizes) not in (2, 4):
        raise ValueError
    return tuple(map(int, sizes))


def _key(matrix: str) -> str:
    return f"{_PREFIX}{matrix}{_SUFFIX}"
