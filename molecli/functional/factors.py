"""Algebra of low-rank updates without building ΔW: sums, spectra and truncation from the factors.

Axes: see `molecli.experts`. A pair (A [r, d_in], B [d_out, r]) stands for ΔW = B A, with the scaling; A of a
convolution is flattened, [r, c_in·k_h·k_w]. The cost is O((d_in + d_out)·r²), independent of d_in·d_out.
Contents: cat, svd, balanced, norm, difference, truncated, factored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def cat(
    factors: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float] | Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(A [R, d_in], B [d_out, R]) of Σ w_i B_i A_i exactly: rows stacked, weights folded into B; 1 each by default.

    Raises: ValueError unless there is one weight per pair.
    """
    scales = [1.0] * len(factors) if weights is None else [float(w) for w in weights]
    return (
        torch.cat([A for A, _ in factors]),
        torch.cat([w * B for w, (_, B) in zip(scales, factors, strict=True)], dim=1),
    )


def svd(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U [d_out, k], S [k] from the largest, Vᵀ [k, d_in] of B A, float64, k = min(r, d_in, d_out).

    QR of both sides leaves a k×k core with the singular values of B A. Values that are only rounding errors are kept:
    the caller decides on the numerical rank.
    """
    q_out, r_out = torch.linalg.qr(_wide(B))
    q_in, r_in = torch.linalg.qr(_wide(A).T)
    U, S, Vt = torch.linalg.svd(r_out @ r_in.T, full_matrices=False)
    return q_out @ U, S, Vt @ q_in.T


def balanced(U: Tensor, S: Tensor, Vt: Tensor) -> tuple[Tensor, Tensor]:
    """(A, B) of U diag(S) Vᵀ with √S on both sides, so that both factors have the same norm."""
    root = S.sqrt()
    return root[:, None] * Vt, U * root


def norm(A: Tensor, B: Tensor) -> float:
    """‖B A‖_F, float64. From triangular factors: products AAᵀ and BᵀB would lose half the digits."""
    _, r_out = torch.linalg.qr(_wide(B), mode="r")
    _, r_in = torch.linalg.qr(_wide(A).T, mode="r")
    return torch.linalg.matrix_norm(r_out @ r_in.T).item()


def difference(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(A, B) of first − second, exactly, rank r₁ + r₂."""
    return cat([first, second], [1.0, -1.0])


def truncated(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """(A', B') of the best approximation of B A by `rank` or fewer, and its relative error in the Frobenius norm.

    Balanced factors in the dtype of A and B. The error ‖B A − B' A'‖/‖B A‖, without rounding to it, is 0 for ΔW = 0.
    Source: Eckart and Young (1936).
    Raises: ValueError for a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"rank {rank} is below 1")
    U, S, Vt = svd(A, B)
    low_A, low_B = balanced(U[:, :rank], S[:rank], Vt[:rank])
    total = S.norm().item()
    error = S[rank:].norm().item() / total if total > 0 else 0.0
    return low_A.to(A.dtype), low_B.to(B.dtype), error


def factored(update: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """(A, B) of the best approximation of a dense update [d_out, d_in] by `rank` or fewer, and its relative error.

    If the rank is full, the factors are the update itself and an identity: exact, without a decomposition.
    """
    if rank >= min(update.shape):
        d_out, d_in = update.shape
        one = torch.eye(min(d_out, d_in), dtype=update.dtype, device=update.device)
        return (one, update.clone(), 0.0) if d_in <= d_out else (update.clone(), one, 0.0)
    U, S, Vt = torch.linalg.svd(update.float(), full_matrices=False)
    A, B = balanced(U[:, :rank], S[:rank], Vt[:rank])
    total = S.norm().item()
    return A.to(update.dtype), B.to(update.dtype), S[rank:].norm().item() / total if total > 0 else 0.0


def _wide(x: Tensor) -> Tensor:
    """x for decompositions: float64, or float32 if the device has no float64."""
    return x.detach().to(torch.float32 if x.device.type == "mps" else torch.float64)
