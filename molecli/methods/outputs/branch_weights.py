"""Shared by the methods on a UNet's outputs: the weights of their branches and of the text encoder.

`keep` [N] is 0 for masked experts; None if none is masked. Axes: see `molecli.experts`; K branches.
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
    """[K, N]: branch k runs only expert `experts[k]`, with its weight. Without experts, one branch runs the base."""
    rows = weights.new_zeros(max(1, len(experts)), len(weights))
    for row, expert in enumerate(experts):
        rows[row, expert] = weights[expert]
    return rows


def mean_weights(weights: Tensor, keep: Tensor | None) -> Tensor:
    """[N], w_i divided by the number of kept experts, so that a single LoRA keeps its weight.

    Departs: the published code of these methods encodes the prompt with the LoRA that is active first (Composite: with
    all), so the picture depends on their order. Here a prompt is encoded once, with the mean, which treats all alike.
    """
    mask = torch.ones_like(weights) if keep is None else (keep != 0).to(weights)
    return weights * mask / mask.sum().clamp_min(1.0)
