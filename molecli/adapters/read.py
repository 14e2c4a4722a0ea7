"""Reads the files of a LoRA as an expert."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from molecli.adapters.coverage import Coverage, check_coverage
from molecli.adapters.info import Adapted, AdapterInfo, read_info
from molecli.adapters.settings import unsupported
from molecli.adapters.svdiff import Base
from molecli.adapters.svdiff_expert import shifted_factors
from molecli.adapters.tables import check_tables
from molecli.adapters.weights import Shape, opened_lora
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
    found = check_coverage(read_info(spec), matrices, allow_partial=allow_partial)
    info, matched = found.info, set(found.matched)
    known = Matrices.of(matrices)
    check_tables(info, known, base)
    stored = _factors(info, [name for name in known.named if name in matched])
    _check_finite(info, stored)
    if info.origin is not None:
        shifts = {name: shift for name, (shift, _) in stored.items()}
        factors = shifted_factors(info, info.origin, shifts, base)
    else:
        factors = {name: _low_rank(info.adapted[name], *pair) for name, pair in stored.items()}
    return Expert(
        info.name,
        factors,
        source=info.source,
        sha256=info.sha256,
        rank=info.rank,
        alpha=info.alpha,
        left_out=found.unmatched,
        notices=_notices(found, stored),
    )


def _notices(found: Coverage, stored: Mapping[str, tuple[Tensor, Tensor]]) -> tuple[str, ...]:
    """What the user of this LoRA has to know: names read as others, what is left out, that it does nothing."""
    info, said = found.info, []
    if info.taken_for:
        said.append(f"{info.name}: module names {', '.join(info.taken_for)}")
    if found.unmatched:
        lacks = f"the base lacks {len(found.unmatched)} of its matrices, such as {found.unmatched[0]}"
        part = f"{found.left_out:.1%} of its weights (by squared Frobenius norm)"
        said.append(f"{info.name}: {lacks}, with {part}; they are left out")
    if not any(_moves(a) and _moves(b) for a, b in stored.values()):
        said.append(f"{info.name}: it changes nothing: one of its factors is zero everywhere, as before any training")
    return tuple(said)


def _moves(factor: Tensor) -> bool:
    return bool((factor.float() if factor.element_size() == 1 else factor).any())


def _factors(info: AdapterInfo, names: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """name -> (A, B) as stored (the shifts twice for SVDiff), in the order of `names`; each file is opened once."""
    found = {}
    for path in dict.fromkeys(info.adapted[name].keys.path for name in names):
        with opened_lora(path) as file:
            for name in names:
                keys = info.adapted[name].keys
                if keys.path == path:
                    found[name] = (file.get_tensor(keys.A), file.get_tensor(keys.B))
    return {name: found[name] for name in names}


def _low_rank(matrix: Adapted, a: Tensor, b: Tensor) -> LowRank:
    """The factors in the shape for the matrix: A [r, d_in] or [r, c_in, k_h, k_w], B [d_out, r]."""
    return LowRank(a.reshape(matrix.rank, *matrix.shape[1:]), b.reshape(-1, matrix.rank), matrix.scaling)


def _check_finite(info: AdapterInfo, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Checks that all entries are finite floating-point numbers. Raises: UsageError, MismatchError."""
    tensors: dict[tuple[Path, str], Tensor] = {}
    for name, (a, b) in factors.items():
        keys = info.adapted[name].keys
        tensors |= {(keys.path, keys.A): a, (keys.path, keys.B): b}
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
