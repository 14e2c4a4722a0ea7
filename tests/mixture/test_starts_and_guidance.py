"""Pictures from a picture, without guidance, or with text layers skipped: every mode is what it stands for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from one_by_one import OneByOne
from PIL import Image
from refusals import refused
from three_loras import PROMPTS, TRIGGERS, trio
from tiny_pipelines import close
from torch import Tensor

from molecli.adapters import write_diffusers
from molecli.bases.diffusion import Diffusion
from molecli.bases.starts import Start, fitted
from molecli.config import MethodConfig
from molecli.mixture.build import build_mixture

SEEDS = [1, 2]
MODES = ("linear", "nla", "gated", "ties", "svd", "switch", "composite", "w_switch", "w_composite", "loratorio")


@pytest.fixture
def sd(make_pipeline: Callable[..., Any]) -> Diffusion:
    return Diffusion(make_pipeline("sd"), "sd")


def starts(masked: bool, strength: float = 0.5, size: tuple[int, int] = (24, 16)) -> list[Start]:
    """Two random pictures; the masks have their right halves white."""
    made = []
    for seed in SEEDS:
        random = torch.Generator().manual_seed(seed)
        pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=random, dtype=torch.uint8)
        mask = Image.new("L", size)
        mask.paste(255, (size[0] // 2, 0, *size))
        made.append(Start(Image.fromarray(pixels.numpy()), mask if masked else None, strength))
    return made


def in_unet(matrix: str) -> bool:
    return matrix.startswith("unet.")


def drawn(backbone: Diffusion, start: list[Start] | None = None, **settings: Any) -> Tensor:
    settings = {"steps": 6, "guidance": 3.0, **settings}
    return torch.stack(backbone.generate(PROMPTS, seeds=SEEDS, start=start, latent=True, **settings))


def theirs(pipe: Any, start: list[Start], **settings: Any) -> Tensor:
    """What diffusers' own pipeline draws."""
    family = type(pipe).__name__.removesuffix("Pipeline")
    masked = start[0].mask is not None
    kind = getattr(diffusers, f"{family}{'Inpaint' if masked else 'Img2Img'}Pipeline")
    other = kind.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    width, height = start[0].picture.size
    more = {"mask_image": [s.mask for s in start], "width": width, "height": height} if masked else {}
    return other(
        PROMPTS, image=[s.picture for s in start], strength=start[0].strength, output_type="latent",
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS], **more, **settings,
    ).images  # fmt: skip


LONG = pytest.mark.slow
EITHER = pytest.mark.parametrize("masked", [pytest.param(False, marks=LONG), True])


@pytest.mark.parametrize(
    ("kind", "masked"),
    [("sd", False), ("sdxl", True), *(pytest.param(*case, marks=LONG) for case in (("sd", True), ("sdxl", False)))],
)
def test_a_sum_from_a_picture_is_what_diffusers_draws_with_its_loras(
    kind: str, masked: bool, make_pipeline: Callable[..., Any], tmp_path: Path
) -> None:
    backbone, other = Diffusion(make_pipeline(kind), kind), make_pipeline(kind)
    experts = trio(backbone)[:2]
    weights = {"a": 0.8, "b": -0.5}
    for expert in experts:
        other.load_lora_weights(write_diffusers(tmp_path / expert.name, expert.factors), adapter_name=expert.name)
    other.set_adapters(list(weights), list(weights.values()))
    expected = theirs(other, starts(masked), num_inference_steps=6, guidance_scale=3.0)
    bare = drawn(backbone, starts(masked))
    with build_mixture(backbone.model, experts, mode="linear", weights=weights):
        found = drawn(backbone, starts(masked))
    assert close(found, expected, 1e-4)
    assert not close(found, bare, 1e-2)
    assert found.shape[-2:] == (8, 12)  # the pictures' own size
    backbone.pipe.unet.eval()
    assert close(drawn(backbone, starts(masked)), bare, 1e-6)


