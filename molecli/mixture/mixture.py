"""The mixture: experts hosted on a frozen model by removable hooks, one stacked pass, one gate per site.

    y = W x + (u ⊙ g[rank -> expert]) Bᵀ,   u = x Aᵀ for all experts at once

Nothing of size experts x tokens x width is ever built, and no forward is patched.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from molecli.bases.pipeline import PipelineModules
from molecli.errors import MismatchError, RunError
from molecli.experts import ExpertBank
from molecli.functional.gating import rescale
from molecli.functional.tensor_version import Stamp, stamp
from molecli.mixture.site_state import HostedGroup, HostedSite, Kept, host_group, reference
from molecli.mixture.streams import Pass, Streams
from molecli.protocols import Gate, Site


class Mixture:
    """Experts on a model, weighted by a gate at each site; a context manager that leaves the model as it was.

    Raises: MismatchError where a matrix that an expert adapts is not in the model.
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
        self._hosted_bank = bank  # what is hosted: the experts themselves
        self.sites = tuple(sites)
        modules = dict(model.named_modules())
        for matrix in bank.matrices:
            if matrix not in modules:
                raise MismatchError(matrix, "the LoRAs adapt this matrix, and the base has none of that name")
        self._modules = modules
        self._streams = streams
        self._renormalize_absent = renormalize_absent
        for site in sites:
            gates[site.name].to(reference(modules[site.matrices[0]]).device)
        self._hosted = {site.name: HostedSite(site, gates[site.name]) for site in sites}
        self._groups: list[HostedGroup] = []
        self._handles: list[RemovableHandle] = []
        self._keep: Tensor | None = None
        self._off = False
        self._state = object()  # another whenever a pass computes from other memory than before
        self._stamps: list[Stamp] = []

    # -- attaching ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> Mixture:
        self.attach()
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def attach(self) -> None:
        """Put the hooks on."""
        if self._handles:
            raise RunError("mixture", "it is attached already", "Leave its context first.")
        self._state = object()
        self._handles += self._streams.attach(self._forget)
        if isinstance(self.model, PipelineModules):
            self._handles.append(self.model.register_guest(self))
        for hosted in self._hosted.values():
            hosted.owners, hosted.expanded = [], None
            # A gate of an earlier attachment is none of this one's prompts.
            hosted.step, hosted.value, hosted.maker, hosted.origin = -1, None, None, None
            for group in hosted.site.groups:
                live = host_group(group, hosted, self._hosted_bank, self._modules)
                self._groups.append(live)
                for index, matrix in enumerate(group.matrices):
                    self._handles.append(self._modules[matrix].register_forward_hook(self._hook(live, index)))
            hosted.owner, hosted.ranks = torch.cat(hosted.owners), [len(owner) for owner in hosted.owners]

    def detach(self) -> None:
        """Take every hook off; the model is the base again, bit for bit."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._groups = [], []
        for hosted in self._hosted.values():
            hosted.maker = None  # it would keep a copy of its factors

    # -- what a user asks of it --------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        return self.bank.names

    def mask(self, *names: str) -> None:
        """Switch off exactly the named experts, and all others on; the gates of these are rescaled to sum to 1."""
        off = {self.bank.index(name) for name in names}
        keep = torch.tensor([0.0 if i in off else 1.0 for i in range(len(self.bank))])
        self._keep = keep.to(reference(self.model).device) if off else None
        self._off = len(off) == len(self.bank)
        self._state = object()
        for hosted in self._hosted.values():
            hosted.step, hosted.value = -1, None

    def only(self, *names: str) -> None:
        """Keep the named experts and switch off the others."""
        kept = {self.bank.names[self.bank.index(name)] for name in names}
        self.mask(*(name for name in self.bank.names if name not in kept))

    def gates(self) -> dict[str, Tensor]:
        """{site: [batch, expert]} of the last forward pass, averaged over the tokens that are not padding."""
        # Copies: what a replayed pass leaves is written anew by the next one.
        return {name: mean.detach().clone() for name, mean in self._means()}

    def stacked_gates(self) -> Tensor:
        """[M sites, B, N], as `gates`, but with gradient: what the balance loss is built from (MoLE, Eq. 15)."""
        values = [mean for _, mean in self._means()]
        batch = max(value.shape[0] for value in values)
        # Guidance doubles the UNet's rows and not a text encoder's: row i then stands for rows i and i + B.
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
        """Everything the gates are, as `site/<name>/<tensor>`."""
        return {
            f"site/{name}/{key}": tensor.detach()
            for name, hosted in self._hosted.items()
            for key, tensor in hosted.gate.state_dict().items()
        }

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the gates from `tensors`. Raises: MismatchError for a missing, surplus or misshapen tensor."""
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

    # -- a guest of a pipeline's parts: see `pipeline.Guest` ---------------------------------------------------------

    @contextmanager
    def foreseen(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[Hashable, ...] | None]:
        sites = self._unet_sites()
        stamps = [stamp(hosted.tensors) for hosted in sites]
        if stamps != self._stamps:  # what a gate made of its parameters is made anew
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

    def _hook(self, group: HostedGroup, index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor | None:
            if self._off:
                return None
            x = args[0]
            if group.x is not x:
                self._mix(group, x)
            return group.add(y, index)

        return hook

    def _mix(self, group: HostedGroup, x: Tensor) -> None:
        """Project x for every matrix of the group and weight each rank by its expert's gate."""
        exact = torch.is_grad_enabled()
        if group.kept is not None and not exact and self._recalled(group.kept, group, x):
            return
        u = group.project(x)
        value = self._value(group, x, u)
        # Without gradients the weights multiply in place, which needs no cast of them.
        group.weight(x, u, self._per_rank(group, value, u.dtype if exact else value.dtype))
        if not exact and group.lasting:
            group.keep(x, value, self._keep)

    def _recalled(self, kept: Kept, group: HostedGroup, x: Tensor) -> bool:
        """Whether the group stands as an earlier pass left it, since its input and its gate are the same.

        A pipeline gives the UNet one and the same text at every denoising step.
        """
        hosted = group.site
        if not kept.holds(x, self._keep, hosted):
            return False
        step = self._streams.of(hosted.site).step
        if group.place == 0:
            hosted.step, hosted.value, hosted.valid = step, kept.value, None
        elif hosted.step != step or hosted.value is not kept.value:
            return False
        group.x, group.mixed, group.served = x, kept.mixed, 0
        return True

    def _per_rank(self, group: HostedGroup, value: Tensor, dtype: torch.dtype) -> Tensor:
        """`value` ([N], [B, N] or [B, T, N]) by the ranks of the group: [R], [B, 1, R] or [B, T, R]."""
        apart = self._renormalize_absent and not group.complete
        if value.dim() < 3 and not apart:
            return group.site.by_rank(value, dtype)[group.place]
        if not apart:
            return value.to(dtype).index_select(-1, group.owner)
        value = value.unsqueeze(1) if value.dim() == 2 else value
        parts, owners = [rescale(value, present) for present in group.present], group.owner.split(group.sizes)
        return torch.cat([p.index_select(-1, owner) for p, owner in zip(parts, owners, strict=True)], dim=-1).to(dtype)

    def _value(self, group: HostedGroup, x: Tensor, u: Tensor) -> Tensor:
        """The gate of the group's site in this pass, computed when its first matrix is called.

        A checkpointed layer is called again for its backward pass. What it computed there it must compute once more,
        the gate too, so that autograd finds the same tensors; what came from outside it must be taken as it was.
        """
        hosted = group.site
        current = self._streams.of(hosted.site)
        again = current.over and group is hosted.maker
        if hosted.value is not None and hosted.step == current.step and not again:
            return hosted.value
        hosted.maker = group
        gate: Gate = hosted.gate  # type: ignore[assignment]
        if gate.constant:
            hosted.step, hosted.value = current.step, gate(None, self._keep)
            return hosted.value
        decoding = bool(current.past) and hosted.site.stream == "decoder" and gate.remembers
        if decoding:
            self._check_cache(hosted, current)
        if decoding and gate.per_sequence and hosted.value is not None:
            hosted.step = current.step  # decided at prefill, then fixed
            return hosted.value
        reading = self._streams.reading(hosted.site, x, u, hosted.state)
        hosted.valid = reading.valid
        value = gate(reading, self._keep)
        hosted.step, hosted.value, hosted.state = current.step, value, reading.state
        hosted.origin = hosted.origin if decoding else current
        return value

    def _check_cache(self, hosted: HostedSite, current: Pass) -> None:
        """Nothing, where the pass goes on from the prompt that the site's gate was made for. Raises: RunError."""
        what = None
        if hosted.value is None:
            what = "the cache holds tokens from before the experts were attached or masked"
        elif hosted.origin is not None and hosted.origin.differs(current):
            what = "the cache is another than the last prompt's, whose gates are in force"
        if what is not None:
            raise RunError("generation", what, "Start with an empty cache.")

    def _forget(self) -> None:
        for group in self._groups:
            if group.x is not None:
                group.forget()

    def _means(self) -> Iterator[tuple[str, Tensor]]:
        for name, hosted in self._hosted.items():
            if hosted.value is None:
                continue
            value = hosted.value
            if value.dim() == 3 and hosted.valid is None:
                value = value.mean(1)
            elif value.dim() == 3:
                assert hosted.valid is not None
                weight = hosted.valid.unsqueeze(-1).to(value.dtype)
                value = (value * weight).sum(1) / weight.sum(1).clamp_min(1)
            yield name, value if value.dim() == 2 else value.unsqueeze(0)


def switch(mixture: Mixture, *, mask: tuple[str, ...], only: tuple[str, ...]) -> tuple[str, ...]:
    """Switches off the experts in `mask`, and with `only` all that it does not name; which they are.

    Raises: UsageError for an unknown name.
    """
    kept = {mixture.names[mixture.bank.index(name)] for name in only} if only else set(mixture.names)
    off = {mixture.names[mixture.bank.index(name)] for name in mask}
    switched = tuple(name for name in mixture.names if name in off or name not in kept)
    mixture.mask(*switched)
    return switched
