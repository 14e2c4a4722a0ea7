"""One process or many: the accelerator, means over all ranks with gradient, summed gradients.

There is no DDP wrapper. Every rank computes *sums* over its part of the global batch; gradients and counts are added
over the ranks and divided once. So a step is the same arithmetic on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from accelerate import Accelerator


def accelerator_for(device: str = "auto") -> Accelerator:
    """The accelerator on the wanted device: auto (the best available), cpu, cuda or mps.

    Raises: UsageError for a device that this machine lacks.
    """
    from accelerate import Accelerator

    if device != "auto":
        # Imported here, because it imports all of transformers, which a loop over other models does not need.
        from molecli.bases.loading import pick_device

        pick_device(device)
    # The base has its own dtype and the trained parameters are float32, so accelerate's autocast is off.
    return Accelerator(cpu=device == "cpu", mixed_precision="no")


@dataclass(frozen=True)
class StepContext:
    """What a loss function can know about its step."""

    step: int
    accelerator: Accelerator

    @property
    def world(self) -> int:
        """The number of processes that share this step."""
        return self.accelerator.num_processes

    def total(self, value: Tensor | float) -> Tensor:
        """The sum of `value` over the ranks, without gradient. Collective: every rank must call it."""
        tensor = torch.as_tensor(value, dtype=torch.float32, device=self.accelerator.device).detach()
        return self.accelerator.reduce(tensor, reduction="sum") if self.world > 1 else tensor

    def global_mean(self, local_mean: Tensor, local_count: Tensor | float) -> Tensor:
        """The mean over all ranks of `local_mean` (any shape), each weighted by its `local_count`.

        The value is the same on every rank. The gradient flows only into the local part, scaled by its share of the
        count. Gradients are later summed over the ranks, so any function of the result (such as -sum log q) gets the
        gradient that one process would compute on the whole batch. Collective.
        """
        if self.world == 1:
            return local_mean
        count = torch.as_tensor(local_count, dtype=torch.float32, device=local_mean.device)
        part = local_mean * (count / self.total(count)).to(local_mean.dtype)
        return self.accelerator.reduce(part.detach(), reduction="sum") + (part - part.detach())


def sum_gradients(parameters: Iterable[nn.Parameter], accelerator: Accelerator) -> None:
    """Adds every parameter's gradient over the ranks, in place, in one collective per dtype."""
    if accelerator.num_processes == 1:
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        # A rank that did not use a parameter must still take part in the sum.
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        by_dtype.setdefault(parameter.dtype, []).append(parameter.grad)
    for gradients in by_dtype.values():
        flat = accelerator.reduce(torch.cat([gradient.reshape(-1) for gradient in gradients]), reduction="sum")
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def share_from_main(value: object, accelerator: Accelerator) -> object:
    """Rank 0's `value` on every rank, so that the others need no access to its disk."""
    if accelerator.num_processes == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value], from_process=0)[0]
