"""From features to expert weights: pooling, softmax with temperature, top-k, masks.

Tensors in, tensors out. Axes: see `molecli.experts`. Paper: MoLE (Wu et al., ICLR 2024), Eq. 9-11.
"""

from __future__ import annotations

import torch
from torch import Tensor


def span(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What `mean_pool` needs of `weight` [B, T]: it as [B, T, 1] in `dtype`, and its float32 sum [B, 1], at least 1."""
    return weight.unsqueeze(-1).to(dtype), weight.sum(1, keepdim=True, dtype=torch.float32).clamp_min(1.0)


def mean_pool(x: Tensor, weight: Tensor, count: Tensor) -> Tensor:
    """Mean over the positions where `weight` [B, T, 1] is 1, `count` [B, 1] of them: x [B, T, d] -> float32 [B, d]."""
    return (x * weight).sum(1, dtype=torch.float32) / count


def running_mean(
    x: Tensor, weight: Tensor, state: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Mean over positions <= t: x [B, T, d] -> float32 [B, T, d], and the (sum, count) to go on from.

    `state` is what an earlier chunk of the same sequences returned (a key-value cache is on).
    """
    w = weight.float()
    sums = (x.float() * w.unsqueeze(-1)).cumsum(1)
    counts = w.cumsum(1)
    if state is not None:
        sums, counts = sums + state[0].unsqueeze(1), counts + state[1].unsqueeze(1)
    return sums / counts.clamp_min(1.0).unsqueeze(-1), (sums[:, -1].detach(), counts[:, -1].detach())


def unit(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / ‖x‖ over the last axis."""
    return x / x.norm(dim=-1, keepdim=True).clamp_min(eps)


def gate_values(
    logits: Tensor, log_temperature: Tensor | float = 1.0, *, top_k: int | None = None, keep: Tensor | None = None
) -> Tensor:
    """softmax(ε/τ) over the experts: [..., N] -> [..., N] (Eq. 11); `top_k` keeps the largest and rescales them.

    `keep` [N] is 0 for masked experts. Their logits become -inf, which rescales the others in proportion as the paper
    does (Fig. 1), and stays exact where the kept ones would have underflowed to 0.
    """
    temperature = torch.exp(log_temperature) if isinstance(log_temperature, Tensor) else log_temperature
    scaled = logits if isinstance(temperature, float) and temperature == 1.0 else logits / temperature
    if keep is not None:
        scaled = scaled.masked_fill(keep == 0, float("-inf"))
    values = torch.softmax(scaled, dim=-1)
    if top_k is not None and top_k < values.shape[-1]:
        kept = torch.zeros_like(values).scatter(-1, values.topk(top_k, dim=-1).indices, 1.0)
        sparse = rescale(values, kept)
        # One kept gate is constantly 1: the gradient of the dense gate goes straight through, or nothing would learn.
        values = values + (sparse - values).detach() if top_k == 1 and values.requires_grad else sparse
    return values


def rescale(values: Tensor, keep: Tensor) -> Tensor:
    """The kept values, rescaled to sum to 1; all zero where nothing is kept."""
    kept = values * keep
    return kept / kept.sum(-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)


def entropy(values: Tensor) -> Tensor:
    """Entropy in nats over the last axis: [..., N] -> [...]; at most log N (paper, Fig. 5)."""
    return -(values * values.clamp_min(1e-12).log()).sum(-1)


def balance_loss(usage: Tensor) -> Tensor:
    """-Σ_i log q_i of the mean gate values q [N]; smallest, N log N, where q is uniform.

    Departs: the published code builds it from detached numbers, so that it trains nothing; here `usage` is live.
    """
    return -usage.clamp_min(1e-8).log().sum()
