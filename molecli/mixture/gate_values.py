"""The gates' values in the current pass of each site: computed once, kept over a generation, and computed again where
autograd needs it.

Contents: GateValues, means.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

import torch
from torch import Tensor

from molecli.errors import RunError
from molecli.mixture.continuation import check_continues, check_whole, rolled_back
from molecli.mixture.gated_experts import by_row
from molecli.mixture.recompute import check_learns
from molecli.mixture.site_state import HostedGroup, HostedSite, move_reading
from molecli.mixture.streams import Pass, Streams
from molecli.mixture.token_axes import routed
from molecli.protocols import Site

_APART = "Use --granularity matrix, or LoRAs that do not adapt one of them."


class GateValues:
    """The values of a mixture's gates; `fused`: matrices that no layer holds.

    keep: [N] on the CPU, 0 for masked experts, None if none is; off: whether all are.
    """

    def __init__(self, streams: Streams, fused: Collection[str]) -> None:
        self.streams, self.fused = streams, fused
        self.keep: Tensor | None = None
        self.off = False
        self._keeps: dict[torch.device, Tensor] = {}  # copies of it on other devices

    def mask(self, keep: Tensor | None, *, off: bool) -> None:
        """Other experts are masked from now on."""
        self.keep, self.off, self._keeps = keep, off, {}

    def value(self, group: HostedGroup, x: Tensor, u: Tensor) -> Tensor:
        """The gate value of the group's site in this pass, computed when its first matrix is called.

        A checkpointed layer is called again for its backward pass. Everything that was computed in it, also the gate,
        must be computed again, so that autograd finds the same tensors. Values from outside must be used as they are.
        """
        hosted = group.site
        current, gate = self.streams.of(hosted.site), hosted.gate
        made = current.values.get(hosted.site.name) if current.over else None
        if made is not None:
            if made[1] is group:
                return self._made(group, current, x, u, None)
            check_learns(made[0], hosted.gate)
            return made[0]
        if hosted.value is None or hosted.step != current.step:
            hosted.step, hosted.value, hosted.seen = current.step, self._new(group, current, x, u), current
        elif not gate.constant and group.stream != hosted.site.stream:
            self.streams.check_shared()
        return hosted.value

    def _new(self, group: HostedGroup, current: Pass, x: Tensor, u: Tensor) -> Tensor:
        """The value in a new pass, which may go on from a prompt. Raises: RunError if it is not known from which."""
        hosted, gate = group.site, group.site.gate
        if gate.constant or current.past == 0 or hosted.site.stream != "decoder" or not gate.remembers:
            if not gate.constant and gate.remembers and gate.per_sequence and hosted.site.stream == "decoder":
                check_whole(current)
            value = self._made(group, current, x, u, None)
            hosted.origin = current.trace
        else:
            check_continues(current, hosted.origin, fixed=gate.per_sequence)
            if gate.per_sequence and hosted.value is not None:
                return hosted.value  # computed at prefill, then constant
            assert hosted.last is not None
            value = self._made(group, current, x, u, rolled_back(hosted.state, hosted.last, current.trace.start))
        hosted.last = current.trace
        return value

    def _made(
        self, group: HostedGroup, current: Pass, x: Tensor, u: Tensor, state: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """The gate's value for the entry's input x; it is noted in the pass if a backward pass may follow."""
        hosted, gate, keep = group.site, group.site.gate, self.keep_on(group.device)
        hosted.move(group.device)
        if gate.constant:
            value: Tensor = gate(None, keep)
        else:
            if gate.reads_entry(memory=hosted.site.stream == "decoder" and current.memory is not None):
                self._check_entry(group)
            reading = self.streams.reading(hosted.site, x, u, state, gate=gate, first=group.first)
            move_reading(reading, group.device)
            value = gate(reading, keep)
            if not current.over:
                hosted.state = reading.state
        if current.learning:
            current.values[hosted.site.name] = value, group
        return value

    def keep_on(self, device: torch.device) -> Tensor | None:
        """The mask on this device, copied to it once."""
        if self.keep is None or device.type in ("cpu", "meta"):
            return self.keep
        if device not in self._keeps:
            with torch.inference_mode(False):
                self._keeps[device] = self.keep.to(device)
        return self._keeps[device]

    def _check_entry(self, group: HostedGroup) -> None:
        """Notes which group of a site the model calls first: the gate reads its input, in every pass the same.

        Raises: RunError if the gate was made for another input (the modules of a model need not be in the order of its
        calls), or if another group was first in an earlier pass.
        """
        hosted = group.site
        entry = hosted.site.entry.matrices[0]
        if entry in self.fused or routed(entry) or group.stream != hosted.site.stream:
            return
        if hosted.first is None and group.place and not self._fits(group):
            what = f"its gate was made for the input of {entry}, and the model calls {group.name} before"
            raise RunError(hosted.site.name, what, _APART)
        if hosted.first not in (None, group):
            what = f"its gate reads the input of {hosted.first.name}, and this pass calls {group.name} before"
            raise RunError(hosted.site.name, what, _APART)
        hosted.first = group

    @staticmethod
    def _fits(group: HostedGroup) -> bool:
        """Whether a gate made for the site's entry can read the input of this group instead."""
        entry = group.site.site.entry.matrices[0]
        return getattr(group.site.gate, "reads", "x") == "x" and group.bank.width(entry) == group.bank.width(group.name)

    def fixed(self, hosted: HostedSite) -> Tensor | None:
        """[N], the weights of a site whose gate does not read the input, in this pass; None if all experts are off."""
        if self.off:
            return None
        step = self.streams.of(hosted.site).step
        if hosted.value is None or hosted.step != step:
            device = hosted.tensors[0].device if hosted.tensors else torch.device("cpu")
            hosted.step, hosted.value = step, hosted.gate(None, self.keep_on(device))
        return hosted.value

    def for_rows(self, hosted: HostedSite, rows: int) -> Tensor | None:
        """[rows, N], the weights of the site's gate in this pass for a module's input; None if all experts are off."""
        if self.off or self.streams.probing:
            return None
        current, size = self.streams.of(hosted.site), self.streams.axes(hosted.site.stream)
        if hosted.value is None or hosted.step != current.step or size is None:
            what = "its gate is computed at a layer that has not run yet in this pass"
            raise RunError(hosted.site.name, what, "Use a mode with fixed weights.")
        return by_row(hosted.value, rows, size[0] * size[1], hosted.site.name)


def means(sites: Iterable[HostedSite]) -> Iterator[tuple[str, Tensor]]:
    """(site, [B, N] or [1, N]), each site's last value, averaged over the tokens that are not padding."""
    for hosted in sites:
        if hosted.value is None:
            continue
        value = hosted.value
        valid = None if hosted.seen is None or value.dim() < 3 else _valid(hosted.seen, hosted.site)
        if value.dim() == 3 and valid is None:
            value = value.mean(1)
        elif valid is not None:
            weight = valid.unsqueeze(-1).to(value.dtype)
            value = (value * weight).sum(1) / weight.sum(1).clamp_min(1)
        yield hosted.site.name, value if value.dim() == 2 else value.unsqueeze(0)


def _valid(seen: Pass, site: Site) -> Tensor | None:
    return seen.memory_valid if site.stream == "memory" else seen.valid
