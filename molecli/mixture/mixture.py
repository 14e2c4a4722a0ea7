"""The mixture: experts on a frozen model, by removable hooks, with one stacked pass and one gate per site.

    y = W x + (u ⊙ g[rank -> expert]) Bᵀ,   u = x Aᵀ for all experts at once

No tensor of size experts x tokens x width is computed, and no `forward` is patched. Contents: Mixture, switch.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from molecli.bases.pipeline import PipelineModules, fused_with
from molecli.errors import MismatchError, RunError
from molecli.experts import ExpertBank
from molecli.functional.gating import rescale
from molecli.functional.tensor_version import Stamp, stamp
from molecli.functional.wrapped import device_of, layers_of
from molecli.mixture.fused_experts import fused_in
from molecli.mixture.gate_values import GateValues, means
from molecli.mixture.gated_experts import HostedParameters, host_parameters
from molecli.mixture.output_head import output_head
from molecli.mixture.peft_host import called_whole
from molecli.mixture.served import Served
from molecli.mixture.site_state import HostedGroup, HostedSite, Kept, host_group
from molecli.mixture.streams import Streams
from molecli.mixture.uncompiled import run_eagerly
from molecli.protocols import Group, Site

# The input x of a matrix and its output y -> y with the experts' update, or None for y as it is.
Update = Callable[[Tensor, Tensor], Tensor | None]


class Mixture:
    """Experts on a model, weighted by a gate at each site; a context manager that leaves the model as it was.

    Raises: MismatchError if a matrix that an expert adapts is not in the model.
    """

    def __init__(
        self,
        model: nn.Module,
        bank: ExpertBank,
        sites: Sequence[Site],
        gates: Mapping[str, nn.Module],
        *,
        streams: Streams,
        renormalize_absent: bool = False,
    ) -> None:
        self.model, self.bank = model, bank
        self._hosted_bank = bank  # the LoRAs that are attached; a merged mixture replaces them
        self.sites = tuple(sites)
        modules = dict(layers_of(model))
        self._fused = fused_in(model, bank.matrices)
        for matrix in bank.matrices:
            if matrix not in modules and matrix not in self._fused:
                raise MismatchError(matrix, "the LoRAs adapt this matrix, but the base has no matrix of that name")
        self._modules = modules
        fixed = all(getattr(gates[site.name], "constant", False) for site in sites)
        self._head = None if fixed else output_head(model, bank.matrices)
        self._streams = streams
        self._renormalize_absent = renormalize_absent
        for site in sites:
            gates[site.name].to(device_of(self._module(site.matrices[0])))
        self._hosted = {site.name: HostedSite(site, gates[site.name]) for site in sites}
        self._groups: list[HostedGroup] = []
        self._parameters: list[HostedParameters] = []
        self._handles: list[Any] = []  # with `remove`
        self._keep: Tensor | None = None  # on the CPU; [N], 0 for masked experts
        self._values = GateValues(streams, self._fused)
        self._off = False
        self._state = object()  # replaced whenever a pass will compute from other memory than before
        self._stamps: list[Stamp] = []

    # -- attaching ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> Mixture:
        self.attach()
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def attach(self) -> None:
        """Adds the hooks."""
        if self._handles:
            raise RunError("mixture", "it is attached already", "Leave its context first.")
        try:
            self._attach()
        except BaseException:
            self.detach()
            raise

    def _attach(self) -> None:
        self._state = object()
        self._handles += [run_eagerly(), *called_whole(self.model)]
        pools = any(not hosted.gate.constant and hosted.gate.remembers for hosted in self._hosted.values())
        self._handles += self._streams.attach(self._begin, pools=pools)
        self._handles += self._head.attach() if self._head is not None else []
        if isinstance(self.model, PipelineModules):
            self._handles.append(self.model.register_guest(self))
        self._served = self._watched()
        for hosted in self._hosted.values():
            hosted.open()
            for group in self._in_layers(hosted.site):
                live = host_group(group, hosted, self._hosted_bank, self._modules)
                live.heads = self._head is not None and self._modules[group.matrices[0]] is self._head.module
                self._groups.append(live)
                for index, matrix in enumerate(group.matrices):
                    self._hook_at(matrix, self._hook(live, index))
        self._attach_fused()

    def detach(self) -> None:
        """Removes all hooks; the model is the base again, bit for bit."""
        for handle in self._handles:
            handle.remove()
        for live in self._parameters:
            live.restore()
        self._handles, self._groups, self._parameters = [], [], []

    def _module(self, matrix: str) -> nn.Module:
        """The module that has `matrix`."""
        return self._modules[self._fused[matrix].module if matrix in self._fused else matrix]

    def _in_layers(self, site: Site) -> list[Group]:
        """The site's groups of layers; the others are parameters that their modules read themselves."""
        return [group for group in site.groups if group.matrices[0] not in self._fused]

    def _attach_fused(self) -> None:
        """Hosts the adapted parameters that no layer holds."""
        sites, bank = self._hosted.values(), self._hosted_bank
        kept = self._renormalize_absent
        self._parameters = host_parameters(
            self._modules, sites, self._fused, bank, self._values.fixed, self._values.for_rows, renormalize=kept
        )
        self._handles += [handle for live in self._parameters for handle in live.attach()]
        for name in {place.module for place in self._fused.values()}:
            self._handles.append(self._modules[name].register_forward_pre_hook(self._served.setting(name)))

    # -- for users ---------------------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        return self.bank.names

    def mask(self, *names: str) -> None:
        """Switches off exactly the named experts and switches on all others; it stays so after the context is left.

        The weights of gates and of a mean are rescaled to sum to 1; in a sum the others keep theirs.
        """
        off = {self.bank.index(name) for name in names}
        keep = torch.tensor([0.0 if i in off else 1.0 for i in range(len(self.bank))])
        self._keep, self._off = (keep if off else None), len(off) == len(self.bank)
        self._values.mask(self._keep, off=self._off)
        self._state = object()
        for hosted in self._hosted.values():
            hosted.step, hosted.value, hosted.origin = -1, None, None
        for live in self._parameters:
            live.forget()

    def only(self, *names: str) -> None:
        """Switches off all experts except the named ones."""
        kept = {self.bank.names[self.bank.index(name)] for name in names}
        self.mask(*(name for name in self.bank.names if name not in kept))

    def gates(self) -> dict[str, Tensor]:
        """{site: [B, N]}, the weights in the last forward pass, averaged over the tokens that are not padding.

        B is the batch (twice as large under classifier-free guidance), or 1 if the weights do not depend on the input;
        N is the number of experts. Empty before the first pass.
        """
        # Copies, because a replayed pass overwrites the tensors of the one before.
        return {name: mean.detach().clone() for name, mean in means(self._hosted.values())}

    def stacked_gates(self) -> Tensor:
        """[M sites, B, N], like `gates`, but with gradient, for the balance loss (MoLE, Eq. 15)."""
        values = [mean for _, mean in means(self._hosted.values())]
        values = [value.to(values[0].device) for value in values]
        batch = max(value.shape[0] for value in values)
        # Guidance doubles the UNet's rows, but not a text encoder's: its row i then counts for rows i and i + B.
        return torch.stack([value.repeat(batch // len(value), 1) for value in values])

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The gates' trainable parameters as `site/<name>/<parameter>`."""
        return {
            f"site/{name}/{key}": parameter
            for name, hosted in self._hosted.items()
            for key, parameter in hosted.gate.named_parameters()
            if parameter.requires_grad
        }

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors of the gates, as `site/<name>/<tensor>`."""
        return {
            f"site/{name}/{key}": tensor.detach()
            for name, hosted in self._hosted.items()
            for key, tensor in hosted.gate.state_dict().items()
        }

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Loads the gates from `tensors`. Raises: MismatchError for a missing or surplus tensor, or a wrong shape."""
        own = self.state_dict()
        for key in (*own, *tensors):
            if key not in tensors or key not in own:
                what = "is missing" if key not in tensors else "belongs to no site of this model"
                raise MismatchError(
                    key, f"the gate tensor {what}", "The composition was made for another base or other LoRAs."
                )
            if own[key].shape != tensors[key].shape:
                shapes = f"{tuple(tensors[key].shape)}, and the model needs {tuple(own[key].shape)}"
                raise MismatchError(key, f"the gate tensor has shape {shapes}")
        with torch.no_grad():
            for key, tensor in own.items():
                tensor.copy_(tensors[key])

    def gate_modules(self) -> dict[str, nn.Module]:
        """{site: gate}."""
        return {name: hosted.gate for name, hosted in self._hosted.items()}

    # -- as a `pipeline.Guest` ---------------------------------------------------------------------------------------

    @contextmanager
    def foreseen(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[Hashable, ...] | None]:
        sites = self._unet_sites()
        stamps = [stamp(hosted.tensors) for hosted in sites]
        if stamps != self._stamps:  # gates will compute values from their parameters again
            self._stamps, self._state = stamps, object()
        observing = any(getattr(hosted.gate, "observed", None) is not None for hosted in sites)
        yield None if observing else (self._state,)

    def left(self) -> dict[str, Tensor | None]:
        return {hosted.site.name: hosted.value for hosted in self._unet_sites()}

    def done(self, output: Any, left: Mapping[str, Tensor | None] | None = None) -> Any:
        for name, value in (left or {}).items():
            self._hosted[name].value = value
        return output

    def _unet_sites(self) -> list[HostedSite]:
        return [hosted for name, hosted in self._hosted.items() if name.partition(".")[0] == "unet"]

    # -- one forward pass --------------------------------------------------------------------------------------------

    def _watched(self) -> Served:
        """The marks of the matrices of all sites, with hooks that check every pass."""
        every = (matrix for site in self.sites for matrix in site.matrices)
        # A parameter that no layer holds is served with its module.
        matrices = list(dict.fromkeys(self._fused[m].module if m in self._fused else m for m in every))
        served = Served(self.model, matrices, self._streams.parts(), self._streams.optional(matrices))
        self._handles += served.watch()
        return served

    def _hook_at(self, matrix: str, hook: Update) -> None:
        """Adds the hook (x, y) -> y' at the matrix, and where a module that is fused from several computes it."""
        mark = self._served.mark(matrix)

        def called(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor | None:
            mark.seen = mark.ever = True
            return hook(args[0] if args else kwargs["input"], y)

        self._handles.append(self._modules[matrix].register_forward_hook(called, with_kwargs=True))
        for module, rows in fused_with(matrix, self._modules):
            self._handles.append(module.register_forward_hook(_on_rows(rows, called), with_kwargs=True))

    def _hook(self, group: HostedGroup, index: int) -> Update:
        def hook(x: Tensor, y: Tensor) -> Tensor | None:
            if self._off:
                return None
            if self._streams.probing:
                group.learn(x, self._streams.axes(group.stream))
                return None
            if group.x is not x or group.device != y.device:
                self._mix(group, x, y)
            return group.add(y, index)

        return hook

    def _mix(self, group: HostedGroup, x: Tensor, y: Tensor) -> None:
        """Projects x for every matrix of the group, and weights each rank by its expert's gate.

        y is an output of the base for x: it tells where, and in which type, the base computes.
        """
        exact, scale, given = torch.is_grad_enabled(), self._streams.of(group.site.site).scale, x
        if group.device != y.device or group.dtype != y.dtype:
            group.put(y.device, y.dtype)
        if group.kept is not None and not exact and self._recalled(group.kept, group, x, scale):
            return
        x = x if x.device == y.device else x.to(y.device)  # accelerate's hook moves it for the layer alone
        head = self._head if group.heads and not group.site.gate.constant else None
        whole = given if head is None else head.whole(given)
        whole = x if whole is given else whole.to(y.device)
        size = None if group.site.gate.constant else self._streams.axes(group.stream)
        group.learn(whole, size)
        u = group.project(x)
        value = self._values.value(group, whole, u if whole is x else group.project(whole))
        value = self._streams.fitted(group.name, value, x)
        if head is not None:
            value, size = head.rows(value), size if whole is x else None
        # Without gradients the weights are multiplied in place, which needs no cast.
        weights = self._per_rank(group, value, u.dtype if exact else value.dtype)
        group.weight(x, u, weights if scale == 1.0 else weights * scale, size)
        group.x = given
        if not exact and group.lasting:
            group.keep(given, value, self._keep, scale)

    def _recalled(self, kept: Kept, group: HostedGroup, x: Tensor, scale: float) -> bool:
        """Whether the results of an earlier pass are used again, because the input and the gate are the same.

        A pipeline gives the UNet the same text tensor at every denoising step.
        """
        hosted = group.site
        if not kept.holds(x, self._keep, scale, hosted):
            return False
        step = self._streams.of(hosted.site).step
        if group.place == 0:
            hosted.step, hosted.value, hosted.seen = step, kept.value, None
        elif hosted.step != step or hosted.value is not kept.value:
            return False
        group.x, group.mixed, group.served = x, kept.mixed, 0
        return True

    def _per_rank(self, group: HostedGroup, value: Tensor, dtype: torch.dtype) -> Tensor:
        """`value` ([N], [B, N] or [B, T, N]) for each rank of the group: [R], [B, 1, R] or [B, T, R]."""
        apart = self._renormalize_absent and not group.complete
        if value.dim() < 3 and not apart:
            current = self._streams.of(group.site.site)
            memo = current.expanded if current.learning else group.site.expanded
            return group.site.by_rank(value, dtype, group.device, memo)[group.place]
        if not apart:
            return value.to(group.device, dtype).index_select(-1, group.owner)
        value = (value.unsqueeze(1) if value.dim() == 2 else value).to(group.device)
        parts, owners = [rescale(value, present) for present in group.present], group.owner.split(group.sizes)
        return torch.cat([p.index_select(-1, owner) for p, owner in zip(parts, owners, strict=True)], dim=-1).to(dtype)

    def _begin(self) -> bool:
        """Drops what an earlier pass left; whether the axes of an input are still to be found out."""
        self._forget()
        return any(group.first is None and not group.site.gate.constant for group in self._groups)

    def _forget(self) -> None:
        for live in self._parameters:  # an interrupted pass may have left some inside a module
            live.restore()
        for group in self._groups:
            if group.x is not None:
                group.forget()


def _on_rows(rows: slice, hook: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
    """The hook for some features of a module's output."""

    def part(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor | None:
        new = hook(module, args, kwargs, y[..., rows].contiguous())
        return None if new is None else torch.cat([y[..., : rows.start], new, y[..., rows.stop :]], dim=-1)

    return part


def switch(mixture: Mixture, *, mask: tuple[str, ...], only: tuple[str, ...]) -> tuple[str, ...]:
    """The names of the experts that it switches off: those in `mask`, and with `only` all that it does not name.

    Raises: UsageError for an unknown name.
    """
    kept = {mixture.names[mixture.bank.index(name)] for name in only} if only else set(mixture.names)
    off = {mixture.names[mixture.bank.index(name)] for name in mask}
    switched = tuple(name for name in mixture.names if name in off or name not in kept)
    mixture.mask(*switched)
    return switched
