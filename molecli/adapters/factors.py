"""The factors of a LoRA's matrices, from the tensors of its files.

Contents: Stored, stored_tensors, low_rank, share, a_of, b_of.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from molecli.adapters.fused import slice_of
from molecli.adapters.info import Adapted, AdapterInfo
from molecli.adapters.keys import Keys
from molecli.adapters.weights import opened_lora
from molecli.experts import LowRank

# (file, key) -> tensor
Stored = Mapping[tuple[Path, str], Tensor]


def stored_tensors(info: AdapterInfo, names: Iterable[str]) -> Stored:
    """The stored tensors of the matrices `names` (the shifts for SVDiff); each is read once."""
    pairs = [keys for name in names for keys in info.adapted[name].stored]
    wanted = dict.fromkeys(entry for keys in pairs for entry in (a_of(keys), b_of(keys)))
    found: dict[tuple[Path, str], Tensor] = {}
    for path in dict.fromkeys(path for path, _ in wanted):
        with opened_lora(path) as file:
            found |= {(path, key): file.get_tensor(key) for where, key in wanted if where == path}
    return {entry: found[entry] for entry in wanted}


def low_rank(matrix: Adapted, stored: Stored) -> LowRank:
    """The factors in the shape for the matrix: A [r, d_in] or [r, c_in, k_h, k_w], B [d_out, r]."""
    if matrix.parts:
        return _side_by_side(matrix, [(row, low_rank(part, stored)) for row, part in matrix.parts])
    a, b = stored[a_of(matrix.keys)], stored[b_of(matrix.keys)]
    if matrix.keys.expert is not None:
        a, b = slice_of(a, b, *matrix.keys.expert)
    return LowRank(a.reshape(matrix.rank, *matrix.shape[1:]), b.reshape(-1, matrix.rank), matrix.scaling)


def _side_by_side(matrix: Adapted, parts: Sequence[tuple[int, LowRank]]) -> LowRank:
    """The factors of a matrix whose rows from `row` on are updated by each part."""
    A = torch.cat([part.A for _, part in parts])
    B, first = A.new_zeros(matrix.shape[0], len(A)), 0
    for row, part in parts:
        scaled = part.B if part.scaling == matrix.scaling else part.B * (part.scaling / matrix.scaling)
        B[row : row + len(part.B), first : first + part.rank] = scaled
        first += part.rank
    return LowRank(A, B, matrix.scaling)


def a_of(keys: Keys) -> tuple[Path, str]:
    return keys.path, keys.A


def b_of(keys: Keys) -> tuple[Path, str]:
    return keys.path, keys.B


def share(info: AdapterInfo, names: Collection[str]) -> float:
    """The share of the LoRA's weights in the matrices `names`: of its squared Frobenius norm ‖scaling·B·A‖², in [0, 1].

    These shares sum to 1 over the matrices. Of a LoRA that is zero it is the share of its matrices.
    """
    stored = stored_tensors(info, info.adapted)
    if info.origin is not None:
        sizes = {name: _squared(stored[a_of(matrix.keys)]) for name, matrix in info.adapted.items()}
    else:
        sizes = {name: _squared_update(low_rank(matrix, stored)) for name, matrix in info.adapted.items()}
    total = sum(sizes.values())
    if not 0 < total < float("inf"):  # zero, or not finite: the reader says so
        return len(names) / len(sizes)
    return sum(sizes[name] for name in names) / total


def _squared_update(factors: LowRank) -> float:
    """‖scaling·B·A‖², from the two small Gram matrices."""
    a, b = factors.A.double().flatten(1), factors.B.double()
    return factors.scaling**2 * float(((a @ a.T) * (b.T @ b)).sum())


def _squared(shift: Tensor) -> float:
    return float(shift.double().square().sum())
