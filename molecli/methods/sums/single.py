"""One LoRA alone: the reference that every composition is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from molecli.errors import UsageError
from molecli.methods.sums.fixed_gate import FixedGate


def gate(weights: Tensor, only: int | None = None) -> FixedGate:
    """A gate with the weight of expert `only`, and zero for the others; with one expert `only` may be left out."""
    if only is None and len(weights) != 1:
        raise UsageError("--mode single", f"{len(weights)} LoRAs are given", "Name one of them with --only NAME.")
    kept = torch.zeros_like(weights)
    kept[only or 0] = weights[only or 0]
    return FixedGate(kept, normalized=False)
