"""Linear arithmetic composition, MoLE Eq. 1: W + Σ w_i ΔW_i, with w_i = 1 by default."""

from __future__ import annotations

from torch import Tensor

from molecli.methods.sums.fixed_gate import FixedGate


def gate(weights: Tensor, only: int | None = None) -> FixedGate:
    """The user's weights as they are; masking an expert does not change the others."""
    return FixedGate(weights, normalized=False)
