"""Low-rank products in one pass: project onto every expert's A, add every expert's B back.

Tensors in, tensors out. Axes: see `molecli.experts`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F


def project(x: Tensor, A: Tensor) -> Tensor:
    """u = x Aᵀ for all experts in one GEMM: x [..., d_in], A [R, d_in] -> [..., R]."""
    return F.linear(x.to(A.dtype), A)


def add_expanded(y: Tensor, u: Tensor, B: Tensor) -> Tensor:
    """y + u Bᵀ, in place where nothing can notice: y [..., d_out], u [..., R], B [d_out, R].

    A fused in-place product neither allocates nor copies y; the base's backward never reads a Linear's output.
    Departs: a y that is a view (GPT-2's Conv1D, biased 3-D Linear) is added out of place, since autograd would
    otherwise copy the whole base tensor in the backward pass.
    """
    if y.is_leaf and y.requires_grad or y._is_view():
        return y + F.linear(u, B).to(y.dtype)
    if torch.is_grad_enabled() and (u.requires_grad or y.requires_grad):
        return _AddExpanded.apply(y, u, B)
    _accumulate(y, u, B)
    return y


def _accumulate(y: Tensor, u: Tensor, B: Tensor) -> None:
    y.view(-1, y.shape[-1]).addmm_(u.reshape(-1, u.shape[-1]).to(y.dtype), B.t().to(y.dtype))


class _AddExpanded(Function):
    """One autograd node for the in-place product; saves B and nothing of the size of y."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, u: Tensor, B: Tensor) -> Tensor:
        ctx.save_for_backward(B)
        ctx.mark_dirty(y)
        _accumulate(y, u, B)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,) = grads
        (B,) = ctx.saved_tensors
        grad_u = grad @ B.to(grad.dtype) if ctx.needs_input_grad[1] else None
        return (grad if ctx.needs_input_grad[0] else None), grad_u, None
