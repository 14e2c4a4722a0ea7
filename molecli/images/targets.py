"""The matrices of a diffusion base that a new LoRA adapts.

Contents: picture_targets, by_component.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from molecli.errors import UsageError
from molecli.training.adapter import ALL_LINEAR, target_matrices

ATTENTION, CONV = "attention", "conv"
# The matrices of the UNet and of a CLIP text encoder that diffusers' own DreamBooth training adapts.
_ATTENTION_NAMES = {
    "unet": ("to_q", "to_k", "to_v", "to_out.0"),
    "text_encoder": ("q_proj", "k_proj", "v_proj", "out_proj"),
}
_PLAIN_NAMES = re.compile(r"[\w.,\s-]+")
Shapes = Mapping[str, tuple[int, ...]]


def picture_targets(targets: str | Sequence[str], shapes: Shapes, *, text_encoder: bool) -> list[str]:
    """The full names of the matrices that `targets` selects, in the order of `shapes`.

    `attention`, `conv` and `all-linear` can be used besides names; everything else is read by `target_matrices`. Text
    encoders' matrices are included only with `text_encoder`. Raises: UsageError for a target that selects no matrix.
    """
    offered = {name: shape for name, shape in shapes.items() if text_encoder or _component(name) == "unet"}
    if isinstance(targets, str) and not _PLAIN_NAMES.fullmatch(targets):
        parts: Sequence[str] = [targets]
    else:
        parts = [part.strip() for part in targets.split(",")] if isinstance(targets, str) else targets
    chosen: set[str] = set()
    for part in parts:
        chosen.update(_meant(part, offered, shapes))
    return [name for name in offered if name in chosen]


def by_component(names: Collection[str]) -> dict[str, int]:
    """{component: its number of matrices among `names`}, such as {"unet": 128, "text_encoder": 48}."""
    return dict(Counter(_component(name) for name in names))


def _meant(target: str, offered: Shapes, shapes: Shapes) -> Collection[str]:
    if target == ATTENTION:
        return _attention(offered)
    if target == ALL_LINEAR:
        return [name for name, shape in offered.items() if len(shape) == 2]
    if target == CONV:
        found = [name for name, shape in offered.items() if len(shape) == 4]
        return _nonempty(found, "this base has no convolution")
    try:
        return target_matrices(target, offered)
    except UsageError as error:
        if len(offered) == len(shapes) or not _is_known(target, shapes):
            raise
        what = f"{target!r} is only in the text encoder, which is not adapted"
        raise UsageError(error.where, what, "Write --text-encoder to adapt it.") from None


def _attention(offered: Shapes) -> Collection[str]:
    def belongs(name: str) -> bool:
        endings = _ATTENTION_NAMES["unet" if _component(name) == "unet" else "text_encoder"]
        return len(offered[name]) == 2 and name.endswith(tuple(f".{ending}" for ending in endings))

    return _nonempty([name for name in offered if belongs(name)], "this base has no attention layer")


def _nonempty(found: list[str], what: str) -> list[str]:
    if not found:
        raise UsageError("adapter.targets", what, "Write all-linear, or names of matrices of the base.")
    return found


def _is_known(target: str, shapes: Shapes) -> bool:
    try:
        return bool(target_matrices(target, shapes))
    except UsageError:
        return False


def _component(name: str) -> str:
    return name.partition(".")[0]
