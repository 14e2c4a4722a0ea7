"""Which matrices of a LoRA a base has."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from molecli.adapters.info import AdapterInfo
from molecli.adapters.keys import component_of
from molecli.adapters.place import components_in, place
from molecli.adapters.weights import Shape
from molecli.errors import MismatchError


@dataclass(frozen=True)
class Coverage:
    """Matrix names: those that fit the base, those it does not have, those it has in another shape (LoRA's, base's).

    `info` is the LoRA under the base's names: what `matched` names is to be looked up there.
    """

    info: AdapterInfo
    matched: tuple[str, ...]
    unmatched: tuple[str, ...]
    wrong_shape: dict[str, tuple[Shape, Shape]]

    @property
    def components(self) -> dict[str, tuple[int, int]]:
        """component of a pipeline -> (matrices that fit, matrices in the LoRA); "" is a language model's."""
        total = Counter(map(component_of, self.info.adapted))
        matched = Counter(map(component_of, self.matched))
        return {component: (matched[component], count) for component, count in total.items()}


def coverage(info: AdapterInfo, matrices: Mapping[str, Shape]) -> Coverage:
    """How the LoRA `info` covers a base whose adaptable matrices are `matrices`: name -> shape.

    Raises: MismatchError as `place` does.
    """
    info = place(info, matrices)
    known = {name: shape for name, shape in info.matrices.items() if name in matrices}
    return Coverage(
        info=info,
        matched=tuple(name for name, shape in known.items() if shape == tuple(matrices[name])),
        unmatched=tuple(name for name in info.matrices if name not in matrices),
        wrong_shape={n: (shape, tuple(matrices[n])) for n, shape in known.items() if shape != tuple(matrices[n])},
    )


def check_coverage(info: AdapterInfo, matrices: Mapping[str, Shape], *, allow_partial: bool = False) -> Coverage:
    """The coverage of a LoRA that belongs to the base. Raises: MismatchError for one that does not.

    `allow_partial` forgives missing matrices, never a wrong shape and never none at all.
    """
    found = coverage(info, matrices)
    total = len(info.adapted)
    foreign = foreign_architecture(found.info.matrices, matrices)
    if foreign is not None:
        raise MismatchError(info.where, foreign, _remedy(info))
    if found.wrong_shape:
        name, (there, here) = next(iter(found.wrong_shape.items()))
        what = f"made for another base: {name!r} is {_times(there)} in the LoRA and {_times(here)} in this base"
        raise MismatchError(info.where, what, _remedy(info))
    if not found.matched:
        what = f"made for another base: none of its {total} matrices is in this one, such as {found.unmatched[0]!r}"
        raise MismatchError(info.where, what, _remedy(info))
    if found.unmatched and not allow_partial:
        what = f"{len(found.unmatched)} of its {total} matrices are not in this base, such as {found.unmatched[0]!r}"
        raise MismatchError(info.where, what, "Pass --allow-partial to leave them out.")
    return found


def _times(shape: Shape) -> str:
    return "x".join(map(str, shape))


def _remedy(info: AdapterInfo) -> str:
    named = f" (it names {info.base_model})" if info.base_model else ""
    return f"Name the base it was trained on with --base{named}."


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
