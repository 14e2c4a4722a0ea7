"""Which matrices of a LoRA a base has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from molecli.errors import MismatchError
from molecli.files.adapters.info import AdapterInfo

Shape = tuple[int, int]


@dataclass(frozen=True)
class Coverage:
    """Matrix names: those that fit the base, those it does not have, those it has in another shape (LoRA's, base's)."""

    matched: tuple[str, ...]
    unmatched: tuple[str, ...]
    wrong_shape: dict[str, tuple[Shape, Shape]]


def coverage(info: AdapterInfo, matrices: Mapping[str, Shape]) -> Coverage:
    """How the LoRA `info` covers a base whose adaptable matrices are `matrices`: name -> (d_out, d_in)."""
    known = {name: shape for name, shape in info.matrices.items() if name in matrices}
    return Coverage(
        matched=tuple(name for name, shape in known.items() if shape == tuple(matrices[name])),
        unmatched=tuple(name for name in info.matrices if name not in matrices),
        wrong_shape={n: (shape, matrices[n]) for n, shape in known.items() if shape != tuple(matrices[n])},
    )


def check_coverage(info: AdapterInfo, matrices: Mapping[str, Shape], *, allow_partial: bool = False) -> Coverage:
    """The coverage of a LoRA that belongs to the base. Raises: MismatchError for one that does not.

    `allow_partial` forgives missing matrices, never a wrong shape and never none at all.
    """
    found = coverage(info, matrices)
    total = len(info.matrices)
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
    return f"{shape[0]}x{shape[1]}"


def _remedy(info: AdapterInfo) -> str:
    named = f" (it names {info.base_model})" if info.base_model else ""
    return f"Name the base it was trained on with --base{named}."
