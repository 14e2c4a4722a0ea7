"""Quantised layers of the shapes that libraries make, in plain torch: each computes with weights that it unpacks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEVELS = 7.0


def _quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(whole numbers from -7 to 7, a scale per row)."""
    scale = weight.abs().amax(1, keepdim=True) / LEVELS
    return (weight / scale).round(), scale


class Columns(nn.Linear):
    """As bitsandbytes' Linear4bit: a Linear whose weight is [n/2, 1] bytes, each with two numbers."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        whole, self.scale = _quantised(linear.weight.data)
        pairs = (whole + 8).to(torch.uint8).view(-1, 2)
        self.weight = nn.Parameter((pairs[:, :1] << 4) | pairs[:, 1:], requires_grad=False)
        self.bias, self.compute_dtype = linear.bias, linear.weight.dtype

    def dequantize(self) -> Tensor:
        whole = torch.cat([self.weight >> 4, self.weight & 15], 1).float() - 8
        return whole.view(self.out_features, self.in_features) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantize().to(x.dtype), self.bias)


class Blocks8(nn.Linear):
    """As transformers' FP8Linear: float8 of the right shape, and one scale for each block."""

    def __init__(self, linear: nn.Linear, side: int = 16) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.block_size, rows, columns = (side, side), linear.out_features // side, linear.in_features // side
        blocks = linear.weight.data.view(rows, side, columns, side)
        scale = blocks.abs().amax((1, 3)) / 448
        packed = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn).view_as(linear.weight)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.weight_scale_inv = nn.Parameter(scale, requires_grad=False)
        self.bias = linear.bias

    def true(self) -> Tensor:
        scale = self.weight_scale_inv.repeat_interleave(self.block_size[0], 0).repeat_interleave(self.block_size[1], 1)
        return self.weight.float() * scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.true().to(x.dtype), self.bias)


class Buffers(nn.Module):
    """As GPTQ's and AWQ's layers: no Linear, no parameter, no `weight`; words of eight numbers in a buffer."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.infeatures, self.outfeatures = linear.in_features, linear.out_features
        whole, scale = _quantised(linear.weight.data)
        shifts = torch.arange(0, 32, 4)
        words = ((whole + 8).long().T.reshape(-1, 8, self.outfeatures) << shifts[None, :, None]).sum(1)
        self.register_buffer("qweight", words)
        self.register_buffer("scales", scale.T.contiguous())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.data)

    def true(self) -> Tensor:
        shifts = torch.arange(0, 32, 4)
        whole = (self.qweight[:, None] >> shifts[None, :, None] & 15).view(self.infeatures, self.outfeatures)
        return ((whole.float() - 8) * self.scales).T

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.true().to(x.dtype), self.bias)


class Hqq(nn.Module):
    """As HQQLinear: the sizes and `dequantize`, and a packed parameter with another name."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        whole, self.scale = _quantised(linear.weight.data)
        self.W_q = nn.Parameter((whole + 8).to(torch.uint8).flatten(), requires_grad=False)
        self.bias, self.compute_dtype = linear.bias, linear.weight.dtype

    def dequantize(self) -> Tensor:
        return (self.W_q.float() - 8).view(self.out_features, self.in_features) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantize().to(x.dtype), self.bias)


class Transposed(nn.Module):
    """As EetqLinear: int8 [d_in, d_out], a scale per output, and no sizes."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        whole, scale = _quantised(linear.weight.data)
        self.weight = nn.Parameter(whole.T.to(torch.int8).contiguous(), requires_grad=False)
        self.weight_scales = nn.Parameter(scale.flatten(), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, (self.weight.float() * self.weight_scales).T.to(x.dtype), self.bias)


class Scaled(nn.Linear):
    """As BitNet's offline layers: a floating weight of the right shape, which is multiplied by a scale afterwards."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.weight, self.bias = nn.Parameter(linear.weight.data * 8, requires_grad=False), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight / 8, self.bias)


KINDS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    kind.__name__: kind for kind in (Columns, Blocks8, Buffers, Hqq, Transposed, Scaled)
}
# Those that say what their numbers stand for.
READABLE = ("Columns", "Blocks8", "Hqq")


def pack(model: nn.Module, kind: str, *, head: Any = None, multiple: int = 1) -> nn.Module:
    """The same model with its linear layers, but not `head`, quantised if their sizes are multiples of `multiple`."""
    for name, module in list(model.named_modules()):
        linear = type(module) is nn.Linear and module is not head
        if linear and module.in_features % multiple == module.out_features % multiple == 0:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, KINDS[kind](module))
    return model


def unpacked(layer: nn.Module) -> Tensor:
    """[d_out, d_in], the weight that the layer multiplies with: its outputs for the unit vectors."""
    width = getattr(layer, "in_features", None) or getattr(layer, "infeatures", None) or len(layer.weight)
    with torch.no_grad():
        bias = 0 if getattr(layer, "bias", None) is None else layer.bias
        return (layer(torch.eye(width)) - bias).T.contiguous()


def dense_twin(model: nn.Module) -> nn.Module:
    """The same model with plain layers that have the packed ones' true weights."""
    twin = copy.deepcopy(model)
    for name, layer in model.named_modules():
        if type(layer).__name__ in KINDS:
            weight = unpacked(layer)
            plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            plain.weight = nn.Parameter(weight, requires_grad=False)
            bias = getattr(layer, "bias", None)
            plain.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)  # type: ignore[arg-type]
            parent, _, leaf = name.rpartition(".")
            setattr(twin.get_submodule(parent), leaf, plain)
    return twin
