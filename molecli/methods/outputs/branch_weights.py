"""What the methods on a UNet's outputs share: the rows of weights of their branches, and their text encoder's.

Tensors in, tensors out. `keep` [N] is 0 for masked experts, None when none is. Axes: see `molecli.experts`; K branches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def kept(turns: Sequence[int], keep: Tensor | None) -> list[int]:
    """The experts of `turns` that are not masked, in that order."""
    if keep is None:
        return list(turns)
    flags = keep.tolist()
    return [expert for expert in turns if flags[expert]]


def one_each(weights: Tensor, experts: Sequence[int]) -> Tensor:
    """[K, N]: branch k runs expert `experts[k]` alone, with its own weight; the base alone where there is none."""
    rows = weights.new_zeros(max(1, len(experts)), len(weights))
    for row, expert in enumerate(experts):
        rows[row, expert] = weights[expert]
    return rows


def mean_weights(weights: Tensor, keep: Tensor | None) -> Tensor:
    """[N], w_i over the number of kept experts: one LoRA alone keeps the weight it has.

    Departs: the published code of these methods encodes the prompt with whichever LoRA is active first (Composite: with
    all), so that the picture depends on their order. A prompt is encoded once; the mean treats all alike.
    """
    mask = torch.ones_like(weights) if keep is None else (keep != 0).to(weights)
    return weights * mask / mask.sum().clamp_min(1.0)
