"""Recorded calls of the UNet, replayed: the same pictures as call by call, whoever is attached.

On the CPU a call is recorded as the operations that torch sees, with every tensor from outside taken as it lies in
memory, which is what a CUDA graph holds; what Python decides is decided once, as there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from three_loras import PROMPTS, TRIGGERS, trio
from tiny_pipelines import PIPELINES
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from molecli.bases.diffusion import Diffusion
from molecli.bases.pipeline import PipelineModules
from molecli.bases.replay import Call, Replayed, replaying
from molecli.config import GateConfig, MethodConfig
from molecli.mixture.build import build_mixture

STEPS = 9
MODES = ("linear", "nla", "switch", "composite", "loratorio", "w_switch", "w_composite")


class Tape(TorchDispatchMode):
    """Writes down every operation: (function, arguments, named ones, result)."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.lines.append((func, args, kwargs or {}, out))
        return out


class Recorder:
    """Records on tape; counts records and replays."""

    def __init__(self) -> None:
        self.records = self.replays = 0

    def __call__(self, call: Call, inputs: Sequence[Tensor]) -> Call:
        self.records += 1
        own = [x.clone() for x in inputs]
        with Tape() as tape:
            outputs = call(own)

        def replay(inputs: Sequence[Tensor]) -> Any:
            self.replays += 1
            now = {id(mine): given for mine, given in zip(own, inputs, strict=True)}

            def at_present(value: Any) -> Any:
                return tree_map_only(Tensor, lambda tensor: now.get(id(tensor), tensor), value)

            for func, args, kwargs, out in tape.lines:
                again = func(*at_present(args), **at_present(kwargs))
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    now[id(old)] = new
            return at_present(outputs)

        return replay


@pytest.fixture(params=PIPELINES)
def backbone(request: pytest.FixtureRequest, make_pipeline: Callable[..., Any]) -> Diffusion:
    return Diffusion(make_pipeline(request.param), request.param)


@pytest.fixture
def sd(make_pipeline: Callable[..., Any]) -> Diffusion:
    return Diffusion(make_pipeline("sd"), "sd")


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


def parts_of(backbone: Diffusion) -> PipelineModules:
    assert isinstance(backbone.model, PipelineModules)
    return backbone.model


def stand_in(backbone: Diffusion, recorder: Callable[..., Any]) -> Replayed:
    return Replayed(parts_of(backbone), lambda: recorder)


def drawn(
    backbone: Diffusion, stand_in: Replayed | None = None, prompts: Sequence[str] = PROMPTS, **more: Any
) -> Tensor:
    """Latents, with the stand-in in the UNet's place if there is one."""
    settings = {"steps": STEPS, "guidance": 3.0, "seeds": range(len(prompts)), "latent": True, **more}
    if stand_in is None:
        return torch.stack(backbone.generate(prompts, **settings))
    with replaying(backbone.pipe, stand_in):
        return torch.stack(backbone.generate(prompts, **settings))


def mixture_of(backbone: Diffusion, mode: str, **settings: Any) -> Any:
    settings.setdefault("method", MethodConfig(tau=1))
    mixture = build_mixture(backbone.model, trio(backbone), mode=mode, triggers=TRIGGERS, **settings)
    for number, parameter in enumerate(mixture.named_parameters().values()):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        parameter.data = noise.to(parameter.device)
    if getattr(mixture, "reads_prompt", False):
        mixture.prepare("a cat and a dog by the sea")
    return mixture


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_base_is_drawn_from_one_record(backbone: Diffusion, recorder: Recorder) -> None:
    expected, unet = drawn(backbone), backbone.pipe.unet
    same(drawn(backbone, stand_in(backbone, recorder)), expected)
    assert (recorder.records, recorder.replays) == (1, STEPS - 1)
    assert backbone.pipe.unet is unet


