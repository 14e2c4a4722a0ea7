"""A site and its groups at run time: stacked factors, and the results of a forward pass.

Contents: HostedSite; Kept; HostedGroup, of linear layers; HostedMaps, of convolutions; host_group, reference.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from molecli.errors import MismatchError
from molecli.experts import ExpertBank
from molecli.functional.low_rank import add_expanded, add_expanded_maps, project, project_maps
from molecli.functional.tensor_version import Stamp, stamp
from molecli.mixture.continuation import Trace
from molecli.mixture.streams import Pass
from molecli.mixture.token_axes import axes_of, placed
from molecli.protocols import Group, Site


class HostedSite:
    """A site at run time: its gate, and the gate's value in the current pass."""

    def __init__(self, site: Site, gate: nn.Module) -> None:
        self.site = site
        self.gate: Any = gate
        self.step = -1
        self.value: Tensor | None = None  # from the gate, with experts masked
        self.seen: Pass | None = None  # the pass that the value belongs to
        self.state: tuple[Tensor, Tensor] | None = None  # after the last tokens of the pass `last`
        self.origin: Trace | None = None  # of the prompt's pass
        self.last: Trace | None = None  # of the last pass
        self.owners: list[Tensor] = []  # the experts of its groups' ranks, in the order of the groups
        self.owner = torch.empty(0)  # the same as one tensor
        self.ranks: list[int] = []  # the number of ranks of each group
        self.expanded: dict[str, Any] = {}  # see `by_rank`
        self.tensors = (*gate.parameters(), *gate.buffers())

    def by_rank(self, value: Tensor, dtype: torch.dtype, memo: dict[str, Any]) -> tuple[Tensor, ...]:
        """`value` [N] or [B, N] as [R] or [B, 1, R] for each group, by one gather; kept in `memo`."""
        known: tuple[Tensor, tuple[Tensor, ...]] | None = memo.get(self.site.name)
        if known is None or known[0] is not value or known[1][0].dtype != dtype:
            ranks = (value if value.dtype == dtype else value.to(dtype)).index_select(-1, self.owner)
            if ranks.dim() == 2:
                ranks = ranks.unsqueeze(1)  # one per sequence: the same for all its tokens
            known = value, ranks.split_with_sizes(self.ranks, -1) if len(self.ranks) > 1 else (ranks,)
            memo[self.site.name] = known
        return known[1]


@dataclass(frozen=True)
class Kept:
    """A group's result for an input in a pass without gradients, and what it depends on."""

    x: weakref.ref[Tensor]
    version: int
    keep: Tensor | None
    stamp: Stamp
    value: Tensor
    mixed: tuple[Tensor, ...]

    def holds(self, x: Tensor, keep: Tensor | None, site: HostedSite) -> bool:
        """Whether x, the mask and the gate's tensors are the same and unchanged."""
        return self.x() is x and self.version == x._version and self.keep is keep and self.stamp == stamp(site.tensors)


class HostedGroup:
    """Matrices with the same input: their stacked factors, and the weighted projections of the current input."""

    expand = staticmethod(add_expanded)  # (y, mixed, Bt) -> y + mixed Bᵀ

    def __init__(self, group: Group, site: HostedSite, bank: ExpertBank, modules: Mapping[str, nn.Module]) -> None:
        self.site = site
        weight = reference(modules[group.matrices[0]])
        dtype = weight.dtype if weight.dtype.is_floating_point else torch.get_default_dtype()
        stacked = [bank.stacked(m, device=weight.device, dtype=dtype) for m in group.matrices]
        self.A = torch.cat([s.A for s in stacked]) if len(stacked) > 1 else stacked[0].A
        self.Bt = [s.B.t() for s in stacked]
        self.owner = torch.cat([s.owner for s in stacked])
        self.place = len(site.owners)
        site.owners.append(self.owner)
        self.sizes = [s.A.shape[0] for s in stacked]
        self.present = [_indicator(bank, m, weight.device) for m in group.matrices]
        self.complete = all(len(bank.present(m)) == len(bank) for m in group.matrices)
        self.stream = group.stream
        self.name = group.matrices[0]
        self.first: bool | None = None  # whether its input has sequences before tokens, if that was seen
        self.x: Tensor | None = None
        self.mixed: tuple[Tensor, ...] = ()
        self.served = 0
        # True for the UNet's keys and values of the text, which is the same at every step.
        self.lasting = group.stream == "text" and group.matrices[0].startswith("unet.")
        self.kept: Kept | None = None

    def keep(self, x: Tensor, value: Tensor, keep: Tensor | None) -> None:
        """Keeps the result for x for later passes, unless the gate is being calibrated, which needs every pass."""
        self.kept = None
        if not x.is_inference() and getattr(self.site.gate, "observed", None) is None:
            self.kept = Kept(weakref.ref(x), x._version, keep, stamp(self.site.tensors), value, self.mixed)

    def project(self, x: Tensor) -> Tensor:
        """u [..., R], x projected by every expert's A."""
        return project(x, self.A)

    def learn(self, x: Tensor, size: tuple[int, int] | None) -> None:
        """Notes the order of the axes of an input in a pass over `size` sequences and tokens."""
        if self.first is None and size is not None and x.dim() > 2 and size[0] != size[1]:
            rows = axes_of(tuple(x.shape[:-1]), *size).rows
            self.first = None if rows is None else rows == 0

    def weight(self, x: Tensor, u: Tensor, weights: Tensor, size: tuple[int, int] | None = None) -> None:
        """Stores u times `weights` by rank ([R], [B, 1, R] or [B, T, R]) for the matrices of the group.

        size: the numbers of sequences and tokens, if the input may have other axes than these.
        """
        if weights.dim() == 3:
            weights = _fit_batch(weights, x) if size is None else self._placed(weights, x.shape[:-1], size)
        mixed = _weighted(u, weights).reshape(-1, u.shape[-1])
        self.x, self.served = x, 0
        self.mixed = mixed.split_with_sizes(self.sizes, -1) if len(self.sizes) > 1 else (mixed,)

    def _placed(self, weights: Tensor, lead: torch.Size, size: tuple[int, int]) -> Tensor:
        if lead == size and weights.shape[0] == lead[0] and (size[0] != size[1] or self.first):
            return weights  # as in most models
        return placed(weights, self.name, tuple(lead), axes_of(tuple(lead), *size, first=self.first), size)

    def add(self, y: Tensor, index: int) -> Tensor:
        """y plus the experts' update at the group's matrix `index`; after the last matrix the results are dropped."""
        y = self.expand(y, self.mixed[index], self.Bt[index])
        self.served += 1
        if self.served == len(self.Bt):
            self.forget()
        return y

    def forget(self) -> None:
        self.x, self.mixed, self.served = None, (), 0