@EITHER
@pytest.mark.parametrize("scheduler", [None, "heun", pytest.param("euler_a", marks=LONG), "lcm"])
def test_switch_takes_its_first_turn_at_the_first_step_that_is_run(
    scheduler: str | None, masked: bool, sd: Diffusion
) -> None:
    experts, start = trio(sd, in_unet), starts(masked)
    with OneByOne(sd, experts, lambda outputs, step: outputs[step % 3]):
        expected = drawn(sd, start, scheduler=scheduler)
    with build_mixture(sd.model, experts, mode="switch", method=MethodConfig(tau=1)):
        assert close(drawn(sd, start, scheduler=scheduler), expected, 1e-4)


@pytest.mark.parametrize("guidance", [0.0, 1.0, 7.5])
@pytest.mark.parametrize("masked", [None, pytest.param(False, marks=LONG), True])
def test_composite_is_the_mean_with_and_without_guidance(masked: bool | None, guidance: float, sd: Diffusion) -> None:
    experts = trio(sd, in_unet)
    start = None if masked is None else starts(masked)
    rows: list[int] = []
    hook = sd.pipe.unet.register_forward_pre_hook(lambda unet, args: rows.append(len(args[0])))
    with OneByOne(sd, experts, lambda outputs, step: torch.stack(outputs).mean(0)):
        expected = drawn(sd, start, guidance=guidance, negative_prompt="a bad picture")
    hook.remove()
    assert set(rows) == {4 if guidance > 1 else 2}  # without guidance there is no second half
    with build_mixture(sd.model, experts, mode="composite"):
        assert close(drawn(sd, start, guidance=guidance, negative_prompt="a bad picture"), expected, 1e-4)


@pytest.mark.parametrize("guidance", [0.0, pytest.param(1.0, marks=LONG), 7.5])
@pytest.mark.parametrize("kind", ["sd", pytest.param("sd2", marks=LONG), "sdxl"])
def test_a_sum_under_any_guidance_is_diffusers_own(
    kind: str, guidance: float, make_pipeline: Callable[..., Any], tmp_path: Path
) -> None:
    backbone, other = Diffusion(make_pipeline(kind), kind), make_pipeline(kind)
    (expert, *_) = trio(backbone)
    other.load_lora_weights(write_diffusers(tmp_path / "a", expert.factors), adapter_name="a")
    expected = other(
        PROMPTS, num_inference_steps=4, guidance_scale=guidance, output_type="latent", guidance_rescale=0.7,
        negative_prompt=["a bad picture"] * 2, generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
    ).images  # fmt: skip
    with build_mixture(backbone.model, [expert], mode="linear"):
        found = drawn(backbone, steps=4, guidance=guidance, negative_prompt="a bad picture", guidance_rescale=0.7)
    assert close(found, expected, 1e-4)


@EITHER
@pytest.mark.parametrize(
    "mode", [mode if mode in ("gated", "ties", "loratorio") else pytest.param(mode, marks=LONG) for mode in MODES]
)
def test_in_every_mode_a_picture_depends_on_its_own_start_alone(mode: str, masked: bool, sd: Diffusion) -> None:
    mixture = build_mixture(sd.model, trio(sd), mode=mode, triggers=TRIGGERS)
    if getattr(mixture, "reads_prompt", False):
        mixture.prepare("a cat and a dog by the sea")  # type: ignore[attr-defined]
    start = starts(masked, strength=0.7)
    bare = drawn(sd, start)
    with mixture:
        both = drawn(sd, start)
        for i in range(2):
            (alone,) = sd.generate(
                PROMPTS[i : i + 1], seeds=SEEDS[i : i + 1], start=start[i : i + 1], steps=6, guidance=3.0, latent=True
            )
            assert close(both[i], alone, 1e-4)
    assert not close(both, bare, 1e-2)
    assert torch.equal(drawn(sd, start), bare)


def skipped(pipe: Any, texts: list[str], skip: int) -> Tensor:
    """The text encoder's output without its last `skip` layers, by hand. diffusers skips none in negative prompts."""
    ids = pipe.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    layers = pipe.text_encoder(ids, output_hidden_states=True).hidden_states
    return pipe.text_encoder.final_layer_norm(layers[-1 - skip])


