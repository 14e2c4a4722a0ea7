"""TSV-Merge: the updates' singular vectors, made orthogonal to one another. Source: Gargiulo et al. 2025, 2412.00081.

The top ⌊min(d_out, d_in)/N⌋ vectors of each update, side by side: α U⊥ S V⊥ᵀ with X⊥ = P Qᵀ for X = P D Qᵀ. α is
`scale`. Departs: an update gives at most as many vectors as its rank, and directions of X from rounding errors are
dropped. Otherwise arbitrary directions would be added.
"""

from __future__ import annotations

import torch
from torch import Tensor

from molecli.config import MethodConfig
from molecli.functional import factors
from molecli.methods.merges.updates import Result, Updates

NEGLIGIBLE = 1e-6  # singular values up to this share of the largest are rounding errors


def merge(updates: Updates, config: MethodConfig) -> Result:
    """The merged LoRA; exact unless `config.rank` is smaller."""
    most = max(1, updates.width // len(updates.factors))
    parts = [_top(*pair, most) for pair in updates.factors]
    S = torch.cat([weight * s for weight, (_, s, _) in zip(updates.weights, parts, strict=True)])
    U = polar(torch.cat([u for u, _, _ in parts], dim=1))
    Vt = polar(torch.cat([vt for _, _, vt in parts]))
    A, B = updates.factors[0]
    A, B = Vt.to(A.dtype), (U * S).to(B.dtype)
    return factors.truncated(A, B, config.rank) if config.rank is not None else (A, B, 0.0)


def polar(X: Tensor) -> Tensor:
    """The nearest matrix with orthonormal rows or columns, restricted to the directions in X."""
    P, D, Qt = torch.linalg.svd(X, full_matrices=False)
    kept = NEGLIGIBLE * D[0] < D
    return P[:, kept] @ Qt[kept]


def _top(A: Tensor, B: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vt = factors.svd(A, B)
    count = min(most, int((NEGLIGIBLE * S[0] < S).sum()))
    return U[:, :count], S[:count], Vt[:count]
