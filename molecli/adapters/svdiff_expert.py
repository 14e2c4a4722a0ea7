"""An SVDiff adapter's shifts as low-rank factors of the updates that they make."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from molecli.adapters.info import AdapterInfo
from molecli.adapters.svdiff import Base, Origin
from molecli.errors import MismatchError, UsageError
from molecli.experts import LowRank
from molecli.functional.fingerprint import same_base
from molecli.functional.spectral import factored_shift, moved, shared


def shifted_factors(
    info: AdapterInfo, origin: Origin, shifts: Mapping[str, Tensor], base: Base | None
) -> dict[str, LowRank]:
    """matrix -> factors of ΔW = U diag(ReLU(σ + δ) − σ) Vᵀ, exact: of as many ranks as there are shifts that are not 0.

    Raises: UsageError without a base; MismatchError on one whose weights are not those in training, to the last bit.
    """
    if base is None:
        what = "it shifts singular values, which are read beside the base that has them"
        raise UsageError(info.where, what, "Load the base first.")
    if not same_base(origin.fingerprint, base.fingerprint()):
        what = f"it shifts the singular values of {origin.base}, whose weights differ from this base's"
        raise MismatchError(info.where, what, f"Name the base it was trained on with --base {origin.base}.")
    factors = {}
    for matrix, shift in shifts.items():
        adapted = info.adapted[matrix]
        if base.digest(matrix) != origin.digests[adapted.keys.A]:
            what = f"the weights of {matrix!r} are not those whose singular values it shifts, to the last bit"
            remedy = f"Load {origin.base} in the precision it was trained on: --dtype {origin.dtype}."
            raise MismatchError(info.where, what, remedy)
        own = base.spectrum(matrix)
        A, B, _ = factored_shift(moved(shared(shift[: len(own.S)].to(own.S), own), own), own)
        factors[matrix] = LowRank(A.cpu().view(-1, *adapted.shape[1:]), B.cpu(), 1.0)
    return factors
