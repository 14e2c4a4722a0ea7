"""A constant gate: it gives every sum of ΔW with constant weights, without changing the base's weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from molecli.functional.gating import rescale
from molecli.protocols import Reading


class FixedGate(nn.Module):
    """Given weights [N], never trained; `normalized` ones are rescaled when experts are masked."""

    per_sequence = True
    remembers = False
    constant = True
    weights: Tensor

    def __init__(self, weights: Tensor, *, normalized: bool) -> None:
        super().__init__()
        self.normalized = normalized
        self.register_buffer("weights", torch.as_tensor(weights, dtype=torch.float32))

    def forward(self, reading: Reading | None, keep: Tensor | None = None) -> Tensor:
        """[N], whatever the reading."""
        if keep is None:
            return self.weights
        return rescale(self.weights, keep) if self.normalized else self.weights * keep
