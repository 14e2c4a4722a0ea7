"""Turns the shifts of an SVDiff adapter into low-rank factors of the same updates."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from molecli.adapters.info import AdapterInfo
from molecli.adapters.svdiff import Base, Origin
from molecli.errors import MismatchError, UsageError
from molecli.experts import LowRank
from molecli.functional.fingerprint import difference, same_base
from molecli.functional.spectral import factored_shift, moved, shared


def shifted_factors(
    info: AdapterInfo, origin: Origin, shifts: Mapping[str, Tensor], base: Base | None
) -> dict[str, LowRank]:
    """matrix -> exact factors of ΔW = U diag(ReLU(σ + δ) − σ) Vᵀ; their rank is the number of nonzero shifts.

    Raises: UsageError without a base; MismatchError if its weights are not exactly those of the training.
    """
    if base is None:
        what = "it shifts singular values of a base, and no base is loaded"
        raise UsageError(info.where, what, "Load the base first.")
    if not same_base(origin.fingerprint, base.fingerprint()):
        how = difference(origin.fingerprint, base.fingerprint())
        what = f"it shifts the singular values of {origin.base}, {how}"
        raise MismatchError(info.where, what, f"Name the base it was trained on with --base {origin.base}.")
    factors = {}
    for matrix, shift in shifts.items():
        adapted = info.adapted[matrix]
        if base.digest(matrix) != origin.digests[adapted.keys.A]:
            what = f"it needs exactly the weights of {matrix!r} that it was trained on, and these differ"
            remedy = f"Load {origin.base} in the precision it was trained on: --dtype {origin.dtype}."
            raise MismatchError(info.where, what, remedy)
        own = base.spectrum(matrix)
        A, B, _ = factored_shift(moved(shared(shift[: len(own.S)].to(own.S), own), own), own)
        factors[matrix] = LowRank(A.cpu().view(-1, *adapted.shape[1:]), B.cpu(), 1.0)
    return factors
