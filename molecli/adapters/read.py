"""Reads the files of a LoRA as an expert."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from molecli.adapters.architecture import read_info_for
from molecli.adapters.coverage import Coverage, check_coverage
from molecli.adapters.factors import Stored, a_of, low_rank, stored_tensors
from molecli.adapters.info import AdapterInfo
from molecli.adapters.settings import unsupported
from molecli.adapters.svdiff import Base
from molecli.adapters.svdiff_expert import shifted_factors
from molecli.adapters.tables import check_tables
from molecli.adapters.weights import Shape
from molecli.errors import MismatchError
from molecli.experts import Expert, LowRank
from molecli.files.lora_spec import LoraLike
from molecli.protocols import Matrices


def read_expert(
    spec: LoraLike, matrices: Mapping[str, Shape], *, allow_partial: bool = False, base: Base | None = None
) -> Expert:
    """The expert that `spec` names, on the base whose matrices are `matrices`: name -> shape.

    Factors keep their stored type, on the CPU, in the order of the base's matrices; those of an SVDiff adapter are
    computed from `base`, in float32. Copies of the base's own weights in the files are compared with `base`.
    Raises: UsageError, MismatchError as `read_info`, `check_coverage` and `check_tables` do, and for weights that are
    not finite.
    """
    found = check_coverage(read_info_for(spec, matrices), matrices, allow_partial=allow_partial)
    info, matched = found.info, set(found.matched)
    known = Matrices.of(matrices)
    check_tables(info, known, base)
    names = [name for name in known.named if name in matched]
    stored = stored_tensors(info, names)
    _check_finite(info, stored)
    if info.origin is not None:
        shifts = {name: stored[a_of(info.adapted[name].keys)] for name in names}
        factors = shifted_factors(info, info.origin, shifts, base)
    else:
        factors = {name: low_rank(info.adapted[name], stored) for name in names}
    return Expert(
        info.name,
        factors,
        source=info.source,
        sha256=info.sha256,
        rank=info.rank,
        alpha=info.alpha,
        left_out=found.unmatched,
        notices=_notices(found, factors.values()),
    )


def _notices(found: Coverage, factors: Iterable[LowRank]) -> tuple[str, ...]:
    """What the user of this LoRA has to know: names read as others, what is left out, that it does nothing."""
    info, said = found.info, []
    if info.taken_for:
        said.append(f"{info.name}: module names {', '.join(info.taken_for)}")
    if found.unmatched:
        lacks = f"the base lacks {len(found.unmatched)} of its matrices, such as {found.unmatched[0]}"
        part = f"{found.left_out:.1%} of its weights (by squared Frobenius norm)"
        said.append(f"{info.name}: {lacks}, with {part}; they are left out")
    if not any(_moves(one.A) and _moves(one.B) for one in factors):
        said.append(f"{info.name}: it changes nothing: one of its factors is zero everywhere, as before any training")
    return tuple(said)


def _moves(factor: Tensor) -> bool:
    return bool((factor.float() if factor.element_size() == 1 else factor).any())


def _check_finite(info: AdapterInfo, tensors: Stored) -> None:
    """Checks that all entries are finite floating-point numbers. Raises: UsageError, MismatchError."""
    extremes = []
    for tensor in tensors.values():
        if not tensor.is_floating_point():
            raise unsupported(info.where, f"a LoRA stored as {str(tensor.dtype).removeprefix('torch.')}")
        wide = tensor.float() if tensor.element_size() == 1 else tensor  # float8 has no arithmetic
        # Minimum and maximum show any NaN or infinity: one pass, without a mask of the tensor's size.
        extremes += [extreme.float() for extreme in torch.aminmax(wide)]
    finite = torch.stack(extremes).isfinite().view(-1, 2).all(dim=1)
    if not finite.all():
        _, key = list(tensors)[int((~finite).nonzero()[0])]
        raise MismatchError(info.where, f"{key!r} holds NaN or infinity", "Its training diverged: train it again.")
