"""A LoRA file as an expert."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from molecli.errors import MismatchError
from molecli.experts import Expert, LowRank
from molecli.files.adapters.coverage import check_coverage
from molecli.files.adapters.info import AdapterInfo, read_info
from molecli.files.adapters.settings import unsupported
from molecli.files.adapters.weights import opened_lora
from molecli.files.lora_spec import LoraLike


def read_expert(
    spec: LoraLike,
    matrices: Mapping[str, tuple[int, int]],
    *,
    allow_partial: bool = False,
) -> Expert:
    """The expert that `spec` names, on the base whose matrices are `matrices`: name -> (d_out, d_in).

    Factors keep the type they are stored in, on the CPU, in the order of the base's matrices.
    Raises: UsageError, MismatchError as `read_info` and `check_coverage` do, and for weights that are not finite.
    """
    info = read_info(spec)
    matched = set(check_coverage(info, matrices, allow_partial=allow_partial).matched)
    with opened_lora(info.path) as file:
        tensors = {key: file.get_tensor(key) for name in matched for key in (info.keys[name].A, info.keys[name].B)}
    _check_finite(info, tensors)
    factors = {name: _low_rank(info, tensors, name) for name in matrices if name in matched}
    return Expert(info.name, factors, source=info.source, sha256=info.sha256, rank=info.rank, alpha=info.alpha)


def _low_rank(info: AdapterInfo, tensors: Mapping[str, Tensor], matrix: str) -> LowRank:
    keys = info.keys[matrix]
    return LowRank(tensors[keys.A], tensors[keys.B], info.scalings[matrix])


def _check_finite(info: AdapterInfo, tensors: Mapping[str, Tensor]) -> None:
    """Nothing, when every entry is a finite floating-point number. Raises: UsageError, MismatchError otherwise."""
    extremes = []
    for tensor in tensors.values():
        if not tensor.is_floating_point():
            raise unsupported(info.where, f"a LoRA stored as {str(tensor.dtype).removeprefix('torch.')}")
        wide = tensor.float() if tensor.element_size() == 1 else tensor  # float8 has no arithmetic
        # The smallest and largest entries carry any NaN or infinity: one pass, no mask of the tensor's size.
        extremes += [extreme.float() for extreme in torch.aminmax(wide)]
    finite = torch.stack(extremes).isfinite().view(-1, 2).all(dim=1)
    if not finite.all():
        key = list(tensors)[int((~finite).nonzero()[0])]
        raise MismatchError(info.where, f"{key!r} holds NaN or infinity", "Its training diverged: train it again.")
