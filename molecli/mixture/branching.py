"""Methods on the UNet's outputs, hosted: K branches of one denoising step in one UNet call, or in a few.

    rows of the UNet     [branch 0's B rows; branch 1's B rows; ...]     each branch with its own experts' weights

A hook before the UNet repeats its inputs, a hook after it combines the outputs, and inside each branch's rows only its
own experts' ranks are computed. The pipeline is used as it is and knows nothing of it.

Contents: Branching.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from molecli.bases.pipeline import PipelineModules
from molecli.catalog.methods import DEFAULT, SUM
from molecli.errors import UsageError
from molecli.experts import ExpertBank
from molecli.mixture.branched import BranchedGroup, Branches
from molecli.mixture.mixture import Mixture
from molecli.mixture.site_state import reference
from molecli.mixture.streams import Streams
from molecli.protocols import Moment, OutputMethod, Reading, Site

# How many steps' branches are remembered, so that a step that comes again copies nothing to the device.
_KNOWN = 64


@dataclass
class _Call:
    """A UNet call under way: its inputs as the pipeline gave them, and the weights [K, N] of the branches."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rows: int
    moment: Moment
    weights: Tensor
    at_once: int

    def inputs(self, branches: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The inputs, with every tensor that has one entry a row repeated for so many branches."""
        if branches == 1:
            return self.args, self.kwargs
        return _repeated(self.args, branches, self.rows), _repeated(self.kwargs, branches, self.rows)


class Branching(Mixture):
    """Experts on a pipeline, composed by a method on the UNet's outputs; a context manager like every mixture.

    In the text encoder(s) the experts are summed with the method's `text_weights`, since a prompt is encoded once.
    `branches_at_once` limits how many branches run in one UNet call (memory); None runs all in one, with equal results.
    Raises: UsageError where the model is no pipeline; MismatchError as every mixture.
    """

    def __init__(
        self,
        model: nn.Module,
        bank: ExpertBank,
        sites: Sequence[Site],
        method: OutputMethod,
        *,
        streams: Streams,
        branches_at_once: int | None = None,
    ) -> None:
        if not isinstance(model, PipelineModules):
            what = "the mode composes the steps of a diffusion pipeline, and the base is another model"
            raise UsageError("--mode", what, f"Use {DEFAULT}, {SUM} or another, or name a diffusion base.")
        inside = [site for site in sites if site.entry.matrices[0].startswith("unet.")]
        others = [site for site in sites if site not in inside]
        super().__init__(model, bank, others, {site.name: _TextGate(method) for site in others}, streams=streams)
        self.sites = tuple(sites)
        self.pipeline, self.method, self.branches_at_once = model, method, branches_at_once
        self._inside = inside
        self._clock = Clock()
        self._branched: list[BranchedGroup] = []
        self._kept: Tensor | None = None
        self._branches: Branches = ()
        self._known: dict[tuple[tuple[float, ...], ...], Branches] = {}
        self._call: _Call | None = None
        self._next: _Call | None = None  # foreseen
        self._further = False

    # -- attaching ---------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Put the hooks on."""
        super().attach()
        try:
            for group in (group for site in self._inside for group in site.groups):
                live = BranchedGroup(group, self.bank, self._modules)
                self._branched.append(live)
                for index, matrix in enumerate(group.matrices):
                    hook = self._branched_hook(live, index)
                    self._handles.append(self._modules[matrix].register_forward_hook(hook))
            unet = self._unet
            self._handles.append(unet.register_forward_pre_hook(self._before, with_kwargs=True))
            self._handles.append(unet.register_forward_hook(self._after))
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Take every hook off; the pipeline is the base again, bit for bit."""
        super().detach()
        self._branched, self._branches, self._known, self._call = [], (), {}, None

    # -- what a user asks of it --------------------------------------------------------------------------------------

    @property
    def reads_prompt(self) -> bool:
        """Whether `prepare` must be called for every new prompt."""
        return self.method.reads_prompt

    def prepare(self, prompt: str) -> None:
        """Tell the method the prompt of the pictures that come next; needed where it `reads_prompt`."""
        self.method.prepare(prompt, self._encode)

    def mask(self, *names: str) -> None:
        """Switch off exactly the named experts, and all others on: the method composes those that are left."""
        super().mask(*names)
        self._kept = None if self._keep is None else self._keep.cpu()

    def state_dict(self) -> dict[str, Tensor]:
        """The experts' weights."""
        return {"method/weights": self.method.weights}

    @contextmanager
    def foreseen(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[Hashable, ...] | None]:
        """As of every mixture; which step it is decides by the branches that run. They are combined by `done`."""
        if self._off:
            yield self._state, "off"
            return
        self._next = coming = self._coming(args, kwargs)
        try:
            yield self._state, tuple(map(tuple, coming.weights.tolist())), coming.at_once
        finally:
            self._next = None

    def done(self, output: Any, left: Mapping[str, Tensor | None] | None = None) -> Any:
        output = super().done(output, left)
        return output if self._next is None else _with_sample(output, self._combined(_sample(output), self._next))

    def ease(self) -> bool:
        """From here on half as many branches run in a UNet call, for want of memory. False where it is one already."""
        most = min(self.branches_at_once or len(self.bank) + 1, len(self.bank) + 1)
        self.branches_at_once = max(1, most // 2)
        return self.branches_at_once < most

    # -- one denoising step ------------------------------------------------------------------------------------------

    @property
    def _unet(self) -> nn.Module:
        return self.pipeline.get_submodule("unet")

    def _before(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note the call, and repeat its inputs for the branches that run first."""
        if self._off or self._further:
            return None
        coming = self._next
        self._call = self._coming(args, kwargs) if coming is None else replace(coming, args=args, kwargs=kwargs)
        self._start(self._call.weights[: self._call.at_once])
        return self._call.inputs(self._call.at_once)

    def _coming(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Call:
        """The call with these arguments; the clock has gone on."""
        sample = args[0] if args else kwargs["sample"]
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        pipe = self.pipeline.pipe
        moment = self._clock.moment(getattr(pipe, "scheduler", None), timestep, guided(pipe, len(sample)))
        weights = self.method.branches(moment, self._kept)
        at_once = min(self.branches_at_once or len(weights), len(weights))
        return _Call(args, dict(kwargs), len(sample), moment, weights, at_once)

    def _after(self, unet: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Run what branches are left, and combine all."""
        if self._off or self._further or self._call is None:
            return None
        call, self._call = self._call, None
        samples = [_sample(output)]
        for start in range(call.at_once, len(call.weights), call.at_once):
            some = call.weights[start : start + call.at_once]
            self._start(some)
            inputs, named = call.inputs(len(some))
            self._further = True
            try:
                samples.append(_sample(unet(*inputs, **named)))
            finally:
                self._further = False
        outputs = torch.cat(samples) if len(samples) > 1 else samples[0]
        return _with_sample(output, outputs if self._next is not None else self._combined(outputs, call))

    def _combined(self, outputs: Tensor, call: _Call) -> Tensor:
        outputs = outputs.view(len(call.weights), call.rows, *outputs.shape[1:])
        return self.method.combine(outputs, call.moment, self._kept)

    def _start(self, weights: Tensor) -> None:
        """From here on the UNet's rows are those of branches with these weights [k, N]."""
        rows = tuple(map(tuple, weights.tolist()))
        if rows not in self._known:
            if len(self._known) == _KNOWN:
                self._known.clear()  # weights that follow the prompt
                self._state = object()
            here = weights.to(reference(self._unet).device)
            self._known[rows] = [
                [(expert, here[k, expert : expert + 1]) for expert, weight in enumerate(row) if weight]
                for k, row in enumerate(rows)
            ]
        self._branches = self._known[rows]

    def _branched_hook(self, group: BranchedGroup, index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor | None:
            return None if self._off else group.add(y, args[0], index, self._branches)

        return hook

    def _forget(self) -> None:
        super()._forget()
        for group in self._branched:
            group.forget()

    def _encode(self, texts: Sequence[str]) -> Tensor:
        """[P, T, d], the texts as the base alone encodes them."""
        pipe, off = self.pipeline.pipe, self._off
        self._off = True
        try:
            with torch.no_grad():
                return pipe.encode_prompt(
                    prompt=list(texts),
                    device=reference(self._unet).device,
                    num_images_per_prompt=1,
                    do_classifier_free_guidance=False,
                )[0]
        finally:
            self._off = off


class _TextGate(nn.Module):
    """The method's weights [N] in the text encoder(s), as a constant gate."""

    per_sequence = True
    remembers = False
    constant = True
    place: Tensor

    def __init__(self, method: OutputMethod) -> None:
        super().__init__()
        self.method = method
        self.register_buffer("place", torch.empty(0), persistent=False)

    def forward(self, reading: Reading | None, keep: Tensor | None = None) -> Tensor:
        return self.method.text_weights(keep).to(self.place.device)


def _repeated(value: Any, branches: int, rows: int) -> Any:
    """`value`, with every tensor in it that has `rows` entries repeated: [branches * rows, ...]."""
    if isinstance(value, Tensor):
        return value.repeat(branches, *(1,) * (value.dim() - 1)) if value.dim() and len(value) == rows else value
    if isinstance(value, Mapping):
        return {key: _repeated(entry, branches, rows) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_repeated(entry, branches, rows) for entry in value)
    return value


def _sample(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output.sample


def _with_sample(output: Any, sample: Tensor) -> Any:
    return (sample, *output[1:]) if isinstance(output, tuple) else type(output)(sample=sample)


class Clock:
    """Which denoising step a UNet call is, read off the scheduler: its own loop need not be known."""

    def __init__(self) -> None:
        self._times: weakref.ref[Tensor] | None = None
        self._values: list[float] = []
        self._index = -1

    def moment(self, scheduler: Any, timestep: Tensor | float, guided: bool) -> Moment:
        """The step at `timestep`: the next one, where it fits (a scheduler may come back to a time), else the first
        of that time."""
        time = float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)
        times = getattr(scheduler, "timesteps", None)
        if not isinstance(times, Tensor) or times.numel() == 0:
            return Moment(0, 1, time, guided)
        if self._times is None or self._times() is not times:  # every picture's scheduler sets its times anew
            self._times, self._values, self._index = weakref.ref(times), [float(t) for t in times.tolist()], -1
        following = self._index + 1
        if following >= len(self._values) or self._values[following] != time:
            gaps = [abs(value - time) for value in self._values]
            following = gaps.index(min(gaps))
        self._index = following
        return Moment(following, len(self._values), time, guided)


def guided(pipe: Any, rows: int) -> bool:
    """Whether the UNet's rows are two halves. A pipeline that was never called knows of no guidance."""
    return rows % 2 == 0 and bool(getattr(pipe, "do_classifier_free_guidance", False))
