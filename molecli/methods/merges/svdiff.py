"""SVDiff: adapters as shifts of the base's singular values, which are added.

    δ = Σ w_i δ_i        ΔW = U diag(ReLU(σ + δ) − σ) Vᵀ        W = U diag(σ) Vᵀ, the base's weight

An SVDiff adapter has its own δ_i. A LoRA's δ_i is its projection u_kᵀ ΔW_i v_k (least squares). The rest of the LoRA is
lost, usually nearly all of it: `lost` measures how much.
Source: Han et al., arXiv 2303.11305.
Departs: a δ_i below −σ counts as −σ, which changes nothing for the adapter alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from molecli.config import MethodConfig
from molecli.experts import Expert
from molecli.functional.factors import norm
from molecli.functional.spectral import Spectrum, factored_shift, moved, projected, residual
from molecli.methods.merges.updates import Result, Updates


def merge(updates: Updates, config: MethodConfig) -> Result:
    """The summed shifts as one update; `rank` keeps only the largest shifts."""
    spectrum = updates.spectrum()
    shifts = torch.stack([projected(A, B, spectrum) for A, B in updates.factors])
    # The scale belongs inside the ReLU. The caller multiplies by it outside, so the result is divided by it here.
    moves = moved(config.scale * updates.scaled(shifts).sum(0), spectrum) / config.scale
    return factored_shift(moves, spectrum, config.rank)


@torch.no_grad()
def lost(expert: Expert, spectrum: Callable[[str], Spectrum]) -> float:
    """‖ΔW − its projection‖ / ‖ΔW‖ over all matrices of `expert`: 0 if it consists of shifts, 1 if nothing is kept."""
    left = whole = 0.0
    for matrix, factor in expert.factors.items():
        own = spectrum(matrix)
        A = factor.A.to(own.S.device, torch.float32).flatten(1)
        B = factor.scaling * factor.B.to(own.S.device, torch.float32)
        left += residual(A, B, projected(A, B, own), own) ** 2
        whole += norm(A, B) ** 2
    return (left / whole) ** 0.5 if whole > 0 else 0.0
