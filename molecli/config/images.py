"""The sections of a recipe that only apply to a diffusion base. A field holds its default and its help text.

Contents: ImageConfig, ConceptConfig, PicturesConfig, ObjectiveConfig.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from molecli.catalog.builtin import BUILTIN_IMAGE_GUIDANCE, DEFAULT_GUIDANCE
from molecli.catalog.schedulers import scheduler_called, unknown_scheduler
from molecli.config.sections import ClipConfig, Section
from molecli.protocols import ElementKind


def known_scheduler(name: str) -> str:
    """The scheduler's own name for any of its names. Raises: an error that lists the known ones."""
    called = scheduler_called(name)
    if called is None:
        raise PydanticCustomError("unknown_name", "is not a scheduler", {"remedy": unknown_scheduler(name)})
    return called


def multiple_of_8(pixels: int) -> int:
    """`pixels`, if it is a valid side of a picture. Raises: an error that names the nearest valid sizes."""
    if pixels % 8:
        below = pixels // 8 * 8
        remedy = f"Write {below} or {below + 8}."
        raise PydanticCustomError("unknown_name", "is not a multiple of 8", {"remedy": remedy})
    return pixels


Scheduler = Annotated[str, AfterValidator(known_scheduler)]
Side = Annotated[int, AfterValidator(multiple_of_8)]


class ImageConfig(Section):
    """How pictures are denoised."""

    steps: int = Field(default=25, ge=1, description="images: denoising steps")
    guidance: float | None = Field(
        default=None,
        ge=0.0,
        allow_inf_nan=False,
        description=f"images: classifier-free guidance scale; by default {DEFAULT_GUIDANCE:g}, for the built-in base "
        f"{BUILTIN_IMAGE_GUIDANCE:g}",
    )
    scheduler: Scheduler | None = Field(
        default=None,
        description="images: ddim, dpmsolver++_karras, euler_a, lcm, ... or another program's name, such as "
        "'DPM++ 2M Karras'; by default the base's own",
    )
    scheduler_options: dict[str, Any] = Field(
        default_factory=dict,
        description="images: settings of diffusers' scheduler, such as timestep_spacing: trailing",
    )
    eta: float = Field(
        default=0.0, ge=0.0, le=1.0, description="images: noise that is added at each step of ddim, tcd and sasolver"
    )
    guidance_rescale: float = Field(
        default=0.0, ge=0.0, le=1.0, description="images: how far guided predictions are rescaled (arXiv 2305.08891)"
    )
    clip_skip: int | None = Field(
        default=None,
        ge=1,
        description="images: last layers of the text encoder(s) to skip, as in diffusers; A1111 counts one more",
    )
    negative_prompt: str = Field(default="", description="images: what the pictures should not show")
    width: Side | None = Field(default=None, ge=8, description="images: width in pixels; by default the base's own")
    height: Side | None = Field(default=None, ge=8, description="images: height in pixels; by default the base's own")
    branches_at_once: int | None = Field(
        default=None,
        ge=1,
        description="images: LoRAs per UNet call in modes that call it for each LoRA; fewer need less memory",
    )
    replay: bool = Field(
        default=True, description="on CUDA, record a UNet call and replay it: faster, but needs more memory"
    )


class ConceptConfig(Section):
    """What a LoRA adds: its training pictures, their prompt, and its trigger words."""

    pictures: str | None = Field(default=None, description="folder of the pictures that the LoRA was trained on")
    prompt: str = Field(min_length=1, description="prompt of these pictures, such as 'a photo of sks dog'")
    trigger: str | None = Field(default=None, description="the LoRA's trigger words, such as 'sks dog'")
    kind: ElementKind = Field(default="object", description="object, character, clothing, style or background")


class PicturesConfig(Section):
    """The pictures from which `train-lora` learns one subject or style."""

    instance_dir: str = Field(min_length=1, description="images: folder of pictures of the subject")
    instance_prompt: str | None = Field(
        default=None,
        min_length=1,
        description="images: prompt with a rare token; not needed for pictures that the folder's prompts.json names",
    )
    class_dir: str | None = Field(
        default=None,
        description="images: folder of class pictures; missing ones are drawn; by default in the output folder",
    )
    class_prompt: str | None = Field(default=None, description="images: class prompt; enables prior preservation")
    class_pictures: int = Field(default=50, ge=1, description="images: number of pictures of the class")
    prior_weight: float = Field(
        default=1.0, ge=0.0, allow_inf_nan=False, description="images: weight of the prior preservation loss"
    )
    resolution: Side | None = Field(default=None, ge=8, description="images: size in pixels; by default the base's own")
    crop: Literal["center", "random"] = Field(default="center", description="images: crop of non-square pictures")
    flip: bool = Field(default=False, description="images: mirror pictures at random")
    prompt_dropout: float = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="images: fraction of the training pictures with an empty prompt, for classifier-free guidance",
    )
    text_encoder: bool = Field(default=False, description="images: adapt the text encoder(s) too")
    clip_skip: int | None = Field(
        default=None,
        ge=1,
        description="images: last layers of the text encoder(s) to skip, as in diffusers; draw with the same number",
    )
    gradient_checkpointing: bool = Field(default=False, description="images: save memory at the cost of slower steps")
    kind: ElementKind = Field(default="object", description="images: what the LoRA adds; some methods use it")
    trigger: str | None = Field(default=None, description="images: trigger words; by default taken from the prompt")


class ObjectiveConfig(Section):
    """The loss of the gates of a diffusion model: a weighted sum of terms."""

    denoise: float = Field(
        default=1.0, ge=0.0, allow_inf_nan=False, description="images: weight of the diffusion loss on concept pictures"
    )
    collage: float = Field(
        default=0.0,
        ge=0.0,
        le=1.0,
        description="images: fraction of the training pictures that are collages of several concepts",
    )
    clip: float = Field(
        default=0.0,
        ge=0.0,
        allow_inf_nan=False,
        description="images: weight of the CLIP loss on pictures drawn from prompts that name several concepts",
    )
    clip_local: float = Field(
        default=0.0,
        ge=0.0,
        allow_inf_nan=False,
        description="images: weight of the local CLIP loss: each concept of the prompt must appear in some crop",
    )
    clip_steps: int = Field(
        default=4, ge=1, description="denoising steps to draw such a picture; the gradient is taken at a random one"
    )
    prompts: tuple[str, ...] = Field(
        default=(), description="prompts of the CLIP losses; by default every two and three concepts joined"
    )
    guide: ClipConfig = Field(default_factory=ClipConfig, description="the CLIP model of the CLIP losses")
    gradient_checkpointing: bool = Field(default=False, description="images: save memory at the cost of slower steps")
