"""Gradient checkpointing: in the backward pass layers are called again, and must find the pass that they belong to.

Other passes may have run in between, such as a generation that shows what was learnt so far.

Contents: in_backward, check_learns, Learning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from molecli.errors import RunError

if TYPE_CHECKING:
    from molecli.mixture.streams import Pass


def in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread."""
    return _graph() != -1


def check_learns(value: Tensor, gate: nn.Module) -> None:
    """Raises: RunError if a gate's value, computed in another layer, does not lead back to the gate's parameters."""
    if torch.is_grad_enabled() and not value.requires_grad and any(p.requires_grad for p in gate.parameters()):
        what = "with reentrant gradient checkpointing a gate that several layers share would get no gradient from them"
        remedy = "Write gradient_checkpointing_kwargs={'use_reentrant': False}."
        raise RunError("training", what, remedy)


def _graph() -> int:
    return int(torch._C._current_graph_task_id())  # as torch.utils.checkpoint asks it


class Learning:
    """The last pass with gradients along each axis."""

    def __init__(self) -> None:
        self._passes: dict[str, Pass] = {}
        self._waiting: dict[str, int] = {}
        self._seen = -1
        self._several = False

    def begin(self, axis: str, current: Pass) -> None:
        self._passes[axis] = current
        self._waiting[axis] = self._waiting.get(axis, 0) + 1

    def of(self, axis: str) -> Pass | None:
        """The pass whose layers the running backward pass computes again."""
        if _graph() != self._seen:
            self._seen, self._several = _graph(), any(count > 1 for count in self._waiting.values())
            self._waiting.clear()
        return self._passes.get(axis)

    def check_one(self) -> None:
        """Raises: RunError if several passes were made before this backward pass."""
        if self._several:
            what = (
                "gradient checkpointing computes layers again, and several passes were made before this backward pass"
            )
            raise RunError("training", what, "Call backward after each pass, or switch gradient checkpointing off.")
