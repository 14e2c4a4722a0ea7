"""A matrix by its singular values, and updates that shift them: W' = U diag(ReLU(σ + δ)) Vᵀ.

Tensors in, tensors out. Axes: see `molecli.experts`; r singular values, k = min(d_out, d_in) of them with the zeros.
Source: Han et al., SVDiff, arXiv 2303.11305.
Contents: Spectrum, decompose, spread, shared, moved, projected, residual, factored_shift.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Singular values nearer than this share of the largest are one value, and below it zero: what float32 tells apart.
RESOLUTION = 2.0**-23


@dataclass(frozen=True)
class Spectrum:
    """W [d_out, d_in] as U [d_out, r], S [r] from the largest, Vt [r, d_in], float32, without what is zero.

    owner [r]: which distinct singular value each is, from 0.
    """

    U: Tensor
    S: Tensor
    Vt: Tensor
    owner: Tensor

    @property
    def distinct(self) -> int:
        """How many different singular values there are: as many shifts can be told apart."""
        return int(self.owner[-1]) + 1 if len(self.owner) else 0

    @property
    def width(self) -> int:
        """min(d_out, d_in), the zeros counted."""
        return min(len(self.U), self.Vt.shape[1])


def decompose(W: Tensor) -> Spectrum:
    """The spectrum of W, on its device, computed in float64 so that another machine finds the same vectors.

    Departs from the paper, where every singular value has a shift: one that is repeated has any basis of a subspace for
    its vectors, and zero has any pair of vectors, so that a shift of one of them would mean another update at every
    SVD. Those that repeat share one shift here, which no choice of the basis changes, and zeros have none.
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
    """[r], the shift of every singular value, of `values` [distinct]."""
    return values.index_select(0, spectrum.owner)


def shared(shift: Tensor, spectrum: Spectrum) -> Tensor:
    """[r], the shifts with their mean where a singular value repeats."""
    sums = shift.new_zeros(spectrum.distinct).index_add(0, spectrum.owner, shift)
    return spread(sums / torch.bincount(spectrum.owner, minlength=spectrum.distinct), spectrum)


def moved(shift: Tensor, spectrum: Spectrum) -> Tensor:
    """[r], ReLU(σ + δ) − σ: how far δ moves each singular value. Written so that a small δ loses no digits to σ."""
    return torch.maximum(shift, -spectrum.S.to(shift.dtype))


def projected(A: Tensor, B: Tensor, spectrum: Spectrum) -> Tensor:
    """[r], the shifts nearest to ΔW = B A by least squares: δ_k = u_kᵀ ΔW v_k, `shared`.

    ΔW is not built. A [rank, d_in], B [d_out, rank], scaling in B.
    """
    left, right = spectrum.U.T.to(B.dtype) @ B, spectrum.Vt.to(A.dtype) @ A.T
    return shared((left * right).sum(1), spectrum)


def residual(A: Tensor, B: Tensor, shift: Tensor, spectrum: Spectrum) -> float:
    """‖ΔW − U diag(δ) Vᵀ‖ of ΔW = B A; of its projection it is √(‖ΔW‖² − ‖δ‖²)."""
    return float((B @ A - (spectrum.U * shift) @ spectrum.Vt).norm())


def factored_shift(moves: Tensor, spectrum: Spectrum, rank: int | None = None) -> tuple[Tensor, Tensor, float]:
    """(A, B) of ΔW = U diag(moves) Vᵀ, and the relative error of leaving out all but the `rank` largest moves.

    Exact without a rank: of as many ranks as there are moves that are not 0, and at least one.
    """
    count = max(1, int((moves != 0).sum()))
    if count > len(moves):  # W is 0
        return moves.new_zeros(1, spectrum.Vt.shape[1]), moves.new_zeros(len(spectrum.U), 1), 0.0
    kept = moves.abs().topk(min(count, rank or count)).indices
    total = float(moves.norm())
    left_out = moves.index_fill(0, kept, 0.0).norm()
    A, B = spectrum.Vt[kept].to(moves.dtype), spectrum.U[:, kept] * moves[kept]
    return A, B, float(left_out) / total if total > 0 else 0.0
