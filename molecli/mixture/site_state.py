"""A site and its groups at run time: stacked factors, and the results of a forward pass.

The factors are where the base computes: on the device and in the type of a layer's output. A parameter tells neither,
because weights can be offloaded, stored in another type, or moved after the experts were attached.

Contents: HostedSite; Kept; HostedGroup, of linear layers; HostedMaps, of convolutions; host_group, reference,
move_reading.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from molecli.errors import MismatchError
from molecli.experts import ExpertBank
from molecli.functional.layers import compute_dtype
from molecli.functional.low_rank import add_expanded, add_expanded_maps, project, project_maps
from molecli.functional.tensor_version import Stamp, stamp
from molecli.functional.wrapped import own_layer
from molecli.mixture.continuation import Trace
from molecli.mixture.streams import Pass
from molecli.mixture.token_axes import axes_of, check_one_token, placed
from molecli.protocols import Group, Reading, Site


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
        self.owner: dict[torch.device, Tensor] = {}  # the same as one tensor, on each device that needs it
        self.ranks: list[int] = []  # the number of ranks of each group
        self.expanded: dict[Any, Any] = {}  # see `by_rank`
        self.first: HostedGroup | None = None  # the group that the model calls first
        self.tensors = (*gate.parameters(), *gate.buffers())

    def open(self) -> None:
        """For a new attachment: without groups, and without gate values, which belong to earlier prompts."""
        self.owners, self.ranks, self.owner, self.expanded = [], [], {}, {}
        self.step, self.value, self.origin, self.first = -1, None, None, None

    def move(self, device: torch.device) -> None:
        """Moves the gate to where its input is. In place: sites can share a gate, and an optimizer can hold it."""
        if not self.tensors or self.tensors[0].device == device or device.type == "meta":
            return
        for tensor in self.tensors:
            if tensor.device != device:
                tensor.data = tensor.data.to(device)
                if tensor.grad is not None:
                    tensor.grad.data = tensor.grad.data.to(device)

    def by_rank(
        self, value: Tensor, dtype: torch.dtype, device: torch.device, memo: dict[Any, Any]
    ) -> tuple[Tensor, ...]:
        """`value` [N] or [B, N] as [R] or [B, 1, R] for each group, by one gather, kept in `memo`."""
        known: tuple[Tensor, tuple[Tensor, ...]] | None = memo.get((self.site.name, device))
        if known is None or known[0] is not value or known[1][0].dtype != dtype:
            owner = self.owner.get(device)
            if owner is None:
                with torch.inference_mode(False):
                    self.owner[device] = owner = torch.cat(self.owners).to(device)
            here = value if value.dtype == dtype and value.device == device else value.to(device, dtype)
            ranks = here.index_select(-1, owner)
            if ranks.dim() == 2:
                ranks = ranks.unsqueeze(1)  # one per sequence: the same for all its tokens
            known = value, ranks.split_with_sizes(self.ranks, -1) if len(self.ranks) > 1 else (ranks,)
            memo[self.site.name, device] = known
        return known[1]


@dataclass(frozen=True)
class Kept:
    """A group's result for an input in a pass without gradients, and what it depends on."""

    x: weakref.ref[Tensor]
    version: int
    keep: Tensor | None
    stamp: Stamp
    value: Tensor
    scale: float
    mixed: tuple[Tensor, ...]

    def holds(self, x: Tensor, keep: Tensor | None, scale: float, site: HostedSite) -> bool:
        """Whether x, the mask, the call's scale and the gate's tensors are the same and unchanged."""
        same = self.x() is x and self.version == x._version and self.keep is keep and self.scale == scale
        return same and self.stamp == stamp(site.tensors)


