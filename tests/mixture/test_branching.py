"""Methods on the UNet's outputs, hosted: each against the passes that it stands for, made one by one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from one_by_one import OneByOne
from three_loras import PROMPTS, TRIGGERS, trio
from tiny_pipelines import PIPELINES, close, make_expert
from torch import Tensor, nn

from molecli.adapters import write_diffusers
from molecli.bases.diffusion import Conditioning, Diffusion, make_scheduler
from molecli.config import MethodConfig
from molecli.errors import RunError, UsageError
from molecli.experts import Expert
from molecli.mixture.branching import Branching, Clock
from molecli.mixture.build import build_mixture

OUTPUT_MODES = ("switch", "composite", "w_switch", "w_composite", "loratorio")


@pytest.fixture(params=PIPELINES)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def backbone(kind: str, make_pipeline: Callable[..., Any]) -> Diffusion:
    return Diffusion(make_pipeline(kind), kind)


@pytest.fixture
def sd(make_pipeline: Callable[..., Any]) -> Diffusion:
    return Diffusion(make_pipeline("sd"), "sd")


def in_unet(matrix: str) -> bool:
    return matrix.startswith("unet.")


def built(backbone: Diffusion, experts: list[Expert], mode: str, **settings: Any) -> Branching:
    mixture = build_mixture(backbone.model, experts, mode=mode, triggers=TRIGGERS, **settings)
    assert isinstance(mixture, Branching)
    if mixture.reads_prompt:
        mixture.prepare("a cat and a dog by the sea")
    return mixture


def test_eased_a_step_runs_fewer_branches_at_once_with_equal_results(sd: Diffusion) -> None:
    mixture = built(sd, trio(sd), "loratorio")  # the base and three LoRAs: four branches
    with mixture:
        expected = latents(sd)
        for at_once, more in ((2, True), (1, True), (1, False)):
            assert mixture.ease() is more
            assert mixture.branches_at_once == at_once
            assert close(latents(sd), expected, 1e-4)


def latents(backbone: Diffusion, *, steps: int = 3, guidance: float = 3.0, **more: Any) -> Tensor:
    return backbone.pipe(
        PROMPTS, num_inference_steps=steps, guidance_scale=guidance, output_type="latent",
        generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)], **more,
    ).images  # fmt: skip


# each against single passes ------------------------------------------------------------------------------------------


def test_composite_is_the_mean_of_every_loras_own_passes(backbone: Diffusion) -> None:
    experts = trio(backbone, in_unet)
    with OneByOne(backbone, experts, lambda outputs, step: torch.stack(outputs).mean(0)):
        expected = latents(backbone)
    with built(backbone, experts, "composite"):
        found = latents(backbone)
    assert close(found, expected, 1e-4)
    with built(backbone, experts[:2], "composite"):
        assert not close(latents(backbone), expected, 1e-2)


def test_switch_takes_turns_every_tau_steps(sd: Diffusion) -> None:
    experts = trio(sd, in_unet)
    turns = [0, 0, 1, 1, 2, 2, 0]
    with OneByOne(sd, experts, lambda outputs, step: outputs[turns[step]]):
        expected = latents(sd, steps=7)
    with built(sd, experts, "switch", method=MethodConfig(tau=2)):
        assert close(latents(sd, steps=7), expected, 1e-4)
    with built(sd, experts, "switch", method=MethodConfig(tau=2, order=("b", "a", "c"))):
        assert not close(latents(sd, steps=7), expected, 1e-2)


def test_switch_equals_diffusers_whose_adapters_are_changed_between_the_steps(
    sd: Diffusion, tmp_path: Path, make_pipeline: Callable[..., Any]
) -> None:
    experts = trio(sd, in_unet)
    weights = {"a": 0.8, "b": 1.5, "c": -0.5}
    other = Diffusion(make_pipeline("sd"))
    for expert in experts:
        other.pipe.load_lora_weights(write_diffusers(tmp_path / expert.name, expert.factors), adapter_name=expert.name)

    def change(pipe: Any, index: int, timestep: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        name = "abc"[(index + 1) % 3]
        pipe.set_adapters([name], [weights[name]])
        return {}

    other.pipe.set_adapters(["a"], [weights["a"]])
    expected = latents(other, steps=5, callback_on_step_end=change)
    with built(sd, experts, "switch", weights=weights, method=MethodConfig(tau=1)):
        assert close(latents(sd, steps=5), expected, 1e-4)


def test_loratorio_mixes_by_patches_and_keeps_a_share_of_the_base(sd: Diffusion) -> None:
    experts = trio(sd, in_unet)
    copies = [Expert(name, experts[0].factors, name, name, 4, 8.0) for name in "abc"]
    with built(sd, copies, "loratorio", method=MethodConfig(base_share=0.0)):
        equal = latents(sd)
    with build_mixture(sd.model, copies[:1], mode="linear"):
        assert close(equal, latents(sd), 1e-4)
    with built(sd, copies, "loratorio"):
        assert not close(latents(sd), equal, 1e-3)


# identities of all ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["switch", "composite", "w_switch", "w_composite"])
def test_one_lora_is_that_lora_in_the_text_encoder_too(backbone: Diffusion, mode: str) -> None:
    (expert, *_) = trio(backbone)
    with build_mixture(backbone.model, [expert], mode="linear", weights={"a": 0.7}):
        expected = latents(backbone)
    with built(backbone, [expert], mode, weights={"a": 0.7}):
        assert close(latents(backbone), expected, 1e-4)
    with built(backbone, [expert], mode, method=MethodConfig(scale=0.7)):
        assert close(latents(backbone), expected, 1e-4)


@pytest.mark.parametrize("mode", OUTPUT_MODES)
def test_masks_reach_the_base_and_each_lora_and_leaving_restores_it(sd: Diffusion, mode: str) -> None:
    experts, base = trio(sd), latents(sd)
    settings = {"method": MethodConfig(base_share=0.0)}
    with built(sd, experts, mode, **settings) as mixture:
        everything = latents(sd)
        mixture.mask("a", "b", "c")
        assert torch.equal(latents(sd), base)
        mixture.only("b")
        alone = latents(sd)
        mixture.mask()
        assert torch.equal(latents(sd), everything)
    assert torch.equal(latents(sd), base)
    assert not close(everything, alone, 1e-2)
    with build_mixture(sd.model, [experts[1]], mode="linear"):
        assert close(alone, latents(sd), 1e-4)


@pytest.mark.parametrize("mode", ["composite", "w_composite", "loratorio"])
@pytest.mark.parametrize("at_once", [1, 2])
def test_branches_in_fewer_calls_draw_the_same(backbone: Diffusion, mode: str, at_once: int) -> None:
    experts = trio(backbone)
    with built(backbone, experts, mode):
        expected = latents(backbone)
    with built(backbone, experts, mode, branches_at_once=at_once):
        assert close(latents(backbone), expected, 1e-4)


@pytest.mark.parametrize("mode", ["composite", "w_composite", "loratorio"])
def test_the_order_of_the_loras_changes_nothing(sd: Diffusion, mode: str) -> None:
    a, b, c = trio(sd)
    with built(sd, [a, b, c], mode):
        expected = latents(sd)
    with built(sd, [c, a, b], mode):
        assert close(latents(sd), expected, 1e-4)


@pytest.mark.parametrize("mode", OUTPUT_MODES)
def test_without_guidance_every_row_is_conditional(sd: Diffusion, mode: str) -> None:
    experts = trio(sd)
    with built(sd, experts, mode):
        free, guided = latents(sd, guidance=1.0), latents(sd)
    assert torch.isfinite(free).all()
    assert not close(free, guided, 1e-2)


def test_rows_of_a_batch_do_not_touch_one_another(sd: Diffusion) -> None:
    with built(sd, trio(sd), "composite"):
        both = latents(sd)
        one = sd.pipe(
            PROMPTS[1:], num_inference_steps=3, guidance_scale=3.0, output_type="latent",
            generator=[torch.Generator().manual_seed(2)],
        ).images  # fmt: skip
    assert close(both[1:], one, 1e-4)


def test_gradients_flow_through_the_branches(sd: Diffusion) -> None:
    """CLIP guidance of a composition by outputs has no use here, but a pipeline's own gradients must not break."""
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with built(sd, trio(sd), "composite"):
        embeds = sd.encode(PROMPTS).embeds.detach()
        sd.predict(noise, torch.tensor([900, 40]), Conditioning(embeds)).square().sum().backward()
    assert noise.grad is not None
    assert float(noise.grad.abs().max()) > 0


