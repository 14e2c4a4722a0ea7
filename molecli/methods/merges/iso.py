"""Iso-C: the sum of the updates with all singular values set to their mean. Source: Marczak et al. 2025, 2502.04959.

Σ w_i ΔW_i = U S Vᵀ becomes α · mean(S) · U Vᵀ. α is `scale`.
Departs: U, S and V are cut to the sum's numerical rank. The paper's full-rank updates have no null space. With LoRAs,
arbitrary directions of the null space would be added, and its zeros would lower the mean.
"""

from __future__ import annotations

from molecli.config import MethodConfig
from molecli.functional import factors
from molecli.methods.merges.updates import Result, Updates

NEGLIGIBLE = 1e-6  # singular values up to this share of the largest are rounding errors


def merge(updates: Updates, config: MethodConfig) -> Result:
    """The sum with a flat spectrum. This changes even a single LoRA."""
    A, B = factors.cat(updates.factors, updates.weights)
    U, S, Vt = factors.svd(A, B)
    rank = int((NEGLIGIBLE * S[0] < S).sum())
    flat_A, flat_B = factors.balanced(U[:, :rank], S[:rank].mean().expand(rank), Vt[:rank])
    flat_A, flat_B = flat_A.to(A.dtype), flat_B.to(B.dtype)
    return factors.truncated(flat_A, flat_B, config.rank) if config.rank is not None else (flat_A, flat_B, 0.0)
