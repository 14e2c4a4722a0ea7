"""What a LoRA was made for, told by its own shapes, in words for the one who picked the wrong one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from molecli.files.adapters.keys import component_of
from molecli.files.adapters.place import components_in
from molecli.files.adapters.weights import Shape

# Width of the text that the UNet's cross-attention reads: the published families that have it.
_FAMILIES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 1280: "the SDXL refiner", 2048: "SDXL"}
# A part of a module's name: the families whose models alone have it. None of them has a UNet.
_TRANSFORMERS = {"double_blocks": "FLUX", "single_transformer_blocks": "FLUX", "joint_blocks": "Stable Diffusion 3"}
_CROSS_ATTENTION = re.compile(r"attn2[._]to_[kv]$")
_CLIP_INPUT = re.compile(r"(self_attn[._][qkv]_proj|mlp[._]fc1)$")


def foreign_architecture(lora: Mapping[str, Shape], base: Mapping[str, Shape]) -> str | None:
    """Why the LoRA of these matrices cannot belong to the base of those; None where widths and parts agree.

    Both map names, the LoRA's as far as they are known under the base's, to shapes.
    """
    here = components_in(base)
    if not here:
        return "made for a diffusion pipeline, and this base is a language model" if components_in(lora) else None
    for part, family in _TRANSFORMERS.items():
        if any(part in name for name in lora):
            return f"made for {family}, and this base is {_family(base)}"
    if "text_encoder_2" in components_in(lora) and "text_encoder_2" not in here:
        return f"made for SDXL (it adapts a second text encoder), and this base is {_family(base)}"
    there, width = _width(lora, _CROSS_ATTENTION, "unet"), _width(base, _CROSS_ATTENTION, "unet")
    if there and width and there != width:
        what = f"made for {_family(lora)}: its UNet reads text {there} wide, this base's {width}"
        return what + (f" ({_FAMILIES[width]})" if width in _FAMILIES else "")
    for component in here:
        there, width = _width(lora, _CLIP_INPUT, component), _width(base, _CLIP_INPUT, component)
        if component != "unet" and there and width and there != width:
            return f"its {component} part was made for an encoder {there} wide, and this base's is {width} wide"
    return None


def _family(matrices: Mapping[str, Shape]) -> str:
    """The published family that the matrices belong to, else "another base" or the widths' own description."""
    width = _width(matrices, _CROSS_ATTENTION, "unet")
    if "text_encoder_2" in components_in(matrices):
        return "SDXL"
    return _FAMILIES.get(width, "another UNet") if width else "another pipeline"


def _width(matrices: Mapping[str, Shape], pattern: re.Pattern[str], component: str) -> int | None:
    """d_in of the first of the component's matrices that `pattern` finds."""
    return next((shape[1] for name, shape in _of(matrices.items(), component) if pattern.search(name)), None)


def _of(items: Iterable[tuple[str, Shape]], component: str) -> Iterable[tuple[str, Shape]]:
    return (item for item in items if component_of(item[0]) in (component, ""))
