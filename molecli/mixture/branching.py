"""Runs methods on the UNet's outputs: the K branches of a denoising step in one UNet call, or in a few.

    rows of the UNet     [branch 0's B rows; branch 1's B rows; ...]     each branch with its own experts' weights

A hook before the UNet repeats its inputs, and a hook after it combines the outputs. In each branch's rows only its own
experts' ranks are computed. The pipeline itself is not changed.

Contents: Branching, Clock.
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
from molecli.functional.wrapped import device_of
from molecli.mixture.branched import BranchedGroup, Branches
from molecli.mixture.call_scale import called_scale
from molecli.mixture.caller import calling_pipeline
from molecli.mixture.mixture import Mixture, Update
from molecli.mixture.streams import Streams
from molecli.mixture.unet_rows import RowModules, copied, guided, repeated
from molecli.protocols import Moment, OutputMethod, Reading, Site

# The number of steps whose branches are cached, so that a repeated step has the same object.
_KNOWN = 64


@dataclass
class _Call:
    """The current UNet call: its inputs from the pipeline, and the weights [K, N] of the branches."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rows: int
    frames: int | None
    moment: Moment
    weights: Tensor
    at_once: int

    def inputs(self, branches: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The inputs, with every tensor that has one entry per row repeated for each branch."""
        if branches == 1:
            return copied(self.args), copied(self.kwargs)
        return (
            repeated(self.args, branches, self.rows, self.frames),
            repeated(self.kwargs, branches, self.rows, self.frames),
        )


class Branching(Mixture):
    """Experts on a pipeline, composed by a method on the UNet's outputs; a context manager like every mixture.

    In the text encoders the experts are summed with the method's `text_weights`, because a prompt is encoded once.
    `branches_at_once` limits the branches in one UNet call, to save memory; the results are the same. None: no limit.
    Raises: UsageError if the model is not a pipeline; MismatchError like every mixture.
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
            what = "the mode is only for diffusion pipelines, and the base is another model"
            raise UsageError("--mode", what, f"Use {DEFAULT}, {SUM} or another mode, or name a diffusion base.")
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
        self._scale = 1.0  # the caller's factor on all updates in this UNet call
        self._known: dict[tuple[tuple[float, ...], ...], Branches] = {}
        self._call: _Call | None = None
        self._next: _Call | None = None  # the call that `foreseen` announced
        self._further = False

    # -- attaching ---------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Adds the hooks."""
        super().attach()
        try:
            for group in (group for site in self._inside for group in site.groups):
                live = BranchedGroup(group, self.bank, self._modules)
                self._branched.append(live)
                for index, matrix in enumerate(group.matrices):
                    self._hook_at(matrix, self._branched_hook(live, index))
            unet = self._unet
            self._row_modules = RowModules(unet)
            self._handles.append(unet.register_forward_pre_hook(self._before, with_kwargs=True))
            self._handles.append(unet.register_forward_hook(self._after))
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Removes all hooks; the pipeline is the base again, bit for bit."""
        super().detach()
        self._branched, self._branches, self._known, self._call = [], (), {}, None

    # -- for users ---------------------------------------------------------------------------------------------------

    @property
    def reads_prompt(self) -> bool:
        """Whether `prepare` must be called for every new prompt."""
        return self.method.reads_prompt

    def prepare(self, prompt: str) -> None:
        """Prepares the method for pictures of this prompt; required if it `reads_prompt`."""
        self.method.prepare(prompt, self._encode)

    def mask(self, *names: str) -> None:
        """Switches off exactly the named experts and switches on all others, which the method then composes."""
        super().mask(*names)
        self._kept = None if self._keep is None else self._keep.cpu()

    def state_dict(self) -> dict[str, Tensor]:
        """The experts' weights."""
        return {"method/weights": self.method.weights}

    @contextmanager
    def foreseen(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[Hashable, ...] | None]:
        """Like that of every mixture; a call also depends on the branches of its step. `done` combines them."""
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
        """Halves the number of branches per UNet call to save memory. False if it is one already."""
        most = min(self.branches_at_once or len(self.bank) + 1, len(self.bank) + 1)
        self.branches_at_once = max(1, most // 2)
        return self.branches_at_once < most

    # -- one denoising step ------------------------------------------------------------------------------------------

    @property
    def _unet(self) -> nn.Module:
        return self.pipeline.get_submodule("unet")

    def _before(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Notes the call, and repeats its inputs for the first branches."""
        if self._off or self._further:
            return None
        coming = self._next
        self._scale = called_scale(kwargs)
        self._call = self._coming(args, kwargs) if coming is None else replace(coming, args=args, kwargs=kwargs)
        self._start(self._call.weights[: self._call.at_once])
        return self._call.inputs(self._call.at_once)

    def _coming(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Call:
        """The call with these arguments; advances the clock."""
        sample = args[0] if args else kwargs["sample"]
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        pipe = calling_pipeline(self.pipeline.pipe)
        moment = self._clock.moment(getattr(pipe, "scheduler", None), timestep, guided(pipe, len(sample)), pipe)
        weights = self.method.branches(moment, self._kept)
        at_once = min(self.branches_at_once or len(weights), len(weights))
        if at_once > 1 and self._row_modules.divider() is not None:
            at_once = 1  # what splits the rows must get those of one branch
        frames = sample.shape[2] if sample.dim() == 5 else None
        return _Call(args, dict(kwargs), len(sample), frames, moment, weights, at_once)

    def _after(self, unet: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Runs the remaining branches and combines all."""
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
        if outputs.dim() == 5:
            return self.method.combine(outputs, call.moment, self._kept)
        # A film [C, F, H, W]: its frames are combined like pictures.
        frames = outputs.transpose(2, 3).flatten(1, 2)
        combined = self.method.combine(frames, call.moment, self._kept)
        return combined.unflatten(0, (call.rows, -1)).transpose(1, 2)

    def _start(self, weights: Tensor) -> None:
        """Sets the branches of the UNet's rows, with weights [k, N]."""
        rows = tuple(map(tuple, weights.tolist()))
        if rows not in self._known:
            if len(self._known) == _KNOWN:
                self._known.clear()  # the weights depend on the prompt
                self._state = object()
            self._known[rows] = [[(expert, weight) for expert, weight in enumerate(row) if weight] for row in rows]
        self._branches = self._known[rows]

    def _branched_hook(self, group: BranchedGroup, index: int) -> Update:
        def hook(x: Tensor, y: Tensor) -> Tensor | None:
            return None if self._off else group.add(y, x, index, self._branches, self._scale)

        return hook

    def _forget(self) -> None:
        super()._forget()
        for group in self._branched:
            group.forget()

    def _encode(self, texts: Sequence[str]) -> Tensor:
        """[P, T, d], the texts encoded by the base without LoRAs."""
        pipe, off = self.pipeline.pipe, self._off
        self._off = True
        try:
            with torch.no_grad():
                return pipe.encode_prompt(
                    prompt=list(texts),
                    device=getattr(pipe, "_execution_device", None) or device_of(self._unet),
                    num_images_per_prompt=1,
                    do_classifier_free_guidance=False,
                )[0]
        finally:
            self._off = off


class _TextGate(nn.Module):
    """A constant gate with the method's weights [N] in the text encoders."""

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


def _sample(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output.sample


def _with_sample(output: Any, sample: Tensor) -> Any:
    return (sample, *output[1:]) if isinstance(output, tuple) else type(output)(sample=sample)


class Clock:
    """Finds the denoising step of a UNet call from the scheduler, without knowing the pipeline's loop.

    A step is a turn of that loop, counted from the first that is run: img2img runs only the last of the scheduler's
    times. Schedulers of second order have two turns, and so two UNet calls, for most of their times.
    """

    def __init__(self) -> None:
        self._times: weakref.ref[Tensor] | None = None
        self._values: list[float] = []
        self._index = -1
        self._first = 0
        self._total = 0

    def moment(self, scheduler: Any, timestep: Tensor | float, guided: bool | None, pipe: Any = None) -> Moment:
        """The step at `timestep`: the next one if it has that time (a scheduler can repeat a time), otherwise the first
        one with it. `pipe`: the pipeline whose loop it is, which knows how many turns it has."""
        time = float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)
        times = getattr(scheduler, "timesteps", None)
        if not isinstance(times, Tensor) or times.numel() == 0:
            return Moment(0, 1, time, guided)
        if self._times is None or self._times() is not times:  # the scheduler sets new times for every picture
            self._times, self._values = weakref.ref(times), [float(t) for t in times.tolist()]
            self._first, self._total = _turns(self._values, time, scheduler, pipe)
            self._index = self._first - 1
        following = self._index + 1
        if following >= len(self._values) or self._values[following] != time:
            gaps = [abs(value - time) for value in self._values]
            following = gaps.index(min(gaps))
        self._index = following
        return Moment(max(0, following - self._first), self._total, time, guided)


def _turns(values: Sequence[float], time: float, scheduler: Any, pipe: Any) -> tuple[int, int]:
    """(place of the first turn among the scheduler's times, number of turns) of a loop that begins at `time`.

    All of them unless the pipeline says otherwise: its number of turns (img2img: the last ones), or its end.
    """
    turns = getattr(pipe, "_num_timesteps", None)
    if not isinstance(turns, int) or not 0 < turns < len(values):
        return 0, len(values)
    last = len(values) - turns
    if values[last] == time:
        return last, turns
    end = getattr(pipe, "denoising_end", None)
    if isinstance(end, float) and 0 < end < 1:
        begin = getattr(scheduler, "begin_index", None) or 0
        return (begin if values[begin] == time else values.index(time) if time in values else 0), turns
    return 0, len(values)
