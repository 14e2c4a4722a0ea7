"""From features to expert weights: pooling, softmax with temperature, top-k, masks.

Axes: see `molecli.experts`. Paper: MoLE (Wu et al., ICLR 2024), Eq. 9-11.
"""

from __future__ import annotations

import torch
from torch import Tensor


def span(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`weight` [B, T] for `mean_pool`: as [B, T, 1] in `dtype`, and its float32 sum [B, 1], at least 1."""
    return weight.unsqueeze(-1).to(dtype), weight.sum(1, keepdim=True, dtype=torch.float32).clamp_min(1.0)


def mean_pool(x: Tensor, weight: Tensor, count: Tensor) -> Tensor:
    """Mean over the `count` [B, 1] positions where `weight` [B, T, 1] is 1: x [B, T, d] -> float32 [B, d]."""
    return (x * weight).sum(1, dtype=torch.float32) / count


def running_mean(
    x: Tensor, weight: Tensor, state: tuple[Tensor, Tensor] | None = None, *, kept: int | None = None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Mean over positions <= t: x [B, T, d] -> float32 [B, T, d], and the state (sum, count) for the next chunk.

    `state` is that of the earlier chunk of the same sequences (with a key-value cache). With `kept` the states after
    each of the last so many positions are returned, [B, kept, d] and [B, kept].
    """
    w = weight.float()
    sums = (x.float() * w.unsqueeze(-1)).cumsum(1)
    counts = w.cumsum(1)
    if state is not None:
        sums, counts = sums + state[0].unsqueeze(1), counts + state[1].unsqueeze(1)
    # Copies, which do not keep the sums of all positions in memory.
    last = -1 if kept is None else slice(-kept, None)
    left = sums[:, last].detach().clone(), counts[:, last].detach().clone()
    return sums / counts.clamp_min(1.0).unsqueeze(-1), left


def unit(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / ‖x‖ over the last axis."""
    return x / x.norm(dim=-1, keepdim=True).clamp_min(eps)


def gate_values(
    logits: Tensor, log_temperature: Tensor | float = 1.0, *, top_k: int | None = None, keep: Tensor | None = None
) -> Tensor:
    """softmax(ε/τ) over the experts: [..., N] -> [..., N] (Eq. 11); `top_k` keeps the largest and rescales them.

    `keep` [N] is 0 for masked experts. Their logits become -inf, which rescales the others in proportion as in the
    paper (Fig. 1). This is exact even if the kept values would have underflowed to 0.
    """
    temperature = torch.exp(log_temperature) if isinstance(log_temperature, Tensor) else log_temperature
    scaled = logits if isinstance(temperature, float) and temperature == 1.0 else logits / temperature
    if keep is not None:
        scaled = scaled.masked_fill(keep == 0, float("-inf"))
    values = torch.softmax(scaled, dim=-1)
    if top_k is not None and top_k < values.shape[-1]:
        kept = torch.zeros_like(values).scatter(-1, values.topk(top_k, dim=-1).indices, 1.0)
        sparse = rescale(values, kept)
        # A single kept gate is always 1 and has no gradient: use that of the dense gate (straight-through).
        values = values + (sparse - values).detach() if top_k == 1 and values.requires_grad else sparse
    return values


def rescale(values: Tensor, keep: Tensor) -> Tensor:
    """The kept values, rescaled to sum to 1; all zero if nothing is kept."""
    kept = values * keep
    return kept / kept.sum(-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)


def entropy(values: Tensor) -> Tensor:
    """Entropy in nats over the last axis: [..., N] -> [...]; at most log N (paper, Fig. 5)."""
    return -(values * values.clamp_min(1e-12).log()).sum(-1)


def balance_loss(usage: Tensor) -> Tensor:
    """-Σ_i log q_i of the mean gate values q [N]; its minimum, N log N, is at the uniform q.

    Departs: the published code uses detached numbers, so that the loss trains nothing; here `usage` has a gradient.
    """
    return -usage.clamp_min(1e-8).log().sum()
