"""The pipelines of diffusers in the table: their rows, and what is asserted of each, the columns.

A way is tried without molecli first: where diffusers or the pipeline itself does not keep it, there is nothing to
equal. Contents: ROWS, PIPELINE_WAYS, Pipeline, pipeline_cells.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import torch
from gates import close, randomise
from PIL import Image
from pipeline_loras import WEIGHTS, experts, in_unet, mean, one_at_a_time, summed, written
from pipeline_shapes import PROMPT, SHAPES
from torch import Tensor, nn

from molecli.config import GateConfig, MethodConfig
from molecli.mixture.attach import attach
from molecli.mixture.mixture import Mixture
from tests.conformance.calls import Pairs
from tests.conformance.cells import BASE_TOLERANCE, FIXED_TOLERANCE, Cell, tried

ROWS = tuple(SHAPES)
# name of a mode in the table -> the arguments of `attach`.
SUMS: Mapping[str, Mapping[str, Any]] = {
    "linear": {"mode": "linear", "weights": WEIGHTS},
    "cat": {"mode": "cat", "weights": WEIGHTS},
}
GATES: Mapping[str, Mapping[str, Any]] = {
    "gated/layer": {"mode": "gated"},
    "gated/token": {"mode": "gated", "gate": GateConfig(granularity="matrix", pool="token")},
}
OUTPUTS: Mapping[str, Mapping[str, Any]] = {
    "switch": {"mode": "switch", "method": MethodConfig(tau=1)},
    "composite": {"mode": "composite"},
}
MODES = {**SUMS, "soup": {"mode": "soup"}, **GATES, **OUTPUTS}


class Pipeline:
    """One row: how its pipeline is made, and two LoRAs for it as files."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        pipe, self.call = self.anew()
        self.loras = written(experts(pipe), folder / "all")
        # Of the text encoders the methods on the UNet's outputs take a mean, which diffusers has not.
        self.loras_of_unet = written(experts(pipe, in_unet), folder / "unet")
        self.base = self.call(pipe)
        self._kept: dict[tuple[str, ...], Tensor] = {}

    def anew(self) -> tuple[Any, Callable[..., Tensor]]:
        """The pipeline, the same at each call, and its call."""
        return SHAPES[self.name]()

    def mixed(self, pipe: Any, mode: str | None) -> contextlib.AbstractContextManager[Any]:
        """The LoRAs on the pipeline, with gates far from uniform; nothing for the base."""
        if mode is None:
            return contextlib.nullcontext()
        mixture = attach(pipe, loras=self.loras_of_unet if mode in OUTPUTS else self.loras, **MODES[mode])
        randomise(mixture, sharpness=1.0)
        return mixture

    def kept(self, make: Callable[[], Tensor], *key: str) -> Tensor:
        """What `make` gives, computed once for this key."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def plain(self, mode: str | None) -> Tensor:
        """What a new pipeline draws in this mode."""
        return self.base if mode is None else self.kept(lambda: self.drawn(mode), "plain", mode)

    def drawn(self, mode: str | None, change: Callable[[Any], None] = lambda pipe: None, **inputs: Any) -> Tensor:
        """What a new pipeline draws, changed before the LoRAs are attached."""
        pipe, call = self.anew()
        change(pipe)
        with self.mixed(pipe, mode):
            return call(pipe, **inputs)


def as_diffusers(row: Pipeline, mode: str | None, **inputs: Any) -> Pairs:
    """The weighted sum is that of diffusers' own LoRAs."""
    expected = row.kept(lambda: row.call(summed(row.anew()[0], row.loras), **inputs), "sum", repr(inputs))
    if close(expected, row.base, 1e-3):
        raise AssertionError("diffusers' own LoRAs change nothing")
    yield expected if mode is None else row.drawn(mode, **inputs), expected


def scaled(row: Pipeline, mode: str | None) -> Pairs:
    """So it is with a scale of the call."""
    return as_diffusers(row, mode, cross_attention_kwargs={"scale": 0.4})


def folded(row: Pipeline, mode: str | None) -> Pairs:
    """Fixed weights are those updates added to the weights of the base."""
    pipe, call = row.anew()
    with row.mixed(pipe, mode) as mixture:
        found = call(pipe)
        weights = _weights(mixture) if mode == "soup" else None
    other, _ = row.anew()
    if mode is not None:
        _fold(row, other, weights)
    yield found, call(other)


def _weights(mixture: Mixture) -> dict[str, Tensor]:
    """matrix -> [N], the weights of the LoRAs that a soup learned."""
    gates = mixture.gates()
    return {matrix: gates[site.name][0] for site in mixture.sites for matrix in site.matrices}