class HostedGroup:
    """Matrices with the same input: their stacked factors, and the weighted projections of the current input."""

    expand = staticmethod(add_expanded)  # (y, mixed, Bt) -> y + mixed Bᵀ

    def __init__(self, group: Group, site: HostedSite, bank: ExpertBank, modules: Mapping[str, nn.Module]) -> None:
        self.site, self.bank, self.matrices = site, bank, group.matrices
        owners = [bank.owner(matrix) for matrix in group.matrices]
        self.owners = torch.cat(owners)
        self.place = len(site.owners)
        site.owners.append(self.owners)
        site.ranks.append(len(self.owners))
        self.sizes = [len(owner) for owner in owners]
        self.complete = all(len(bank.present(m)) == len(bank) for m in group.matrices)
        self.stream = group.stream
        self.name = group.matrices[0]
        self.first: bool | None = None  # whether its input has sequences before tokens, if that was seen
        self.tokens: int | None = None  # which axis of its input has the tokens, if that was seen
        self.x: Tensor | None = None
        self.mixed: tuple[Tensor, ...] = ()
        self.served = 0
        # True for the UNet's keys and values of the text, which is the same at every step.
        self.lasting = group.stream == "text" and group.matrices[0].startswith("unet.")
        self.kept: Kept | None = None
        self.heads = False  # whether it is the output head, which reads only some of the tokens
        self.device, self.dtype = torch.device("meta"), torch.get_default_dtype()
        layer = own_layer(modules[group.matrices[0]])
        if not reference(layer).is_meta:
            # Where the layer will probably compute, so that the first pass is as fast as the others.
            self.put(reference(layer).device, compute_dtype(layer))

    @torch.no_grad()
    def put(self, device: torch.device, dtype: torch.dtype) -> None:
        """Stacks the factors there, to be kept until the layer computes elsewhere."""
        with torch.inference_mode(False):
            stacked = [self.bank.stacked(matrix, device=device, dtype=dtype) for matrix in self.matrices]
            self.A = torch.cat([s.A for s in stacked]) if len(stacked) > 1 else stacked[0].A
            self.Bt = [s.B.t() for s in stacked]
            self.owner = self.owners.to(device)
            self.present = [_indicator(self.bank, matrix, device) for matrix in self.matrices]
        self.device, self.dtype, self.kept = device, dtype, None

    def keep(self, x: Tensor, value: Tensor, keep: Tensor | None, scale: float) -> None:
        """Keeps the result for x for later passes, unless the gate is being calibrated, which needs every pass."""
        self.kept = None
        if not x.is_inference() and getattr(self.site.gate, "observed", None) is None:
            self.kept = Kept(weakref.ref(x), x._version, keep, stamp(self.site.tensors), value, scale, self.mixed)

    def project(self, x: Tensor) -> Tensor:
        """u [..., R], x projected by every expert's A."""
        return project(x, self.A)

    def learn(self, x: Tensor, size: tuple[int, int] | None) -> None:
        """Notes the order of the axes of an input in a pass over `size` sequences and tokens."""
        if size is None or x.dim() < 3 or size[0] == size[1]:
            return
        if self.first is None or (self.tokens is None and size[1] > 1):
            axes = axes_of(tuple(x.shape[:-1]), *size)
            self.first = None if axes.rows is None else axes.rows == 0
            self.tokens = axes.tokens if size[1] > 1 else None

    def weight(self, x: Tensor, u: Tensor, weights: Tensor | float, size: tuple[int, int] | None = None) -> None:
        """Stores u times `weights` (one for all, or by rank [R], [B, 1, R] or [B, T, R]) for the group's matrices.

        size: the numbers of sequences and tokens, if the input may have other axes than these.
        """
        if isinstance(weights, Tensor) and weights.dim() == 3:
            weights = _fit_batch(weights, x) if size is None else self._placed(weights, x.shape[:-1], size)
        mixed = _weighted(u, weights).reshape(-1, u.shape[-1])
        self.x, self.served = x, 0
        self.mixed = mixed.split_with_sizes(self.sizes, -1) if len(self.sizes) > 1 else (mixed,)

    def _placed(self, weights: Tensor, lead: torch.Size, size: tuple[int, int]) -> Tensor:
        if lead == size and weights.shape[0] == lead[0] and (size[0] != size[1] or self.first):
            return weights  # as in most models
        if size[1] == 1 and len(lead) > 2 and not self.site.gate.per_sequence:
            check_one_token(self.name, tuple(lead), self.tokens, size)
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
        conv = own_layer(modules[group.matrices[0]])
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

    def weight(self, x: Tensor, u: Tensor, weights: Tensor | float, size: tuple[int, int] | None = None) -> None:
        """Stores u times `weights` (one for all, or by rank [R], [B, 1, R] or [B, P, R]) for the group's matrices."""
        if isinstance(weights, Tensor):
            weights = weights.transpose(1, 2) if weights.dim() == 3 else weights.unsqueeze(-1)
        mixed = _weighted(u.flatten(2), weights)
        self.x, self.served = x, 0
        self.mixed = mixed.split_with_sizes(self.sizes, 1) if len(self.sizes) > 1 else (mixed,)


def host_group(group: Group, site: HostedSite, bank: ExpertBank, modules: Mapping[str, nn.Module]) -> HostedGroup:
    """The group at run time, of linear layers or of convolutions."""
    maps = isinstance(own_layer(modules[group.matrices[0]]), nn.Conv2d)
    return (HostedMaps if maps else HostedGroup)(group, site, bank, modules)


def reference(module: nn.Module) -> Tensor:
    """A tensor of the module, which shows its device; some quantised layers have buffers only."""
    return next(itertools.chain(module.parameters(), module.buffers()))


def move_reading(reading: Reading, device: torch.device) -> None:
    """Moves the masks and the memory of `reading` to its x: the layers of one model can be on several devices."""
    for name in ("valid", "prompt", "memory", "memory_valid"):
        tensor = getattr(reading, name)
        if tensor is not None and tensor.device != device:
            # Copied once in a pass; the original is kept too, because gates know it by its id.
            moved = reading.shared.setdefault(("moved", id(tensor), device), (tensor, tensor.to(device)))
            setattr(reading, name, moved[1])
    if reading.state is not None and reading.state[0].device != device:
        reading.state = reading.state[0].to(device), reading.state[1].to(device)


def _weighted(u: Tensor, weights: Tensor | float) -> Tensor:
    """u times weights; in place without gradients, because u is not used elsewhere."""
    if isinstance(weights, float) and weights == 1.0:
        return u
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
