"""Linear arithmetic composition, MoLE Eq. 1: W + Σ w_i ΔW_i, with w_i = 1 unless the user says otherwise."""

from __future__ import annotations

from torch import Tensor

from molecli.methods.sums.fixed_gate import FixedGate


def gate(weights: Tensor, only: int | None = None) -> FixedGate:
    """The user's weights as they are; a masked expert leaves the others unchanged."""
    return FixedGate(weights, normalized=False)
