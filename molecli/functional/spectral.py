"""Singular value decompositions, and updates that shift singular values: W' = U diag(ReLU(σ + δ)) Vᵀ.

Axes: see `molecli.experts`; r nonzero singular values, k = min(d_out, d_in) with the zeros.
Source: Han et al., SVDiff, arXiv 2303.11305.
Contents: Spectrum, decompose, spread, shared, moved, projected, residual, factored_shift.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Relative to the largest: singular values closer than this are equal, and smaller ones zero (the precision of float32).
RESOLUTION = 2.0**-23


@dataclass(frozen=True)
class Spectrum:
    """W [d_out, d_in] as U [d_out, r], S [r] in descending order, Vt [r, d_in], float32, without zeros.

    owner [r]: the index of each among the distinct singular values.
    """

    U: Tensor
    S: Tensor
    Vt: Tensor
    owner: Tensor

    @property
    def distinct(self) -> int:
        """The number of distinct singular values, and so of independent shifts."""
        return int(self.owner[-1]) + 1 if len(self.owner) else 0

    @property
    def width(self) -> int:
        """min(d_out, d_in), zeros included."""
        return min(len(self.U), self.Vt.shape[1])


def decompose(W: Tensor) -> Spectrum:
    """The spectrum of W, on its device, computed in float64 so that every machine finds the same vectors.

    Departs: in the paper every singular value has its own shift. But the vectors of repeated values are an arbitrary
    basis of a subspace, and those of zeros are arbitrary: their shifts would give a different update with every SVD.
    Here repeated values share one shift, which does not depend on the basis, and zeros have none.
    """
    place = torch.device("cpu") if W.device.type == "mps" else W.device  # which has no float64
    U, S, Vt = torch.linalg.svd(W.to(place, torch.float64), full_matrices=False)
    apart = RESOLUTION * S[0]
    r = int((apart < S).sum())
    steps = (S[:r].diff() < -apart).long()
    owner = torch.cat([steps.new_zeros(min(r, 1)), steps]).cumsum(0)
    U, S, Vt = (x.to(W.device, torch.float32) for x in (U[:, :r], S[:r], Vt[:r]))
    return Spectrum(U, S, Vt, owner.to(W.device))


def spread(values: Tensor, spectrum: Spectrum) -> Tensor:
    """[r], the shift of every singular value, from `values` [distinct]."""
    return values.index_select(0, spectrum.owner)


def shared(shift: Tensor, spectrum: Spectrum) -> Tensor:
    """[r], the shifts, averaged over equal singular values."""
    sums = shift.new_zeros(spectrum.distinct).index_add(0, spectrum.owner, shift)
    return spread(sums / torch.bincount(spectrum.owner, minlength=spectrum.distinct), spectrum)


def moved(shift: Tensor, spectrum: Spectrum) -> Tensor:
    """[r], ReLU(σ + δ) − σ: the change of each singular value. Computed so that a small δ loses no digits."""
    return torch.maximum(shift, -spectrum.S.to(shift.dtype))


def projected(A: Tensor, B: Tensor, spectrum: Spectrum) -> Tensor:
    """[r], the shifts nearest to ΔW = B A by least squares: δ_k = u_kᵀ ΔW v_k, `shared`.

    ΔW is not built. A [rank, d_in], B [d_out, rank], scaling in B.
    """
    left, right = spectrum.U.T.to(B.dtype) @ B, spectrum.Vt.to(A.dtype) @ A.T
    return shared((left * right).sum(1), spectrum)


def residual(A: Tensor, B: Tensor, shift: Tensor, spectrum: Spectrum) -> float:
    """‖ΔW − U diag(δ) Vᵀ‖ for ΔW = B A; for its projection this is √(‖ΔW‖² − ‖δ‖²)."""
    return float((B @ A - (spectrum.U * shift) @ spectrum.Vt).norm())


def factored_shift(moves: Tensor, spectrum: Spectrum, rank: int | None = None) -> tuple[Tensor, Tensor, float]:
    """(A, B) of ΔW = U diag(moves) Vᵀ with only the `rank` largest moves, and the relative error.

    Exact without a rank: then the rank is the number of nonzero moves, at least one.
    """
    count = max(1, int((moves != 0).sum()))
    if count > len(moves):  # W is 0
        return moves.new_zeros(1, spectrum.Vt.shape[1]), moves.new_zeros(len(spectrum.U), 1), 0.0
    kept = moves.abs().topk(min(count, rank or count)).indices
    total = float(moves.norm())
    left_out = moves.index_fill(0, kept, 0.0).norm()
    A, B = spectrum.Vt[kept].to(moves.dtype), spectrum.U[:, kept] * moves[kept]
    return A, B, float(left_out) / total if total > 0 else 0.0