def test_no_more_records_are_kept_than_so_many(
    sd: Diffusion, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("molecli.bases.replay._MOST", 1)
    there = stand_in(sd, recorder)
    for prompts, records in ((PROMPTS, 1), (["a bird"], 2), (PROMPTS, 3), (PROMPTS, 3)):
        same(drawn(sd, there, prompts), drawn(sd, prompts=prompts))
        assert recorder.records == records


def test_gates_are_those_of_the_pass_that_was_replayed(backbone: Diffusion, recorder: Recorder) -> None:
    for pool in ("mean", "token"):
        with mixture_of(backbone, "gated", gate=GateConfig(pool=pool)) as mixture:
            expected, gates = drawn(backbone), mixture.gates()
            same(drawn(backbone, stand_in(backbone, recorder)), expected)
            found = mixture.gates()
        assert gates.keys() == found.keys()
        for name, gate in gates.items():
            same(found[name], gate)
            assert float(gate.std()) > 0


@pytest.mark.parametrize("mode", MODES)
def test_every_method_draws_what_it_draws_call_by_call(sd: Diffusion, recorder: Recorder, mode: str) -> None:
    with mixture_of(sd, mode) as mixture:
        expected = drawn(sd)
        same(drawn(sd, stand_in(sd, recorder)), expected)
        mixture.mask("b")
        masked = drawn(sd)
    assert float((masked - expected).abs().max()) > 1e-3
    # Switch takes turns, each of which is a call of its own.
    assert recorder.records == (3 if mode in ("switch", "w_switch") else 1)
    assert recorder.replays == STEPS - recorder.records


def test_branches_in_several_calls_are_one_record(sd: Diffusion, recorder: Recorder) -> None:
    with mixture_of(sd, "composite", branches_at_once=1):
        same(drawn(sd, stand_in(sd, recorder)), drawn(sd))
    assert recorder.records == 1


@pytest.mark.parametrize("mode", ["gated", "switch", "composite"])
def test_one_stand_in_serves_other_prompts_sizes_masks_and_guests(sd: Diffusion, recorder: Recorder, mode: str) -> None:
    there = stand_in(sd, recorder)
    for prompts in (PROMPTS, PROMPTS[::-1], ["a bird"]):
        same(drawn(sd, there, prompts), drawn(sd, prompts=prompts))
    assert recorder.records == 2  # two sizes of a batch
    mixture = mixture_of(sd, mode)
    with mixture:
        first = drawn(sd)
        same(drawn(sd, there), first)
        mixture.only("c")
        one = drawn(sd)
        assert float((one - first).abs().max()) > 1e-3
        same(drawn(sd, there), one)
        mixture.mask("a", "b", "c")
        same(drawn(sd, there), drawn(sd))
        mixture.mask()
        same(drawn(sd, there), first)
    same(drawn(sd, there), drawn(sd))
    with mixture:
        same(drawn(sd, there), first)


def test_gates_that_learned_meanwhile_are_recorded_anew(sd: Diffusion, recorder: Recorder) -> None:
    there = stand_in(sd, recorder)
    with mixture_of(sd, "gated") as mixture:
        first = drawn(sd, there)
        for parameter in mixture.named_parameters().values():
            parameter.data.mul_(-1.0)
        with torch.no_grad():
            for parameter in mixture.named_parameters().values():
                parameter.add_(0.5)
        changed = drawn(sd)
        assert float((changed - first).abs().max()) > 1e-3
        same(drawn(sd, there), changed)


def test_gates_that_look_at_their_inputs_see_every_pass(sd: Diffusion, recorder: Recorder) -> None:
    with mixture_of(sd, "gated") as mixture:
        gates = mixture.gate_modules()
        for gate in gates.values():
            gate.observe()
        drawn(sd, stand_in(sd, recorder))
    assert recorder.records == 0


def test_with_gradients_calls_run_as_ever(sd: Diffusion, recorder: Recorder) -> None:
    there = stand_in(sd, recorder)
    latents, told = torch.randn(1, 4, 8, 8), sd.encode(["a cat"])
    with mixture_of(sd, "gated") as mixture, replaying(sd.pipe, there):
        for _ in range(3):
            loss = sd.predict(latents, torch.tensor([500]), told).square().mean()
        loss.backward()
        assert any(p.grad is not None and float(p.grad.abs().max()) > 0 for p in mixture.named_parameters().values())
    assert recorder.records == 0


def test_what_cannot_be_recorded_is_drawn_call_by_call_and_said_once(sd: Diffusion) -> None:
    def refuse(call: Call, inputs: Sequence[Tensor]) -> Call:
        raise RuntimeError("out of memory")

    there = stand_in(sd, refuse)
    with mixture_of(sd, "composite"):
        expected = drawn(sd)
        with pytest.warns(UserWarning, match="could not be recorded, so they run normally: out of memory"):
            same(drawn(sd, there), expected)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            same(drawn(sd, there), expected)


def test_after_an_error_nothing_recorded_is_left(sd: Diffusion, recorder: Recorder) -> None:
    there, unet = stand_in(sd, recorder), sd.pipe.unet
    drawn(sd, there)

    def fail(_: object) -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        drawn(sd, there, on_step=fail)
    assert sd.pipe.unet is unet
    drawn(sd, there)
    assert recorder.records == 2


def test_the_stand_in_has_what_a_pipeline_asks_of_a_unet(backbone: Diffusion, recorder: Recorder) -> None:
    there, unet = stand_in(backbone, recorder), backbone.pipe.unet
    assert there.config is unet.config
    assert there.dtype == unet.dtype
    with pytest.raises(AttributeError, match="nothing"):
        _ = there.nothing


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("mode", ["gated", *MODES])
def test_on_a_gpu_pictures_come_from_recorded_steps(backbone: Diffusion, mode: str) -> None:
    backbone.pipe.to("cuda")

    def both(prompts: Sequence[str] = PROMPTS) -> tuple[Tensor, Tensor]:
        return drawn(backbone, prompts=prompts), drawn(backbone, prompts=prompts, replay=False)

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*could not be recorded.*")
        base, expected = both()
        same_on_gpu(base, expected)
        with mixture_of(backbone, mode) as mixture:
            for prompts in (PROMPTS, PROMPTS[::-1], ["a bird"], PROMPTS):
                same_on_gpu(*both(prompts))
            drawn(backbone)
            gates = mixture.gates()
            drawn(backbone, replay=False)
            for name, gate in mixture.gates().items():
                same_on_gpu(gates[name], gate)
            mixture.mask("b")
            same_on_gpu(*both())
        again, _ = both()
        same_on_gpu(again, base)


def same_on_gpu(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)
