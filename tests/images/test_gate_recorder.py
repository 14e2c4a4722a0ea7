"""Gates recorded while a pipeline draws: each step by itself, both halves apart, the text encoder on the prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_pipelines import attention_only, make_expert
from torch import Tensor

from molecli.bases.diffusion import Diffusion
from molecli.config import GateConfig
from molecli.errors import RunError
from molecli.images.gate_trace import GateRecorder, StepReport, Trace, step_report
from molecli.mixture.build import build_mixture
from molecli.mixture.mixture import Mixture

STEPS = 3
PROMPTS = ["a cat", "two dogs"]


@pytest.fixture(params=["sd", "sdxl"])
def backbone(request: pytest.FixtureRequest, make_pipeline: Callable[..., Any]) -> Diffusion:
    return Diffusion(make_pipeline(request.param), request.param)


def mixture_on(backbone: Diffusion, keep: Callable[[str], bool] = attention_only, **gate: Any) -> Mixture:
    """Two LoRAs under gates that are far from uniform."""
    experts = [make_expert(name, backbone.matrices(), seed=i, keep=keep) for i, name in enumerate("ab")]
    settings = {"granularity": "layer", "normalize": "unit", **gate}
    mixture = build_mixture(backbone.model, experts, mode="gated", gate=GateConfig(**settings))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in mixture.named_parameters().values():
            parameter.copy_(3 * torch.randn(parameter.shape, generator=generator))
    return mixture


def recorded(backbone: Diffusion, mixture: Mixture, prompts: list[str], **settings: Any) -> Trace:
    with mixture, GateRecorder(mixture) as recorder:
        options = {"seeds": range(len(prompts)), "steps": STEPS, "guidance": 4.0, "on_step": recorder, **settings}
        backbone.generate(prompts, **options)  # type: ignore[arg-type]
    return recorder.trace()


def watched(backbone: Diffusion, mixture: Mixture, prompts: list[str], guidance: float) -> tuple[list[Any], list[Any]]:
    """The gates after every call of the UNet, and after every call of the text encoder, by hooks of the test's own."""
    of_unet: list[dict[str, Tensor]] = []
    of_text: list[dict[str, Tensor]] = []
    with mixture:
        handles = [
            backbone.model.unet.register_forward_hook(lambda *_: of_unet.append(mixture.gates())),
            backbone.model.text_encoder.register_forward_hook(lambda *_: of_text.append(mixture.gates())),
        ]
        backbone.generate(prompts, seeds=range(len(prompts)), steps=STEPS, guidance=guidance)
        for handle in handles:
            handle.remove()
    return of_unet, of_text


def test_each_step_holds_that_steps_gates_with_both_halves_apart(backbone: Diffusion) -> None:
    mixture = mixture_on(backbone)
    trace = recorded(backbone, mixture, PROMPTS)
    of_unet, of_text = watched(backbone, mixture, PROMPTS, 4.0)
    assert len(of_unet) == len(trace.timesteps) == STEPS
    assert list(trace.timesteps) == sorted(trace.timesteps, reverse=True)
    assert trace.steps["conditional"].shape == (2, STEPS, len(trace.sites), 2)
    for s, gates in enumerate(of_unet):
        for i, site in enumerate(trace.sites):
            assert torch.equal(trace.steps["unconditional"][:, s, i], gates[site][:2])
            assert torch.equal(trace.steps["conditional"][:, s, i], gates[site][2:])
    # The first call encodes the prompts, any later one what is not wanted.
    first = [site for site in trace.text_sites if site.startswith("text_encoder.")]
    for i, site in enumerate(first):
        assert torch.equal(trace.text[:, i], of_text[0][site])
    spread = trace.steps["conditional"].std(dim=1).max()
    assert spread > 1e-4, "the gates do not change over the steps: nothing is tested"
    assert not torch.allclose(trace.steps["conditional"], trace.steps["unconditional"], atol=1e-4)


def test_two_generations_are_two_sets_of_pictures(backbone: Diffusion) -> None:
    mixture = mixture_on(backbone)
    together = recorded(backbone, mixture, PROMPTS)
    with mixture, GateRecorder(mixture) as recorder:
        for i, prompt in enumerate(PROMPTS):
            backbone.generate([prompt], seeds=[i], steps=STEPS, guidance=4.0, on_step=recorder)
    apart = recorder.trace()
    for rows in ("conditional", "unconditional"):
        assert torch.allclose(apart.steps[rows], together.steps[rows], atol=1e-4)
    assert torch.allclose(apart.text, together.text, atol=1e-4)


def test_without_guidance_all_rows_are_conditional(backbone: Diffusion) -> None:
    mixture = mixture_on(backbone)
    trace = recorded(backbone, mixture, PROMPTS, guidance=1.0)
    assert list(trace.steps) == ["conditional"]
    of_unet, _ = watched(backbone, mixture, PROMPTS, 1.0)
    assert torch.equal(trace.steps["conditional"][:, -1, 0], of_unet[-1][trace.sites[0]])


def test_a_scheduler_that_asks_the_unet_twice_a_step_has_a_column_for_each_call(tiny_sd: Any) -> None:
    backbone = Diffusion(tiny_sd, "sd")
    trace = recorded(backbone, mixture_on(backbone), PROMPTS, scheduler="heun")
    assert trace.steps["conditional"].shape[1] == len(trace.timesteps) == 2 * STEPS - 1


def test_static_gates_stand_for_every_picture_and_step(tiny_sd: Any) -> None:
    backbone = Diffusion(tiny_sd, "sd")
    trace = recorded(backbone, mixture_on(backbone, input="none"), PROMPTS)
    assert trace.steps["unconditional"].shape == trace.steps["conditional"].shape == (2, STEPS, len(trace.sites), 2)
    assert trace.steps["conditional"].std(dim=(0, 1)).max() < 1e-6
    assert trace.text.shape == (2, len(trace.text_sites), 2)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_loras_on_one_part_leave_the_other_empty(part: str, tiny_sd: Any) -> None:
    backbone = Diffusion(tiny_sd, "sd")
    mixture = mixture_on(backbone, lambda matrix: matrix.startswith(f"{part}.") and attention_only(matrix))
    trace = recorded(backbone, mixture, PROMPTS)
    assert (len(trace.sites) > 0, len(trace.text_sites) > 0) == (part == "unet", part == "text_encoder")
    report = step_report({"both": trace}, mixture.names)
    assert isinstance(report, StepReport) == (part == "unet")
    for row in report.weights["both"]:
        assert sum(row) == pytest.approx(1, abs=1e-5)


def test_the_recorder_leaves_no_hooks_and_says_when_nothing_was_drawn(tiny_sd: Any) -> None:
    backbone = Diffusion(tiny_sd, "sd")
    mixture = mixture_on(backbone)
    with GateRecorder(mixture) as recorder:
        pass
    modules = (backbone.model.unet, backbone.model.text_encoder)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    with pytest.raises(RunError) as caught:
        recorder.trace()
    assert str(caught.value) == "gates: no picture was drawn while they were recorded. Call the pipeline first."
