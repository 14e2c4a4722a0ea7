"""Which matrices of a LoRA a base has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from molecli.errors import MismatchError
from molecli.files.adapters.architecture import foreign_architecture
from molecli.files.adapters.info import AdapterInfo
from molecli.files.adapters.keys import component_of
from molecli.files.adapters.place import place
from molecli.files.adapters.weights import Shape


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
