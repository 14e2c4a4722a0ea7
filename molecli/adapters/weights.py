"""LoRA files: safe opening, hashes, checks of shapes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor

from molecli.adapters.keys import AGAIN, Keys
from molecli.adapters.metadata import Configured
from molecli.errors import MismatchError
from molecli.files.tensor_file import opened

# Shape of a matrix: (d_out, d_in), or (c_out, c_in, k_h, k_w) for a convolution.
Shape = tuple[int, ...]

_CHUNK_BYTES = 1 << 20


def opened_lora(path: Path) -> AbstractContextManager[Any]:
    """The LoRA file at `path`, opened. Raises: UsageError (unreadable), MismatchError (damaged)."""
    return opened(path, remedy=AGAIN)


def sha256_of(paths: Sequence[Path]) -> str:
    """The SHA-256 of a file in hex; for several files, that of their hashes in order."""
    hashes = [_file_hash(path) for path in paths]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def factor_shape(where: str, module: str, keys: Keys, a: list[int], b: list[int]) -> tuple[int, Shape]:
    """(rank, shape of the matrix) from the shapes of the factors; see `Shape`.

    A is [r, d_in] or [r, c_in, k_h, k_w]; B is [d_out, r], for a convolution usually stored as [d_out, r, 1, 1].
    Raises: MismatchError if they do not fit each other.
    """
    if 0 in (*a, *b):
        mark, shape = (keys.pair[0], a) if 0 in a else (keys.pair[1], b)
        what = f"{mark} of {module!r} is empty ({shape}): it was saved while its weights were spread over several GPUs"
        raise MismatchError(where, what, "Save it again with the weights gathered (DeepSpeed ZeRO-3: zero_to_fp32.py).")
    fit = len(a) in (2, 4) and len(b) in (2, 4) and a[0] == b[1] and set(b[2:]) <= {1}
    if not fit:
        down, up = keys.pair
        raise MismatchError(where, f"{down} {a} and {up} {b} of {module!r} cannot be multiplied", AGAIN)
    return a[0], (b[0], *a[1:])


def check_rank(where: str, module: str, rank: int, wanted: int, said: Configured) -> None:
    """Raises: MismatchError if the factors of `module` have another rank than the configuration says."""
    if rank != wanted:
        raise MismatchError(where, f"{module!r} has rank {rank}, but {said.origin} says {wanted}", said.remedy)


def alpha_in(where: str, module: str, tensor: Tensor) -> float:
    """The alpha stored with the factors of `module`. Raises: MismatchError unless it is one finite number."""
    if tensor.numel() != 1:
        what = f"alpha of {module!r} has the shape {list(tensor.shape)}, and must be one number"
        raise MismatchError(where, what, AGAIN)
    alpha = float(tensor)
    if not math.isfinite(alpha):
        raise MismatchError(where, f"alpha of {module!r} is {alpha}", AGAIN)
    return alpha


def metadata_of(file: Any) -> Mapping[str, str]:
    """The text metadata of an opened file, or {}."""
    return file.metadata() or {}
