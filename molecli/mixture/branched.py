"""Matrices whose experts are computed separately, for branches with different experts; see `branching`."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from molecli.experts import ExpertBank
from molecli.mixture.site_state import HostedGroup, HostedSite, host_group
from molecli.protocols import Group, Site

# For each branch in a UNet call: its experts and their weights.
Branches = Sequence[Sequence[tuple[int, float]]]


class BranchedGroup:
    """Matrices with the same input and separate factors for each expert: a branch computes only its own experts."""

    def __init__(self, group: Group, bank: ExpertBank, modules: Mapping[str, nn.Module]) -> None:
        self.parts: list[HostedGroup | None] = []
        self.places: list[dict[int, int]] = []  # for each expert: index in the group -> index in its part
        for expert in bank.experts:
            own = [place for place, matrix in enumerate(group.matrices) if matrix in expert.factors]
            part = Group(tuple(group.matrices[place] for place in own), group.stream)
            site = HostedSite(Site(expert.name, (part,)), nn.Identity())
            self.parts.append(host_group(part, site, ExpertBank([expert]), modules) if own else None)
            self.places.append({place: i for i, place in enumerate(own)})
        self.matrices = len(group.matrices)
        self.x: Tensor | None = None
        self.mixed: list[dict[int, tuple[Tensor, ...]]] = []
        self.served = 0
        self.lasting = next(part for part in self.parts if part is not None).lasting
        self._last: tuple[weakref.ref[Tensor], int] | None = None
        self._kept: list[tuple[Branches, float, list[dict[int, tuple[Tensor, ...]]]]] = []
        self._device = torch.device("meta")

    def add(self, y: Tensor, x: Tensor, index: int, branches: Branches, scale: float) -> Tensor:
        """y (the output of the group's matrix `index` for x) plus, in each branch's rows, the update of its experts.

        `scale` is a factor on every update."""
        if self.x is not x or self._device != y.device:
            self._mix(x, y, branches, scale)
        if len(branches) == 1:
            y = self._expanded(y, 0, index)
        else:
            # Without gradients it is done in place: the pieces are views of y.
            pieces = [self._expanded(piece, k, index) for k, piece in enumerate(y.chunk(len(branches)))]
            y = torch.cat(pieces) if torch.is_grad_enabled() else y
        self.served += 1
        if self.served == self.matrices:
            self.forget()
        return y

    def forget(self) -> None:
        """Drops the results for the current input."""
        self.x, self.mixed, self.served = None, [], 0

    def _mix(self, x: Tensor, y: Tensor, branches: Branches, scale: float) -> None:
        lasts = self.lasting and not torch.is_grad_enabled() and not x.is_inference()
        kept = self._of_before(x, y, branches, scale) if lasts else None
        self.x, self.served, self._device = x, 0, y.device
        if kept is not None:
            self.mixed = kept
            return
        here = x if x.device == y.device else x.to(y.device)
        pieces = here.chunk(len(branches)) if len(branches) > 1 else (here,)
        self.mixed = [
            {expert: self._projected(expert, piece, y, weight * scale) for expert, weight in branch}
            for piece, branch in zip(pieces, branches, strict=True)
        ]
        if lasts:
            self._kept.append((branches, scale, self.mixed))

    def _of_before(
        self, x: Tensor, y: Tensor, branches: Branches, scale: float
    ) -> list[dict[int, tuple[Tensor, ...]]] | None:
        """The results of an earlier pass with the same text tensor, branches and scale, if there was one."""
        same = self._last is not None and self._last[0]() is x and self._last[1] == x._version
        if not same or self._device != y.device:
            self._last, self._kept = (weakref.ref(x), x._version), []
        return next((mixed for known, by, mixed in self._kept if known is branches and by == scale), None)

    def _projected(self, expert: int, x: Tensor, y: Tensor, weight: float) -> tuple[Tensor, ...]:
        part = self.parts[expert]
        if part is None:
            return ()
        if part.device != y.device or part.dtype != y.dtype:
            part.put(y.device, y.dtype)
        part.weight(x, part.project(x), weight)
        mixed = part.mixed
        part.forget()
        return mixed

    def _expanded(self, y: Tensor, branch: int, index: int) -> Tensor:
        for expert, mixed in self.mixed[branch].items():
            part, place = self.parts[expert], self.places[expert].get(index)
            if part is not None and place is not None:
                y = part.expand(y, mixed[place], part.Bt[place])
        return y
