"""The gating balance loss of MoLE (Wu et al., ICLR 2024), Eq. 14-15."""

from __future__ import annotations

from torch import Tensor


def balance_loss(usage: Tensor) -> Tensor:
    """-Σ_i log q_i of the mean gate values q [N]; smallest, N log N, where q is uniform.

    Departs: the published code builds it from detached numbers, so that it trains nothing; here `usage` is live.
    """
    return -usage.clamp_min(1e-8).log().sum()
