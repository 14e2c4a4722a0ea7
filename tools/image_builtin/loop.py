"""Shared by all stages: a budget of minutes, learning rates, averages of weights, files that survive a kill."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn


def rank() -> int:
    """This process's place among those that train together (torchrun), 0 alone."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def processes() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def join(device: torch.device) -> None:
    """Take part in the training that torchrun started, if it did: on a GPU of its own, or on the CPU.

    With torchrun's `--virtual-local-rank` every process sees its own GPU as the first: all compile the same code, and
    the compiler's cache serves them all.
    """
    if "LOCAL_RANK" in os.environ and not distributed.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group("cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo")


def leave() -> None:
    """Wait for the others and part: a process that just ends may abort, and torchrun then stops those still saving."""
    if distributed.is_initialized():
        distributed.all_reduce(torch.zeros(1))
        distributed.destroy_process_group()


def share_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Give every process the mean of all processes' gradients."""
    if not distributed.is_initialized():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    distributed.all_reduce(flat)
    flat /= processes()
    pieces = flat.split([g.numel() for g in gradients])
    torch._foreach_copy_(gradients, [piece.view_as(g) for piece, g in zip(pieces, gradients, strict=True)])


@dataclass
class Clock:
    """A budget in minutes, and a progress line every few seconds.

    Processes that train together go by the first one's clock, so that all take the same steps at the same rates.
    """

    minutes: float
    name: str
    max_steps: int | None = None  # a smoke run ends here
    every: float = 10.0
    done_before: float = 0.0  # minutes of the schedule spent by earlier calls
    schedule: float | None = None  # minutes of the whole schedule; by default this call's budget
    step: int = 0
    _now: float = 0.0  # minutes since the start, when the current step began
    _start: float = field(default_factory=time.monotonic)
    _printed: float = 0.0
    _printed_step: int = 0

    @property
    def elapsed(self) -> float:
        """Minutes since the start of this call."""
        return (time.monotonic() - self._start) / 60

    @property
    def fraction(self) -> float:
        """How much of the whole schedule has passed, 0 to 1."""
        if self.max_steps is not None:
            return min(1.0, self.step / self.max_steps)
        return min(1.0, (self.done_before + self._now) / (self.schedule or self.minutes))

    def running(self) -> bool:
        """Whether there is time for another step, which this counts."""
        if self.max_steps is not None and self.step >= self.max_steps:
            return False
        self._now = self.elapsed
        if distributed.is_initialized():  # the budgets too: they depend on when a process got ready
            shared = [self._now, self.minutes, self.schedule or self.minutes, self.done_before]
            values = torch.tensor(shared, dtype=torch.float64)
            distributed.broadcast(values, 0)
            self._now, self.minutes, self.schedule, self.done_before = values.tolist()
        if self._now >= self.minutes or self.fraction >= 1:
            return False
        self.step += 1
        return True

    def report(self, **values: Any) -> None:
        """Print values if the last line is old enough (reading a tensor waits for the device: only then)."""
        now = time.monotonic() - self._start
        if rank() or (self.step > 1 and now - self._printed < self.every):
            return
        pace = (self.step - self._printed_step) / max(now - self._printed, 1e-9)
        self._printed, self._printed_step = now, self.step
        shown = "  ".join(f"{name} {_number(value):.4g}" for name, value in values.items())
        print(f"[{self.name}] {now:6.0f} s  step {self.step}  {pace:.1f}/s  {shown}", flush=True)


def _number(value: Any) -> float:
    return float(value.detach()) if isinstance(value, Tensor) else float(value)


def rate(fraction: float, peak: float, warmup: float = 0.03, floor: float = 0.02) -> float:
    """Learning rate at this fraction of the schedule: a linear warmup, then half a cosine down to floor * peak."""
    if fraction < warmup:
        return peak * (0.05 + 0.95 * fraction / warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (fraction - warmup) / (1 - warmup))))


def set_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set every group's learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = value


def adamw(
    parameters: Iterable[nn.Parameter], lr: float, decay: float, device: torch.device, plain: nn.Parameter | None = None
) -> torch.optim.AdamW:
    """AdamW, fused on a GPU; weight decay on matrices alone: not on biases and norms, nor on `plain`."""
    listed = list(parameters)
    decayed = [p for p in listed if p.ndim > 1 and p is not plain]
    rest = [p for p in listed if p.ndim <= 1 or p is plain]
    groups = [{"params": decayed, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), fused=device.type == "cuda")


class Average:
    """Exponential moving average of parameters, kept beside them in fp32."""

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self.live = [p for p in parameters if p.requires_grad]
        self.kept = [p.detach().clone() for p in self.live]
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights; early updates weigh more."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.kept, [p.detach() for p in self.live], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange weights and averages; a second call puts them back."""
        for kept, live in zip(self.kept, self.live, strict=True):
            held = live.detach().clone()
            live.copy_(kept)
            kept.copy_(held)

    def state(self) -> dict[str, Any]:
        """The state, for `load`."""
        return {"kept": self.kept, "updates": self.updates}

    def load(self, state: dict[str, Any]) -> None:
        """Continues from a state."""
        for kept, saved in zip(self.kept, state["kept"], strict=True):
            kept.copy_(saved)
        self.updates = state["updates"]


def fast(device: torch.device) -> torch.autocast:
    """Mixed precision on a GPU; nothing on a CPU."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def prepare(device: torch.device) -> None:
    """Settings for speed; a compile that fails falls back to plain execution."""
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    if device.type == "cuda":
        from torch import _dynamo

        _dynamo.config.suppress_errors = True


def compiled(module: nn.Module, device: torch.device) -> nn.Module:
    """Compile a module in place on a GPU (its state's names stay); a CPU runs it as it is."""
    if device.type == "cuda" and os.environ.get("IMAGE_BUILTIN_EAGER") != "1":
        module.compile(dynamic=False)
    return module


def uncompiled(module: nn.Module) -> None:
    """Undo `compiled`, in every part: measuring in another mode must not wait for another compilation."""
    for part in module.modules():
        part._compiled_call_impl = None


def save(state: Any, path: Path) -> None:
    """Writes a file under another name and moves it into place, so that a kill leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)