# the prompt ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["w_switch", "w_composite"])
def test_modes_that_read_the_prompt_ask_for_it_and_for_triggers(sd: Diffusion, mode: str) -> None:
    experts = trio(sd)
    with pytest.raises(UsageError, match=r"concepts\.a\.trigger"):
        build_mixture(sd.model, experts, mode=mode)
    mixture = build_mixture(sd.model, experts, mode=mode, triggers=TRIGGERS)
    with mixture, pytest.raises(RunError, match="no prompt was given yet"):
        latents(sd)


def test_the_prompt_is_weighed_by_the_base_whether_experts_are_on_or_not(sd: Diffusion) -> None:
    before = built(sd, trio(sd), "w_composite")
    shares = before.method.shares  # type: ignore[attr-defined]
    with built(sd, trio(sd), "w_composite") as within:
        within.prepare("a cat and a dog by the sea")
        assert torch.equal(within.method.shares, shares)  # type: ignore[attr-defined]


def test_a_language_model_has_no_denoising_steps(tiny_llama: Any) -> None:
    expert = make_expert("a", {"model.layers.0.mlp.up_proj": (64, 32)})
    with pytest.raises(
        UsageError, match="--mode composite: it acts on denoising steps, and the base is a language model"
    ):
        build_mixture(tiny_llama.model, [expert], mode="composite")


