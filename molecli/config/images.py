"""The sections of a recipe that only a diffusion base reads. A field holds its default and its help text.

Contents: ImageConfig, ConceptConfig, PicturesConfig, ObjectiveConfig.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from molecli.catalog.builtin import BUILTIN_IMAGE_GUIDANCE, DEFAULT_GUIDANCE
from molecli.config.sections import ClipConfig, Section
from molecli.errors import suggestion
from molecli.protocols import ElementKind

SCHEDULER_NAMES = (
    "ddim",
    "ddpm",
    "pndm",
    "euler",
    "euler_a",
    "heun",
    "lms",
    "dpmsolver++",
    "dpmsolver++_karras",
    "unipc",
)


def known_scheduler(name: str) -> str:
    """`name`, if it is a scheduler. Raises: an error that names the nearest."""
    if name not in SCHEDULER_NAMES:
        remedy = suggestion(name, SCHEDULER_NAMES)
        raise PydanticCustomError("unknown_name", "is no scheduler", {"remedy": remedy})
    return name


def multiple_of_8(pixels: int) -> int:
    """`pixels`, if every pipeline takes it as a side. Raises: an error that names the nearest that it takes."""
    if pixels % 8:
        below = pixels // 8 * 8
        remedy = f"Write {below} or {below + 8}."
        raise PydanticCustomError("unknown_name", "is not a multiple of 8", {"remedy": remedy})
    return pixels


Scheduler = Annotated[str, AfterValidator(known_scheduler)]
Side = Annotated[int, AfterValidator(multiple_of_8)]


class ImageConfig(Section):
    """How pictures are denoised."""

    steps: int = Field(default=25, ge=1, description="denoising steps")
    guidance: float | None = Field(
        default=None,
        ge=0.0,
        allow_inf_nan=False,
        description=f"classifier-free guidance scale; by default {DEFAULT_GUIDANCE:g}, of the embedded base "
        f"{BUILTIN_IMAGE_GUIDANCE:g}",
    )
    scheduler: Scheduler | None = Field(
        default=None, description="ddim, dpmsolver++, euler, ...; the base's own when not given"
    )
    negative_prompt: str = Field(default="", description="what the unconditional half is given instead of nothing")
    width: Side | None = Field(default=None, ge=8, description="pixels; the base's own when not given")
    height: Side | None = Field(default=None, ge=8, description="pixels; the base's own when not given")
    branches_at_once: int | None = Field(
        default=None, ge=1, description="composite and its kin: LoRAs in one UNet call; fewer need less memory"
    )
    replay: bool = Field(
        default=True, description="on CUDA, record a UNet call and replay it; without, less memory and more time"
    )


class ConceptConfig(Section):
    """What a LoRA adds: its pictures, the prompt they are drawn by, and the words that call it."""

    pictures: str | None = Field(default=None, description="folder of the pictures it was trained on")
    prompt: str = Field(min_length=1, description="the prompt of its pictures, such as 'a photo of sks dog'")
    trigger: str | None = Field(default=None, description="the words that call it, such as 'sks dog'")
    kind: ElementKind = Field(default="object", description="object, character, clothing, style or background")


class PicturesConfig(Section):
    """The pictures that `train-lora` learns one subject or style from."""

    instance_dir: str = Field(min_length=1, description="folder of pictures of the subject")
    instance_prompt: str | None = Field(
        default=None,
        min_length=1,
        description="prompt with a rare token; not needed for pictures that prompts.json in the folder names",
    )
    class_dir: str | None = Field(
        default=None,
        description="folder of pictures of the class, filled up with drawn ones; class_pictures in the output folder "
        "when not given",
    )
    class_prompt: str | None = Field(default=None, description="prompt of the class: turns prior preservation on")
    class_pictures: int = Field(default=50, ge=1, description="pictures of the class to have")
    prior_weight: float = Field(default=1.0, ge=0.0, allow_inf_nan=False, description="weight of the class's loss")
    resolution: Side | None = Field(default=None, ge=8, description="pixels; the base's own when not given")
    crop: Literal["center", "random"] = Field(default="center", description="what is kept of a picture not square")
    flip: bool = Field(default=False, description="mirror pictures at random")
    prompt_dropout: float = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="share of the pictures learned without their prompt, which guidance is measured from",
    )
    text_encoder: bool = Field(default=False, description="adapt the text encoder(s) too")
    gradient_checkpointing: bool = Field(default=False, description="less memory for a slower step")
    kind: ElementKind = Field(default="object", description="what the LoRA adds, for the methods that ask")
    trigger: str | None = Field(default=None, description="the words that call it; by default the prompt's own")


class ObjectiveConfig(Section):
    """What the gates of a diffusion model learn from; several terms are added with their weights."""

    denoise: float = Field(
        default=1.0, ge=0.0, allow_inf_nan=False, description="weight of the diffusion loss on the concepts' pictures"
    )
    collage: float = Field(
        default=0.0,
        ge=0.0,
        le=1.0,
        description="share of those pictures that several concepts' pictures are put together in, under a prompt that "
        "names them all",
    )
    clip: float = Field(
        default=0.0,
        ge=0.0,
        allow_inf_nan=False,
        description="weight of the CLIP loss on pictures drawn of prompts that name several concepts",
    )
    clip_local: float = Field(
        default=0.0,
        ge=0.0,
        allow_inf_nan=False,
        description="weight of the local CLIP loss: each concept of the prompt in some crop of the picture",
    )
    clip_steps: int = Field(
        default=4, ge=1, description="denoising steps from noise to such a picture; one of them, at random, teaches"
    )
    prompts: tuple[str, ...] = Field(
        default=(), description="prompts of the CLIP losses; when not given, every two and three concepts joined"
    )
    guide: ClipConfig = Field(default_factory=ClipConfig, description="the CLIP that guides")
    gradient_checkpointing: bool = Field(default=False, description="less memory for a slower step")