class HostedMaps(HostedGroup):
    """The same for convolutions: x [B, C, H, W], u [B, R, H', W'].

    Raises: MismatchError for a convolution with groups or with padding other than zeros: it has no low-rank update.
    """

    expand = staticmethod(add_expanded_maps)

    def __init__(self, group: Group, site: HostedSite, bank: ExpertBank, modules: Mapping[str, nn.Module]) -> None:
        conv = modules[group.matrices[0]]
        assert isinstance(conv, nn.Conv2d)
        if conv.groups != 1 or conv.padding_mode != "zeros":
            kind = "with groups" if conv.groups != 1 else f"with {conv.padding_mode!r} padding"
            what = f"the LoRAs adapt a convolution {kind}, for which low-rank updates are not supported"
            raise MismatchError(group.matrices[0], what, "Use LoRAs that do not adapt it.")
        self.stride, self.padding, self.dilation = conv.stride, conv.padding, conv.dilation
        super().__init__(group, site, bank, modules)

    def project(self, x: Tensor) -> Tensor:
        """u [B, R, H', W'], x projected by every expert's A."""
        return project_maps(x, self.A, stride=self.stride, padding=self.padding, dilation=self.dilation)

    def weight(self, x: Tensor, u: Tensor, weights: Tensor, size: tuple[int, int] | None = None) -> None:
        """Stores u times `weights` by rank ([R], [B, 1, R] or [B, P, R]) for the matrices of the group."""
        by_position = weights.transpose(1, 2) if weights.dim() == 3 else weights.unsqueeze(-1)
        mixed = _weighted(u.flatten(2), by_position)
        self.x, self.served = x, 0
        self.mixed = mixed.split_with_sizes(self.sizes, 1) if len(self.sizes) > 1 else (mixed,)


def host_group(group: Group, site: HostedSite, bank: ExpertBank, modules: Mapping[str, nn.Module]) -> HostedGroup:
    """The group at run time, of linear layers or of convolutions."""
    maps = isinstance(modules[group.matrices[0]], nn.Conv2d)
    return (HostedMaps if maps else HostedGroup)(group, site, bank, modules)


def reference(module: nn.Module) -> Tensor:
    """A parameter that shows the module's device and dtype."""
    return next(module.parameters())


def _weighted(u: Tensor, weights: Tensor) -> Tensor:
    """u times weights; in place without gradients, because u is not used elsewhere."""
    return u * weights if torch.is_grad_enabled() else u.mul_(weights)


def _indicator(bank: ExpertBank, matrix: str, device: torch.device) -> Tensor:
    present = torch.zeros(len(bank), device=device)
    present[list(bank.present(matrix))] = 1.0
    return present


def _fit_batch(weights: Tensor, x: Tensor) -> Tensor:
    """Weights [b, t, R] for an input [B, T, d] (beams repeat each sequence) or [B*T, d] (flattened by the model)."""
    if x.dim() == 2:
        tokens = x.shape[0] // weights.shape[0]
        return weights.expand(-1, tokens, -1).reshape(x.shape[0], -1)
    if x.shape[0] != weights.shape[0]:
        return weights.repeat_interleave(x.shape[0] // weights.shape[0], dim=0)
    return weights
