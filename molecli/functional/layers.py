"""Layers by what they compute, however they store their weight: plainly, or as one of the many quantisers does.

linear_shape, kernel_shape   the true shape, never that of packed storage
compute_dtype                the number type of the computation
is_packed                    whether the weight is quantised
dense_weight                 the weight as the layer uses it
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

# The names in torch and nearly all quantisers, and those in older GPTQ kernels.
_SIZES = (("out_features", "in_features"), ("outfeatures", "infeatures"))
_PLAIN_FORWARDS = (nn.Linear.forward, nn.Conv2d.forward, Conv1D.forward)
_PROBED_ROWS, _SAME = 4, 0.02


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(d_out, d_in) of a layer that maps vectors to vectors, also on the meta device; None for other modules.

    Found by its sizes, not by its class: quantisers have own classes, and their weights may be of any shape. A wrapper
    around such a layer, as PEFT's, is none. GPT-2's Conv1D stores [d_in, d_out].
    """
    if isinstance(module, Conv1D):
        d_in, d_out = module.weight.shape
        return d_out, d_in
    sizes = _sizes(module)
    if sizes is None or isinstance(module, nn.Linear):
        return sizes
    if any(_sizes(inner) for inner in module.modules() if inner is not module):
        return None
    return sizes if any(True for _ in _tensors(module)) else None


def kernel_shape(module: nn.Module) -> tuple[int, int, int, int] | None:
    """(c_out, c_in, k_h, k_w) of a two-dimensional convolution; None for other modules."""
    if not isinstance(module, nn.Conv2d):
        return None
    height, width = module.kernel_size
    return module.out_channels, module.in_channels // module.groups, height, width


def compute_dtype(module: nn.Module) -> torch.dtype:
    """The type in which the layer computes: a float of at least 16 bits, whatever its weight is stored in."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    state = getattr(weight, "quant_state", None)
    stated = (
        getattr(weight, "dtype", None),
        getattr(module, "compute_dtype", None),  # bitsandbytes' 4 bit, HQQ
        getattr(state, "dtype", None),
        getattr(bias, "dtype", None),
        *(tensor.dtype for tensor in _tensors(module)),  # scales
    )
    return next((dtype for dtype in stated if _computes(dtype)), torch.get_default_dtype())


def is_packed(module: nn.Module) -> bool:
    """Whether it is a linear layer or convolution whose weight is quantised, so not stored as a plain matrix."""
    if linear_shape(module) is None and kernel_shape(module) is None:
        return False
    weight = getattr(module, "weight", None)
    return not isinstance(weight, Tensor) or not _computes(weight.dtype) or dequantizable(weight)


def is_rounded(module: nn.Module) -> bool:
    """Whether its weight is packed in an 8-bit floating type without scales, as diffusers' layerwise casting does."""
    scaled = any(getattr(module, name, None) is not None for name in ("weight_scale_inv", "weight_scale"))
    return not scaled and not dequantizable(module.weight) and _plain_forward(module)  # type: ignore[arg-type]


def dequantizable(tensor: Tensor) -> bool:
    """Whether it is of a class that packs numbers and returns them by `dequantize`, as torchao's and quanto's."""
    return type(tensor).dequantize is not Tensor.dequantize


@torch.no_grad()
def dense_weight(module: nn.Module) -> Tensor | None:
    """The weight that the layer multiplies with, [d_out, d_in] or [c_out, c_in, k_h, k_w], in a floating type.

    None if it is not known how this kind of layer stores it. It is not guessed: a scaled float8 weight, for example,
    is a floating tensor of the right shape with wrong numbers.
    """
    shape = linear_shape(module) or kernel_shape(module)
    for unpack in (_by_own_method, _from_bitsandbytes, _from_float8, _as_it_is):
        found = unpack(module)
        if found is not None:
            return found if tuple(found.shape) == shape else None
    return None


