"""KnOTS: TIES in the updates' shared left space. Source: Stoica et al. 2024, 2410.19735, and its public code.

[ΔW₁ … ΔW_N] = U S [V₁ᵀ … V_Nᵀ]. Trim, election and mean act on the S V_iᵀ; U maps the result back. λ is `scale`.
Departs: the trim is by matrix, as in `ties`; each LoRA has its own weight, where the code applies the first to all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from molecli.config import MethodConfig
from molecli.functional.factors import truncated
from molecli.functional.merging import elected_mean, trim
from molecli.methods.merges.ties import DENSITY
from molecli.methods.merges.updates import Result, Updates

NEGLIGIBLE = 1e-5  # singular values up to this share of the largest are dropped


def merge(updates: Updates, config: MethodConfig) -> Result:
    """The elected mean of the S V_iᵀ, each trimmed to the share `config.density` of its entries, mapped back by U."""
    U, aligned = shared_space(updates)
    kept = updates.scaled(trim(aligned, config.density or DENSITY))
    A, B = elected_mean(kept).to(updates.factors[0][0].dtype), U.to(updates.factors[0][1].dtype)
    return truncated(A, B, config.rank) if config.rank is not None else (A, B, 0.0)


def shared_space(updates: Updates) -> tuple[Tensor, Tensor]:
    """U [d_out, k] and the updates in that basis, S V_iᵀ [N, k, d_in], float64: ΔW_i = U (S V_iᵀ).

    Computed from triangular factors: the SVD is of an R x R matrix, however wide the matrices are.
    """
    q_out, r_out = torch.linalg.qr(torch.cat([B for _, B in updates.factors], dim=1).double())
    inward = [torch.linalg.qr(A.double().T) for A, _ in updates.factors]
    U, S, Vt = torch.linalg.svd(r_out @ torch.block_diag(*(r.T for _, r in inward)), full_matrices=False)
    kept = NEGLIGIBLE * S[0] < S
    parts = (S[:, None] * Vt)[kept].split([q.shape[1] for q, _ in inward], dim=1)
    return q_out @ U[:, kept], torch.stack([part @ q.T for part, (q, _) in zip(parts, inward, strict=True)])
