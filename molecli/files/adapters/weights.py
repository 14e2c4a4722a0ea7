"""The tensors of a LoRA file: opened safely, sorted into factors by the matrix that they adapt."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molecli.errors import MismatchError
from molecli.files.adapters.settings import unsupported
from molecli.files.tensor_file import opened

PEFT_PREFIX = "base_model.model."
AGAIN = "Download or export it again."
_CHUNK_BYTES = 1 << 20
# A part of a key -> the kind of adapter that holds it
_FOREIGN = {
    "lora_magnitude_vector": "DoRA",
    "dora_scale": "DoRA",
    "lora_embedding_": "LoRA on an embedding (lora_embedding_A)",
    "modules_to_save": "LoRA with modules_to_save",
    "hada_w": "LoHa",
    "lokr_w": "LoKr",
    "lora_unet_": "the kohya/A1111 layout (lora_unet_*)",
    "lora_te": "the kohya/A1111 layout (lora_te*)",
    ".lora.down.": "the diffusers layout (lora.down)",
    ".lora_down.": "the kohya/A1111 layout (lora_down)",
}


@dataclass(frozen=True)
class Keys:
    """The keys of one matrix in the file; `alpha` is that of its scalar, if it has one."""

    A: str
    B: str
    alpha: str | None = None


def opened_lora(path: Path) -> AbstractContextManager[Any]:
    """The LoRA file at `path`, opened. Raises: UsageError (unreadable), MismatchError (damaged)."""
    return opened(path, remedy=AGAIN)


def sha256_of(path: Path) -> str:
    """The SHA-256 of the file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def factor_keys(where: str, names: Iterable[str]) -> dict[str, Keys]:
    """matrix name -> its keys, in the file's order.

    Raises: UsageError naming a kind of adapter that is not read; MismatchError when half of a pair is missing.
    """
    names = list(names)
    for part, kind in _FOREIGN.items():
        if any(part in name for name in names):
            raise unsupported(where, kind)
    found: dict[str, dict[str, str]] = {}
    for name in names:
        matrix, part = _split(where, name)
        found.setdefault(matrix, {})[part] = name
    for matrix, parts in found.items():
        for part in ("A", "B"):
            if part not in parts:
                raise MismatchError(where, f"lora_{part} of {matrix!r} is missing", AGAIN)
    if not found:
        raise MismatchError(where, "holds no LoRA", "Name a LoRA that was trained and saved.")
    return {matrix: Keys(parts["A"], parts["B"], parts.get("alpha")) for matrix, parts in found.items()}


def factor_shapes(where: str, matrix: str, a: list[int], b: list[int]) -> tuple[int, int, int]:
    """(rank, d_out, d_in) from the shapes of A [r, d_in] and B [d_out, r]. Raises: MismatchError if they do not fit."""
    if len(a) == 4 or len(b) == 4:
        raise unsupported(where, f"LoRA on a convolution ({matrix})")
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or 0 in (*a, *b):
        what = f"lora_A {a} and lora_B {b} of {matrix!r} do not multiply"
        raise MismatchError(where, what, AGAIN)
    return a[0], b[0], a[1]


def metadata_of(file: Any) -> Mapping[str, str]:
    """The string metadata of an opened file, empty when it has none."""
    return file.metadata() or {}


def _split(where: str, key: str) -> tuple[str, str]:
    """(matrix, "A", "B" or "alpha") of one key. Raises: UsageError for a key of another kind of adapter."""
    bare = key.removeprefix(PEFT_PREFIX)
    matrix, dot, last = bare.rpartition(".")
    if dot and last == "alpha":
        return matrix, last
    for part in ("A", "B"):
        # "lora_A.weight" as saved, "lora_A.NAME.weight" in a raw state dict.
        matrix, found, rest = bare.partition(f".lora_{part}.")
        if found and rest.endswith("bias"):
            raise unsupported(where, "LoRA with bias")
        if found and (rest == "weight" or rest.endswith(".weight")):
            return matrix, part
    kind = "LoRA with bias" if key.endswith("bias") else f"a LoRA that also holds {key!r}"
    raise unsupported(where, kind)
