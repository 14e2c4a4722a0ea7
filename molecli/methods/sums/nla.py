"""Normalised linear arithmetic composition, MoLE Eq. 2: the weights of Eq. 1 divided by their sum."""

from __future__ import annotations

from torch import Tensor

from molecli.catalog.methods import SUM
from molecli.errors import UsageError
from molecli.methods.sums.fixed_gate import FixedGate


def gate(weights: Tensor, only: int | None = None) -> FixedGate:
    """A gate with weights that sum to 1 (1/N each by default). Raises: UsageError if the user's weights sum to 0."""
    total = float(weights.sum())
    if abs(total) < 1e-12:
        what = "the weights sum to 0, and `nla` divides by their sum"
        raise UsageError("--loras", what, f"Change a weight or use --mode {SUM}.")
    return FixedGate(weights / total, normalized=True)