# steps ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddim", "ddpm", "pndm", "heun", "euler", "dpmsolver++", "unipc"])
def test_the_clock_counts_the_calls_of_every_scheduler(sd: Diffusion, name: str) -> None:
    scheduler = make_scheduler(name, sd.pipe.scheduler)
    clock = Clock()
    for _ in range(2):  # a second picture starts again
        scheduler.set_timesteps(6)
        moments = [clock.moment(scheduler, time, False) for time in scheduler.timesteps]
        assert [moment.index for moment in moments] == list(range(len(scheduler.timesteps)))
        assert {moment.total for moment in moments} == {len(scheduler.timesteps)}


def test_a_call_outside_the_loop_is_the_step_nearest_in_time(sd: Diffusion) -> None:
    scheduler = make_scheduler("ddim", sd.pipe.scheduler)
    scheduler.set_timesteps(10)
    assert Clock().moment(scheduler, torch.tensor([480, 480]), False).index == 4
    assert Clock().moment(nn.Identity(), 480.0, False).total == 1


@pytest.mark.parametrize(
    ("mode", "settings"), [("switch", {"method": MethodConfig(tau=1)}), ("composite", {"branches_at_once": 1})]
)
def test_what_is_kept_of_the_text_is_made_anew_when_anything_it_rests_on_changes(
    sd: Diffusion, mode: str, settings: dict[str, Any]
) -> None:
    texts = [sd.encode(PROMPTS), sd.encode(["x", "y"])]

    def drawn(mixture: Branching, text: int, *, fresh: bool) -> Tensor:
        for group in mixture._branched if fresh else ():
            group._last = None
        embeds = texts[text].embeds
        return latents_of(sd, prompt_embeds=embeds, negative_prompt_embeds=-embeds)

    seen = []
    with built(sd, trio(sd), mode, **settings) as mixture:
        for text, masked in ((0, ()), (0, ()), (1, ()), (1, ("a",)), (0, ("b",))):
            mixture.mask(*masked)
            seen.append(drawn(mixture, text, fresh=False))
            assert torch.equal(seen[-1], drawn(mixture, text, fresh=True))
    assert torch.equal(seen[0], seen[1])
    assert all(not close(a, b, 1e-3) for i, a in enumerate(seen[1:], 1) for b in seen[1:i])


def latents_of(backbone: Diffusion, **prompts: Any) -> Tensor:
    return backbone.pipe(
        **prompts, num_inference_steps=6, guidance_scale=3.0, output_type="latent",
        generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
    ).images  # fmt: skip
