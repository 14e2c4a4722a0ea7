"""Factors of fused parameters in PEFT's stacked layout (target_parameters). Contents: Stack, stacks. See `fused`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from molecli.experts import LowRank

# (module, parameter) -> the parameter's matrices, in the order of its first axis; all in the base's order.
Parameters = Mapping[tuple[str, str], Sequence[str]]


@dataclass(frozen=True)
class Stack:
    """The factors of one parameter: `name` and `key`, its name and that of its factors in PEFT; `one` matrix's rank and
    scaling; A [E·r, d_in], B [d_out, r·E]."""

    name: str
    key: str
    one: LowRank
    A: Tensor
    B: Tensor


def stacks(factors: Mapping[str, LowRank], parameters: Parameters) -> list[Stack]:
    """The factors that belong to `parameters`, each parameter's as one stack; matrices without factors get zeros."""
    adapted: dict[str, list[str]] = {}
    for (module, parameter), names in parameters.items():
        if any(name in factors for name in names):
            adapted.setdefault(module, []).append(parameter)
    found = []
    for module, held in adapted.items():
        for place, parameter in enumerate(held):
            # PEFT wraps the module once for each parameter; the first one is innermost.
            key = module + ".base_layer" * (len(held) - 1 - place)
            found.append(_stack(f"{module}.{parameter}", key, [factors.get(n) for n in parameters[module, parameter]]))
    return found


def _stack(name: str, key: str, matrices: Sequence[LowRank | None]) -> Stack:
    there = [matrix for matrix in matrices if matrix is not None]
    rank, like = max(matrix.rank for matrix in there), there[0]
    scalings = {matrix.scaling for matrix in there}
    scaling = scalings.pop() if len(scalings) == 1 else 1.0
    A = like.A.new_zeros(len(matrices), rank, like.A.shape[1])
    B = like.B.new_zeros(like.B.shape[0], rank, len(matrices))
    for place, matrix in enumerate(matrices):
        if matrix is not None:
            A[place, : matrix.rank] = matrix.A
            B[:, : matrix.rank, place] = matrix.B if matrix.scaling == scaling else matrix.scaling * matrix.B
    return Stack(name, key, LowRank(A[0], torch.empty(0), scaling), A.flatten(0, 1), B.flatten(1))