def test_skipped_layers_count_in_pictures_and_in_training(sd: Diffusion) -> None:
    expected = sd.pipe(
        prompt_embeds=skipped(sd.pipe, PROMPTS, 1), negative_prompt_embeds=skipped(sd.pipe, [""] * 2, 0),
        num_inference_steps=3, guidance_scale=3.0, output_type="latent",
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
    ).images  # fmt: skip
    plain, embeds = drawn(sd, steps=3), sd.encode(PROMPTS).embeds
    assert close(drawn(sd, steps=3, clip_skip=1), expected, 1e-5)
    sd.clip_skip = 1
    assert close(drawn(sd, steps=3), expected, 1e-5)
    assert not close(plain, expected, 1e-3)
    assert not close(sd.encode(PROMPTS).embeds, embeds, 1e-3)
    assert close(sd.encode(PROMPTS).embeds, skipped(sd.pipe, PROMPTS, 1), 1e-6)
    assert not any(name.startswith("text_model") for name, _ in sd.pipe.text_encoder.named_modules())
    refused(lambda: drawn(sd, clip_skip=2), 2, "--clip-skip 2: the text encoder has 2 layers. Write at most 1;")


def test_skipped_layers_of_sdxl(make_pipeline: Callable[..., Any]) -> None:
    xl = Diffusion(make_pipeline("sdxl"), "sdxl")
    refused(lambda: drawn(xl, clip_skip=1), 2, "--clip-skip 1: the text encoder has 2 layers. Leave it out.")


@pytest.mark.parametrize("scheduler", ["lcm", "tcd"])
def test_a_unet_that_embeds_the_guidance_scale(scheduler: str, make_pipeline: Callable[..., Any]) -> None:
    # As in latent consistency models: no second half, and the scale is an input of the UNet.
    pipe = make_pipeline("sd")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel.from_config(pipe.unet.config, time_cond_proj_dim=8).eval()
    unet.load_state_dict(pipe.unet.state_dict(), strict=False)
    pipe.register_modules(unet=unet.requires_grad_(False))
    backbone = Diffusion(pipe, "lcm")
    experts = trio(backbone, in_unet)
    rows: list[int] = []
    hook = pipe.unet.register_forward_pre_hook(lambda unet, args: rows.append(len(args[0])))
    with OneByOne(backbone, experts, lambda outputs, step: torch.stack(outputs).mean(0)):
        expected = drawn(backbone, guidance=5.0, scheduler=scheduler)
    hook.remove()
    assert set(rows) == {2}
    with build_mixture(backbone.model, experts, mode="composite"):
        found = drawn(backbone, guidance=5.0, scheduler=scheduler)
    assert close(found, expected, 1e-4)
    assert not close(drawn(backbone, guidance=2.0, scheduler=scheduler), drawn(backbone, guidance=5.0), 1e-3)


def test_starts_that_do_not_fit_are_refused(sd: Diffusion) -> None:
    refused(lambda: drawn(sd, starts(False, strength=0.0)), 2, "--strength 0: it is not above 0 and at most 1")
    refused(lambda: drawn(sd, starts(False, strength=1.5)), 2, "--strength 1.5")
    refused(lambda: drawn(sd, starts(False, strength=0.1)), 2, "of 6 steps none would be run", "Write at least 0.17")
    mixed = [starts(False)[0], starts(True)[1]]
    refused(lambda: drawn(sd, mixed), 2, "the starts differ in their size, strength or in having a mask")
    refused(lambda: drawn(sd, starts(False)[:1]), 2, "1 starts for 2 prompts. Give one start for each picture.")
    rescaled = "StableDiffusionImg2ImgPipeline has no such setting"
    refused(lambda: drawn(sd, starts(False), guidance_rescale=0.5), 2, "image.guidance_rescale", rescaled)


def test_sizes_are_fitted_and_said() -> None:
    start, said = fitted(Image.new("RGB", (21, 17)), Image.new("L", (10, 10), 255))
    assert start.picture.size == (16, 16)
    assert said == [
        "the picture is resized from 21 x 17 to 16 x 16 pixels",
        "the mask is resized from 10 x 10 to 16 x 16 pixels",
    ]
    assert start.mask is not None
    assert start.mask.size == (16, 16)
    assert fitted(Image.new("RGB", (24, 16)), None) == (Start(Image.new("RGB", (24, 16))), [])
    start, said = fitted(Image.new("RGB", (24, 16)), None, width=32, height=32)
    assert (start.picture.size, len(said)) == ((32, 32), 1)
    refused(lambda: fitted(Image.new("RGB", (7, 40)), None), 2, "it has 7 x 40 pixels")
