"""Compares the matrices of a LoRA with those of a base."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from molecli.adapters.factors import share
from molecli.adapters.families import family_in
from molecli.adapters.info import AdapterInfo
from molecli.adapters.keys import component_of
from molecli.adapters.module_names import same_layer
from molecli.adapters.place import components_in, place
from molecli.adapters.tables import base_tables, grown
from molecli.adapters.weights import Shape
from molecli.errors import MismatchError
from molecli.protocols import Matrices

# A LoRA is never used without more than this share of its weights.
MAIN_PART = 0.5


@dataclass(frozen=True)
class Coverage:
    """Names of the matrices that fit the base, that the base lacks, or whose shape differs (LoRA's, base's).

    `info` is the LoRA with the base's names, as in `matched`; `left_out` the share of its weights in the unmatched.
    """

    info: AdapterInfo
    matched: tuple[str, ...]
    unmatched: tuple[str, ...]
    wrong_shape: dict[str, tuple[Shape, Shape]]
    left_out: float = 0.0

    @property
    def components(self) -> dict[str, tuple[int, int]]:
        """component of a pipeline, or "" for a language model -> (matrices that fit, matrices in the LoRA)."""
        total = Counter(map(component_of, self.info.adapted))
        matched = Counter(map(component_of, self.matched))
        return {component: (matched[component], count) for component, count in total.items()}


def coverage(info: AdapterInfo, matrices: Mapping[str, Shape]) -> Coverage:
    """How the LoRA `info` covers a base whose adaptable matrices are `matrices`: name -> shape.

    Raises: MismatchError as `place` does.
    """
    base = Matrices.of(matrices)
    info, here = place(info, base), base.named
    known = {name: shape for name, shape in info.matrices.items() if name in here}
    return Coverage(
        info=info,
        matched=tuple(name for name, shape in known.items() if shape == tuple(here[name])),
        unmatched=tuple(name for name in info.matrices if name not in here),
        wrong_shape={n: (shape, tuple(here[n])) for n, shape in known.items() if shape != tuple(here[n])},
    )


def check_coverage(info: AdapterInfo, matrices: Mapping[str, Shape], *, allow_partial: bool = False) -> Coverage:
    """The coverage of a LoRA that fits the base.

    With `allow_partial` some matrices may be missing in the base, but not most of the LoRA's weights, and shapes must
    agree. Raises: MismatchError if it does not fit; UsageError if its vocabulary is not the base's.
    """
    base = Matrices.of(matrices)
    found = coverage(info, base)
    check_base(found, base)
    if not found.unmatched:
        return found
    total = len(info.adapted)
    found = replace(found, left_out=share(found.info, found.unmatched))
    what = f"{len(found.unmatched)} of its {total} matrices are not in this base, such as {found.unmatched[0]!r}"
    what += f": {found.left_out:.1%} of its weights"
    if found.left_out > MAIN_PART:
        raise MismatchError(info.where, what, other_base(info.base_model))
    if not allow_partial:
        raise MismatchError(info.where, what, _renaming(found, base) or "Pass --allow-partial to leave them out.")
    return found


def check_base(found: Coverage, matrices: Mapping[str, Shape]) -> None:
    """Checks that a LoRA was made for a base like the one it covers. Raises: MismatchError that says for which."""
    info, base = found.info, Matrices.of(matrices)
    foreign = foreign_architecture(info.matrices, base)
    if foreign is not None:
        raise MismatchError(info.where, foreign, other_base(info.base_model))
    base_tables(info, base)
    for name, (there, here) in found.wrong_shape.items():
        if name in base.head and there[1:] == here[1:]:
            raise grown(info, name, there[0], here[0])
        what = f"it was made for another base: {name!r} is {_times(there)} in the LoRA and {_times(here)} in this base"
        raise MismatchError(info.where, what, other_base(info.base_model))
    if not found.matched:
        total, first = len(found.unmatched), found.unmatched[0]
        what = f"it was made for another base: this one lacks all its {total} matrices, such as {first!r}"
        raise MismatchError(info.where, what, other_base(info.base_model))


def _times(shape: Shape) -> str:
    return "x".join(map(str, shape))


def _renaming(found: Coverage, base: Matrices) -> str:
    """What to do where a language model's LoRA has matrices that the base has under another prefix; "" if none."""
    names = () if components_in(base) else found.unmatched
    alike = next(((name, twin) for name in names if (twin := same_layer(name, base))), None)
    return f"Rename its modules to those of the base, such as {alike[0]!r} to {alike[1]!r}." if alike else ""


def other_base(named: str | None) -> str:
    """What to do about a LoRA of another base; `named` is the one that its file names."""
    named = f" (it names {named})" if named else ""
    return f"Name the base it was trained on with --base{named}."


# Width of the text embeddings that the UNet's cross-attention reads -> published family.
_FAMILIES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 1280: "the SDXL refiner", 2048: "SDXL"}
# What names of a pipeline's modules begin with, if they name no component; no language model has such modules.
_PIPELINE_STARTS = ("diffusion_model.", "lora_transformer_", "down_blocks.", "mid_block.", "up_blocks.")
_CROSS_ATTENTION = re.compile(r"attn2[._]to_[kv]$")
_CLIP_INPUT = re.compile(r"(self_attn[._][qkv]_proj|mlp[._]fc1)$")


def foreign_architecture(lora: Mapping[str, Shape], base: Mapping[str, Shape]) -> str | None:
    """Why a LoRA with the matrices `lora` cannot fit a base with the matrices `base`; None if widths and parts agree.

    Both map names to shapes; the LoRA's matrices have the base's names where these are known.
    """
    here = components_in(base)
    if not here:
        drawn = components_in(lora) or any(name.startswith(_PIPELINE_STARTS) for name in lora)
        return "it was made for a diffusion pipeline, and this base is a language model" if drawn else None
    if family := family_in(name for name in lora if name not in base):
        return f"it was made for {family}, and this base is {_family(base)}"
    if "text_encoder_2" in components_in(lora) and "text_encoder_2" not in here:
        return f"it was made for SDXL (it adapts a second text encoder), and this base is {_family(base)}"
    there, width = _width(lora, _CROSS_ATTENTION, "unet"), _width(base, _CROSS_ATTENTION, "unet")
    if there and width and there != width:
        what = f"it was made for {_family(lora)}: its UNet reads text embeddings of width {there}, this base's {width}"
        return what + (f" ({_FAMILIES[width]})" if width in _FAMILIES else "")
    for component in here:
        there, width = _width(lora, _CLIP_INPUT, component), _width(base, _CLIP_INPUT, component)
        if component != "unet" and there and width and there != width:
            return f"its {component} part was made for an encoder of width {there}, and this base's has width {width}"
    return None


def _family(matrices: Mapping[str, Shape]) -> str:
    """The published family of the matrices, else "another UNet" or "another pipeline"."""
    width = _width(matrices, _CROSS_ATTENTION, "unet")
    if "text_encoder_2" in components_in(matrices):
        return "SDXL"
    return _FAMILIES.get(width, "another UNet") if width else "another pipeline"


def _width(matrices: Mapping[str, Shape], pattern: re.Pattern[str], component: str) -> int | None:
    """d_in of the component's first matrix that matches `pattern`."""
    found = (shape for name, shape in _of(matrices.items(), component) if pattern.search(name))
    return next((shape[1] for shape in found if len(shape) > 1), None)


def _of(items: Iterable[tuple[str, Shape]], component: str) -> Iterable[tuple[str, Shape]]:
    return (item for item in items if component_of(item[0]) in (component, ""))
