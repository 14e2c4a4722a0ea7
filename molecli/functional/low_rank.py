"""Low-rank products of all experts at once: project by all A, then add all B.

Axes: see `molecli.experts`. Contents: project, add_expanded for linear layers;
project_maps, add_expanded_maps for convolutions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F


def project(x: Tensor, A: Tensor) -> Tensor:
    """u = x Aᵀ for all experts in one matrix product: x [..., d_in], A [R, d_in] -> [..., R]."""
    # Compare the type first: a `to` without effect still costs a call.
    return F.linear(x if x.dtype == A.dtype else x.to(A.dtype), A)


def add_expanded(y: Tensor, u: Tensor, Bt: Tensor) -> Tensor:
    """y + u Bᵀ, in place if that is safe: y [..., d_out], u [-1, R] (y's rows), Bt [R, d_out].

    A fused in-place product neither allocates nor copies y; the base's backward never reads a Linear's output.
    Departs: if y is a view (GPT-2's Conv1D, biased 3-D Linear) it is added out of place: otherwise autograd would copy
    the whole base tensor in the backward pass.
    """
    if torch.is_grad_enabled():
        if y._is_view() or (y.is_leaf and y.requires_grad):
            return y + torch.mm(u, Bt.to(u.dtype)).view(y.shape).to(y.dtype)
        if u.requires_grad or y.requires_grad:
            return _AddExpanded.apply(y, u, Bt)
    if not u.dtype == Bt.dtype == y.dtype:  # autocast
        u, Bt = u.to(y.dtype), Bt.to(y.dtype)
    y.view(-1, Bt.shape[1]).addmm_(u, Bt)
    return y


class _AddExpanded(Function):
    """One autograd node for the in-place product; saves B and no tensor of the size of y."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, u: Tensor, Bt: Tensor) -> Tensor:
        ctx.save_for_backward(Bt)
        ctx.mark_dirty(y)
        return add_expanded(y, u, Bt)  # gradients are off in here

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,) = grads
        (Bt,) = ctx.saved_tensors
        grad_u = grad.reshape(-1, Bt.shape[1]).mm(Bt.t().to(grad.dtype)) if ctx.needs_input_grad[1] else None
        return (grad if ctx.needs_input_grad[0] else None), grad_u, None


def project_maps(
    x: Tensor,
    A: Tensor,
    *,
    stride: int | tuple[int, ...] = 1,
    padding: str | int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
) -> Tensor:
    """u = A * x for all experts in one convolution: x [B, C, H, W], A [R, C, k_h, k_w] -> [B, R, H', W']."""
    return F.conv2d(x if x.dtype == A.dtype else x.to(A.dtype), A, stride=stride, padding=padding, dilation=dilation)


def add_expanded_maps(y: Tensor, u: Tensor, Bt: Tensor) -> Tensor:
    """y + B u at every position, in place as `add_expanded`: y [B, C, H, W], u [B, R, P] (y's positions), Bt [R, C]."""
    if torch.is_grad_enabled():
        if y._is_view() or (y.is_leaf and y.requires_grad):
            return y + torch.matmul(Bt.t().to(u.dtype), u).view(y.shape).to(y.dtype)
        if u.requires_grad or y.requires_grad:
            return _AddExpandedMaps.apply(y, u, Bt)
    if not u.dtype == Bt.dtype == y.dtype:
        u, Bt = u.to(y.dtype), Bt.to(y.dtype)
    if y.is_contiguous():
        y.view(*y.shape[:2], -1).baddbmm_(Bt.t().expand(len(y), -1, -1), u)
    elif y.is_contiguous(memory_format=torch.channels_last):
        rows = u.transpose(1, 2).reshape(-1, u.shape[1])
        y.permute(0, 2, 3, 1).view(-1, y.shape[1]).addmm_(rows, Bt)
    else:
        y.add_(torch.matmul(Bt.t(), u).view(y.shape))
    return y


class _AddExpandedMaps(Function):
    """As `_AddExpanded`, for maps."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, u: Tensor, Bt: Tensor) -> Tensor:
        ctx.save_for_backward(Bt)
        ctx.mark_dirty(y)
        return add_expanded_maps(y, u, Bt)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,) = grads
        (Bt,) = ctx.saved_tensors
        grad_u = torch.matmul(Bt.to(grad.dtype), grad.flatten(2)) if ctx.needs_input_grad[1] else None
        return (grad if ctx.needs_input_grad[0] else None), grad_u, None
