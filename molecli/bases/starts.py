"""Drawing that begins with a picture, whole (img2img) or inside a mask (inpainting): diffusers' pipelines of a base.

Contents: Start, fitted, start_pipeline, start_inputs, check_strength.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
from PIL import Image

from molecli.catalog.builtin import DEFAULT_STRENGTH
from molecli.errors import UsageError

# Sides of pictures are multiples of this.
_UNIT = 8
_SAME: dict[str, dict[str, Any]] = {
    "StableDiffusion": {"requires_safety_checker": False},
    "StableDiffusionXL": {"add_watermarker": False},
}


@dataclass(frozen=True)
class Start:
    """An RGB picture to begin with, and where it is drawn anew: the white part of `mask`, of the same size.

    strength: the share of the steps that are run from it, in (0, 1].
    """

    picture: Image.Image
    mask: Image.Image | None = None
    strength: float = DEFAULT_STRENGTH


def fitted(
    picture: Image.Image,
    mask: Image.Image | None,
    *,
    width: int | None = None,
    height: int | None = None,
    strength: float = DEFAULT_STRENGTH,
) -> tuple[Start, list[str]]:
    """(the start in the size to draw, what was resized): by default the picture's own size, down to multiples of 8.

    Raises: UsageError for a picture that is too small.
    """
    size = (width or picture.width // _UNIT * _UNIT, height or picture.height // _UNIT * _UNIT)
    if 0 in size:
        what = f"it has {picture.width} x {picture.height} pixels, and at least {_UNIT} x {_UNIT} are needed"
        raise UsageError("--init-image", what, "Write a larger picture, or --width and --height.")
    said = []
    if picture.size != size:
        said.append(f"the picture is resized from {_pixels(picture.size)} to {_pixels(size)} pixels")
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    if mask is not None and mask.size != size:
        said.append(f"the mask is resized from {_pixels(mask.size)} to {_pixels(size)} pixels")
        mask = mask.resize(size, Image.Resampling.NEAREST)
    return Start(picture.convert("RGB"), None if mask is None else mask.convert("L"), strength), said


def start_pipeline(pipe: Any, start: Sequence[Start]) -> Any:
    """diffusers' pipeline of the same parts as `pipe` that begins with such pictures.

    Raises: UsageError for a pipeline of another kind, and for starts of which only some have a mask.
    """
    masked = {one.mask is not None for one in start}
    kinds = {(one.mask is not None, one.strength, one.picture.size) for one in start}
    if len(kinds) > 1:
        what = "the starts differ in their size, strength or in having a mask"
        raise UsageError("generate", what, "Draw them in several calls.")
    family = type(pipe).__name__.removesuffix("Pipeline")
    if family not in _SAME:
        what = f"a {type(pipe).__name__} cannot begin with a picture"
        raise UsageError("--init-image", what, f"Use a base of {' or '.join(_SAME)}.")
    kind = getattr(diffusers, f"{family}{'Inpaint' if masked == {True} else 'Img2Img'}Pipeline")
    settings = dict(_SAME[family])
    if "force_zeros_for_empty_prompt" in pipe.config:
        settings["force_zeros_for_empty_prompt"] = pipe.config.force_zeros_for_empty_prompt
    made = kind(**{name: part for name, part in pipe.components.items() if name in _parts(kind)}, **settings)
    made.set_progress_bar_config(disable=True)
    return made


def start_inputs(start: Sequence[Start], steps: int) -> dict[str, Any]:
    """The keywords of that pipeline's call. Raises: UsageError as `check_strength` does."""
    check_strength(start[0].strength, steps)
    inputs: dict[str, Any] = {"image": [one.picture for one in start], "strength": start[0].strength}
    if start[0].mask is not None:
        # Without the size, diffusers draws masked pictures in the base's own one.
        width, height = start[0].picture.size
        inputs |= {"mask_image": [one.mask for one in start], "width": width, "height": height}
    return inputs


def check_strength(strength: float, steps: int) -> None:
    """Raises: UsageError if `strength` is not in (0, 1] or so small that no step would be run."""
    if not 0 < strength <= 1:
        raise UsageError(f"--strength {strength:g}", "it is not above 0 and at most 1", "Write for example 0.7.")
    if int(steps * strength) < 1:
        what = f"of {steps} steps none would be run"
        raise UsageError(f"--strength {strength:g}", what, f"Write at least {1 / steps:.2g}, or more --denoise-steps.")


def _parts(kind: Any) -> set[str]:
    return set(inspect.signature(kind.__init__).parameters)


def _pixels(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
