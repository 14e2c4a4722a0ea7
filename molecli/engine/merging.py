"""Merging experts into one LoRA, matrix by matrix, by a method that makes low-rank factors of their updates.

Contents: merge_experts.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from molecli.backbones.weights import BaseWeights
from molecli.compose.updates import Merge, Updates
from molecli.experts import ExpertBank, LowRank, Merged
from molecli.files.recipe import MethodConfig

Told = Callable[[int, int], None]


@torch.no_grad()
def merge_experts(
    bank: ExpertBank,
    merge: Merge,
    weights: Sequence[float],
    config: MethodConfig,
    *,
    base: BaseWeights | None = None,
    kept: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    told: Told | None = None,
) -> Merged:
    """The experts `kept` (all by default) as one, in float32 on `device`; nothing is left at a matrix none adapts.

    `base` is for methods that look at the base's own matrices; `told` hears how many matrices are done, of how many.
    Raises: MismatchError where factors cannot be merged.
    """
    chosen = range(len(bank)) if kept is None else kept
    factors, errors = {}, {}
    for done, matrix in enumerate(bank.matrices, start=1):
        present = [i for i in bank.present(matrix) if i in chosen]
        shape = bank.experts[bank.present(matrix)[0]].factors[matrix].A.shape[1:]
        if present:
            updates = _updates(bank, matrix, present, weights, config.seed, device)
            if base is not None:
                updates = replace(updates, spectrum=partial(base.spectrum, matrix))
            A, B, errors[matrix] = merge(updates, config)
            factors[matrix] = LowRank(A.view(-1, *shape), config.scale * B, 1.0)
        else:
            factors[matrix] = _nothing(bank, matrix, device)
        if told is not None:
            told(done, len(bank.matrices))
    return Merged(factors, errors)


def _updates(
    bank: ExpertBank,
    matrix: str,
    present: Sequence[int],
    weights: Sequence[float],
    seed: int,
    device: torch.device | str,
) -> Updates:
    def pair(factor: LowRank) -> tuple[Tensor, Tensor]:
        A, B = factor.A.to(device, torch.float32), factor.B.to(device, torch.float32)
        return A.flatten(1), factor.scaling * B

    experts = [bank.experts[i] for i in present]
    return Updates(
        matrix,
        tuple(pair(expert.factors[matrix]) for expert in experts),
        tuple(float(weights[i]) for i in present),
        # Of the names, so that the experts' order changes nothing.
        tuple(zlib.crc32(f"{seed}/{expert.name}/{matrix}".encode()) for expert in experts),
    )


def _nothing(bank: ExpertBank, matrix: str, device: torch.device | str) -> LowRank:
    """A LoRA of rank 1 that adds nothing, for a matrix whose experts are all masked."""
    like = bank.experts[bank.present(matrix)[0]].factors[matrix]
    return LowRank(torch.zeros(1, *like.A.shape[1:], device=device), torch.zeros(len(like.B), 1, device=device), 1.0)