def _fold(row: Pipeline, pipe: Any, weights: Mapping[str, Tensor] | None) -> None:
    """Adds the updates to the pipeline's own weights, without `weights` those of the fixed sum."""
    for i, expert in enumerate(experts(row.anew()[0])):
        for matrix, factors in expert.factors.items():
            if weights is not None and matrix not in weights:
                continue  # SDXL does not call the last layers of a text encoder
            component, path = matrix.split(".", 1)
            weight = getattr(pipe, component).get_submodule(path).weight
            scale = WEIGHTS[expert.name] if weights is None else weights[matrix][i]
            weight.data += scale * factors.delta().reshape(weight.shape)


def one_lora_at_a_time(row: Pipeline, mode: str | None) -> Pairs:
    """Methods on the UNet's outputs are one LoRA of diffusers at a time."""
    combine = (lambda outputs, step: outputs[step % len(outputs)]) if mode == "switch" else mean
    made = partial(one_at_a_time, row.anew()[0], row.loras_of_unet, combine)
    expected = row.kept(lambda: row.call(made()), "one at a time", str(mode == "switch"))
    yield expected if mode is None else row.plain(mode), expected


def batched(row: Pipeline, mode: str | None) -> Pairs:
    """Two prompts at once are one after the other."""
    prompts, seeds = [PROMPT, "a dog by night"], [0, 1]
    pictures = {name: [one, one] for name, one in row.call.keywords.items() if isinstance(one, Image.Image)}
    at_once = row.drawn(mode, seed=seeds, prompt=prompts, **pictures)
    alone = [row.drawn(mode, seed=seed, prompt=prompt) for seed, prompt in zip(seeds, prompts, strict=True)]
    yield at_once, torch.cat(alone)


def masked(row: Pipeline, mode: str | None) -> Pairs:
    """Masking all LoRAs gives the base bit for bit, taking the mask off the mixture, and leaving the base again."""
    pipe, call = row.anew()
    base = call(pipe)
    with row.mixed(pipe, mode) as mixture:
        before = call(pipe)
        if mixture is not None:
            mixture.mask(*row.loras)
            if not torch.equal(call(pipe), base):
                raise AssertionError("with all LoRAs masked it is not the base")
            mixture.mask()
            if close(before, base, 1e-3):
                raise AssertionError("the LoRAs change nothing")
        if not torch.equal(call(pipe), before):
            raise AssertionError("after a mask it is not what it was")
    if not torch.equal(call(pipe), base):
        raise AssertionError("the base is not restored")
    yield base, row.base


def offloaded(row: Pipeline, mode: str | None) -> Pairs:
    """Weights that are elsewhere between calls change nothing."""

    def sequential(pipe: Any) -> None:
        # As `enable_sequential_cpu_offload`, with the CPU as the device that computes.
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                accelerate.cpu_offload(part, execution_device=torch.device("cpu"))

    yield row.drawn(mode, sequential), row.plain(mode)


def fused(row: Pipeline, mode: str | None) -> Pairs:
    """Queries, keys and values in one layer change nothing."""
    yield row.drawn(mode, lambda pipe: pipe.unet.fuse_qkv_projections()), row.plain(mode)


@dataclass(frozen=True)
class PipelineWay:
    """head: of the column; run: (row, mode; None for the base) -> pairs; modes: in which it is tried."""

    head: str
    run: Callable[[Pipeline, str | None], Pairs]
    modes: Sequence[str]


_EACH_KIND = ("linear", "soup", "gated/layer", "gated/token", "composite")
PIPELINE_WAYS: Mapping[str, PipelineWay] = {
    "as_diffusers": PipelineWay("sum as diffusers", as_diffusers, tuple(SUMS)),
    "scaled": PipelineWay("scale of the call", scaled, tuple(SUMS)),
    "folded": PipelineWay("as added to the weights", folded, (*SUMS, "soup")),
    "batched": PipelineWay("two prompts at once", batched, tuple(MODES)),
    "one_lora": PipelineWay("one LoRA at a time", one_lora_at_a_time, tuple(OUTPUTS)),
    "masked": PipelineWay("masks and leaving", masked, tuple(MODES)),
    "offloaded": PipelineWay("offloaded", offloaded, _EACH_KIND),
    "fused": PipelineWay("fused projections", fused, _EACH_KIND),
}


def pipeline_cells(row: Pipeline, way: str, modes: Sequence[str] = tuple(MODES)) -> dict[str, Cell]:
    """Like `cells_of`: the cells in these modes, or one alone, "base", if the pipeline itself does not keep it."""
    run = PIPELINE_WAYS[way].run
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state, words = tried(run(row, None), BASE_TOLERANCE)
        if state != "exact":
            return {"base": Cell("base", words)}
        return {
            mode: Cell(*tried(run(row, mode), FIXED_TOLERANCE)) for mode in PIPELINE_WAYS[way].modes if mode in modes
        }
