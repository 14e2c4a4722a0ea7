"""DARE: random entries are dropped, the rest rescaled, then Σ w_i. Source: Yu et al. 2024, 2311.03099, Eq. 3-4."""

from __future__ import annotations

import torch
from torch import Tensor

from molecli.config import MethodConfig
from molecli.functional.factors import factored
from molecli.functional.merging import drop
from molecli.methods.merges.updates import Result, Updates

DENSITY = 0.5


def merge(updates: Updates, config: MethodConfig) -> Result:
    """The sum of the updates, each with a random share `config.density` of its entries, chosen by `config.seed`."""
    return factored(updates.scaled(dropped(updates, config)).sum(0), config.rank or updates.width)


def dropped(updates: Updates, config: MethodConfig) -> Tensor:
    """[N, d_out, d_in], each update after its drop; the choice does not depend on the other updates."""
    density = config.density or DENSITY
    generators = [torch.Generator().manual_seed(seed) for seed in updates.seeds]
    kept = [drop(update, density, g) for update, g in zip(updates.dense(), generators, strict=True)]
    return torch.stack(kept)
