"""One LoRA alone: the own-LoRA row that every composition is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from molecli.errors import UsageError
from molecli.methods.sums.fixed_gate import FixedGate


def gate(weights: Tensor, only: int | None = None) -> FixedGate:
    """The weight of expert `only`, zero elsewhere; with one expert `only` may be left out."""
    if only is None and len(weights) != 1:
        raise UsageError("--mode single", f"{len(weights)} LoRAs were given", "Say which one with --only NAME.")
    kept = torch.zeros_like(weights)
    kept[only or 0] = weights[only or 0]
    return FixedGate(kept, normalized=False)
