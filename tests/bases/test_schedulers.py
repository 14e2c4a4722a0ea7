"""Schedulers by name: every one draws what diffusers draws with it, each picture by its own seed alone."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import pytest
import torch
from refusals import refused
from tiny_pipelines import build_pipeline, close
from torch import Tensor

from molecli.bases.diffusion import Diffusion
from molecli.bases.schedulers import make_scheduler
from molecli.catalog.schedulers import SCHEDULERS, scheduler_called
from molecli.config import ImageConfig
from molecli.errors import RunError
from molecli.mixture.branching import Clock

PROMPTS = ["a cat", "a dog in a hat"]


def missing(name: str) -> bool:
    """Whether the package that the scheduler needs is not here."""
    try:
        make_scheduler(name, diffusers.DDIMScheduler())
    except RunError:
        return True
    return False


HERE = [name for name in SCHEDULERS if not missing(name)]


@pytest.fixture(scope="module")
def sd() -> Diffusion:
    return Diffusion(build_pipeline("sd"))


def drawn(sd: Diffusion, prompts: list[str], seeds: list[int], **settings: Any) -> Tensor:
    return torch.stack(sd.generate(prompts, seeds=seeds, steps=3, guidance=3.0, latent=True, **settings))


# The first of each class always, its variants in the long run.
FIRST = {SCHEDULERS[name].kind: name for name in reversed(HERE)}.values()
EVERY = [name if name in FIRST else pytest.param(name, marks=pytest.mark.slow) for name in HERE]


@pytest.mark.parametrize("name", EVERY)
def test_a_picture_is_that_of_diffusers_and_of_its_seed(name: str, sd: Diffusion) -> None:
    both = drawn(sd, PROMPTS, [1, 2], scheduler=name)
    assert close(both[1:], drawn(sd, PROMPTS[1:], [2], scheduler=name))
    assert torch.equal(both, drawn(sd, PROMPTS, [1, 2], scheduler=name))
    own = sd.pipe.scheduler
    row = SCHEDULERS[name]
    try:
        sd.pipe.scheduler = getattr(diffusers, row.kind).from_config(own.config, **row.settings)
        if name.startswith("dpm_sde"):
            sd.pipe.scheduler.noise_sampler_seed = 1
        (theirs,) = sd.pipe(
            PROMPTS[0],
            num_inference_steps=3,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(1),
            output_type="latent",
        ).images
    finally:
        sd.pipe.scheduler = own
    assert close(both[0], theirs)
    assert both[0].isfinite().all()


@pytest.mark.parametrize(
    ("called", "name"),
    [
        ("DPM++ 2M Karras", "dpmsolver++_karras"),
        ("DPM++ 2M SDE Karras", "dpmsolver++_sde_karras"),
        ("dpmpp_2m", "dpmsolver++"),
        ("DPM++ SDE", "dpm_sde"),
        ("Euler a", "euler_a"),
        ("euler_ancestral", "euler_a"),
        ("DPM2 a Karras", "dpm2_a_karras"),
        ("PLMS", "pndm"),
        ("UniPC", "unipc"),
        ("EulerDiscreteScheduler", "euler"),
        ("DPMSolverMultistepScheduler", "dpmsolver++"),
        ("LCM", "lcm"),
        ("heun", "heun"),
        ("DPM fast", None),
    ],
)
def test_other_programs_names(called: str, name: str | None) -> None:
    assert scheduler_called(called) == name
    if name is not None:
        assert ImageConfig(scheduler=called).scheduler == name


def test_every_scheduler_that_diffusers_says_a_pipeline_takes_has_a_name() -> None:
    from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers

    # EDM's is for models that were trained with its own parametrisation; a base brings it along.
    assert {kind.name for kind in KarrasDiffusionSchedulers} - {"EDMEulerScheduler"} <= {
        row.kind for row in SCHEDULERS.values()
    }


def test_a_bad_name_lists_the_known_ones(sd: Diffusion) -> None:
    message = ["there is no scheduler 'eulr'", "Did you mean euler?", "Known: ddim, ddpm, pndm, euler", "tcd"]
    refused(lambda: drawn(sd, PROMPTS, [1, 2], scheduler="eulr"), 2, *message)


def test_a_missing_package_is_named(sd: Diffusion) -> None:
    if not missing("dpm_sde"):
        pytest.skip("torchsde is installed")
    refused(lambda: drawn(sd, PROMPTS, [1, 2], scheduler="dpm_sde"), 1, "Run: pip install torchsde.")


def test_settings_of_the_scheduler(sd: Diffusion) -> None:
    plain = drawn(sd, PROMPTS, [1, 2], scheduler="euler")
    spaced = drawn(sd, PROMPTS, [1, 2], scheduler="euler", scheduler_options={"timestep_spacing": "trailing"})
    assert not torch.equal(plain, spaced)
    options = {"timestep_spacing": "trailing"}
    assert make_scheduler("euler", sd.pipe.scheduler, options).config.timestep_spacing == "trailing"
    where = "image.scheduler_options.timestep_spacin: EulerDiscreteScheduler has no such setting"
    refused(lambda: make_scheduler("euler", sd.pipe.scheduler, {"timestep_spacin": 1}), 2, where, "timestep_spacing")
    karras = drawn(sd, PROMPTS, [1, 2], scheduler="euler_karras")
    assert torch.equal(
        drawn(sd, PROMPTS, [1, 2], scheduler="euler", scheduler_options={"use_karras_sigmas": True}), karras
    )


def test_a_name_means_the_same_whatever_the_bases_own_scheduler(sd: Diffusion) -> None:
    karras = diffusers.DPMSolverMultistepScheduler.from_config(sd.pipe.scheduler.config, use_karras_sigmas=True)
    assert make_scheduler(None, karras).config.use_karras_sigmas
    assert not make_scheduler("dpmsolver++", karras).config.use_karras_sigmas


def test_eta_is_refused_where_it_has_no_effect(sd: Diffusion) -> None:
    for name in ("ddim", "tcd"):
        assert not torch.equal(
            drawn(sd, PROMPTS, [1, 2], scheduler=name, eta=0.5), drawn(sd, PROMPTS, [1, 2], scheduler=name)
        )
    refused(lambda: drawn(sd, PROMPTS, [1, 2], scheduler="euler", eta=0.5), 2, "EulerDiscreteScheduler has no eta")


# The step of a call


def classes() -> list[str]:
    """Every class of diffusers that this pipeline runs."""
    return sorted({SCHEDULERS[name].kind for name in HERE} | {"DDIMParallelScheduler", "DDPMParallelScheduler"})


LONG = pytest.mark.slow


@pytest.mark.parametrize("strength", [pytest.param(None, marks=LONG), 0.5])
@pytest.mark.parametrize("kind", classes())
def test_the_clock_is_the_pipelines_own_index(kind: str, strength: float | None, sd: Diffusion) -> None:
    pipe = sd.pipe if strength is None else diffusers.StableDiffusionImg2ImgPipeline(
        **sd.pipe.components, requires_safety_checker=False
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    own, clock = sd.pipe.scheduler, Clock()
    moments, turns = [], []

    def before(unet: Any, args: Any, kwargs: Any) -> None:
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        moments.append(clock.moment(pipe.scheduler, timestep, False, pipe))

    def after(_: Any, index: int, timestep: Any, kwargs: Any) -> dict[str, Any]:
        turns.append((index, pipe.num_timesteps))
        return {}

    picture = {} if strength is None else {"image": torch.rand(1, 3, 16, 16), "strength": strength}
    hook = sd.pipe.unet.register_forward_pre_hook(before, with_kwargs=True)
    try:
        pipe.scheduler = getattr(diffusers, kind).from_config(own.config, clip_sample=False)
        for steps in (4, 6):  # two pictures
            moments.clear(), turns.clear()
            pipe("a cat", num_inference_steps=steps, output_type="latent", callback_on_step_end=after, **picture)
            assert [(moment.index, moment.total) for moment in moments] == turns
            assert [index for index, _ in turns] == list(range(turns[-1][1]))
    finally:
        hook.remove()
        pipe.scheduler = sd.pipe.scheduler = own


def test_all_names_are_classes_of_diffusers() -> None:
    for row in SCHEDULERS.values():
        known = inspect.signature(getattr(diffusers, row.kind).__init__).parameters
        assert set(row.settings) <= set(known) or "args" in known, row