def _by_own_method(module: nn.Module) -> Tensor | None:
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and dequantizable(weight):
        return weight.dequantize()
    own = getattr(module, "dequantize", None)  # HQQ
    return own() if callable(own) else None


def _from_bitsandbytes(module: nn.Module) -> Tensor | None:
    weight: Any = getattr(module, "weight", None)
    kind = type(weight).__name__
    if kind not in ("Params4bit", "Int8Params"):
        return None
    import bitsandbytes

    if kind == "Int8Params":
        state: Any = module.state
        scales = weight.SCB if getattr(weight, "SCB", None) is not None else state.SCB
        return bitsandbytes.functional.int8_vectorwise_dequant(weight.data, scales.to(weight.device))
    data, state = weight.data, weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        data, state = _as_stored_on_gpus(data, state)
    return bitsandbytes.functional.dequantize_4bit(data, state)


def _as_stored_on_gpus(data: Tensor, state: Any) -> tuple[Tensor, Any]:
    """4-bit weights in their usual order: the first pass on a processor with AVX512-BF16 reorders them for good, and
    rounds their scales to bfloat16."""
    from bitsandbytes import functional

    usual = copy.copy(state)
    usual.original_nested = False
    data, usual = functional._convert_weight_packed_for_cpu_inverse(data, usual)
    usual.absmax, usual.dtype = state.absmax.T.reshape(-1).float(), torch.float32
    return data, usual


def _from_float8(module: nn.Module) -> Tensor | None:
    """float8 times its scale, which is one number, one per row or one per block."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.itemsize > 1:
        return None
    scale = getattr(module, "weight_scale_inv", None)
    scale = getattr(module, "weight_scale", None) if scale is None else scale
    if scale is None:
        return weight.float() if _plain_forward(module) else None  # rounded only, as diffusers' layerwise casting does
    if not isinstance(scale, Tensor) or not scale.is_floating_point():
        return None
    scale, block = scale.float(), getattr(module, "block_size", None)
    if scale.numel() == len(weight) and scale.dim() > 0:
        scale = scale.view(-1, *(1,) * (weight.dim() - 1))
    elif scale.dim() == 2 and block is not None:
        rows, columns = weight.shape
        scale = scale.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    elif scale.numel() != 1:
        return None
    return weight.float() * scale


def _as_it_is(module: nn.Module) -> Tensor | None:
    """The stored weight, if the layer computes with it: a class of its own may scale or round it first."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not _computes(weight.dtype):
        return None
    if isinstance(module, Conv1D):
        return weight.T
    return weight if _plain_forward(module) or _multiplies_with(module, weight) else None


def _plain_forward(module: nn.Module) -> bool:
    return type(module).forward in _PLAIN_FORWARDS


def _multiplies_with(module: nn.Module, weight: Tensor) -> bool:
    """Whether the layer's own forward gives x Wᵀ + b for random vectors, up to the rounding of half precision."""
    if weight.is_meta or weight.dim() != 2:
        return False
    rows = torch.randn(_PROBED_ROWS, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    expected = nn.functional.linear(rows, weight, getattr(module, "bias", None))
    try:
        found = type(module).forward(module, rows)
    except Exception:  # it needs a kernel that is not here, or other inputs
        return False
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    return bool((found - expected).norm() <= _SAME * expected.norm())


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    for names in _SIZES:
        d_out, d_in = (getattr(module, name, None) for name in names)
        if isinstance(d_out, int) and isinstance(d_in, int):
            return d_out, d_in
    weight, scales = getattr(module, "weight", None), getattr(module, "weight_scales", None)
    if isinstance(scales, Tensor) and isinstance(weight, Tensor) and scales.dim() == 1 and weight.dim() == 2:
        return len(scales), weight.numel() // len(scales)  # EETQ names no sizes, and has one scale per output
    return None


def _computes(dtype: Any) -> bool:
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1


def _tensors(module: nn.Module) -> Any:
    yield from module.parameters()
    yield from module.buffers()
