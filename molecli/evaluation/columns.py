"""The columns of an evaluation: the base, each LoRA alone, fixed mixtures and compositions, each attached in turn.

Everything is built and checked before the first method is scored, so that a mismatch is reported at once.
Contents: Column, fixed_columns, composed_columns, distinct, folder_names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from molecli.adapters import LoraLike
from molecli.catalog.methods import ALONE, BASE, check_runs_on, shown_beside
from molecli.config import MethodConfig, Switched
from molecli.errors import UsageError
from molecli.experts import Expert
from molecli.files.composition import Composition
from molecli.files.unique_names import numbered
from molecli.mixture.attach import attach_composition
from molecli.mixture.build import build_mixture, sum_of
from molecli.mixture.mixture import Mixture, switch

ALL_ON = (Switched(),)


@dataclass(frozen=True)
class Column:
    """A column of the table: its name, and the context in which the model is scored. `single`: it is one LoRA alone."""

    name: str
    context: AbstractContextManager[Any]
    single: bool = False


@dataclass(frozen=True)
class _Switching(AbstractContextManager[Mixture]):
    """A mixture with some LoRAs off while it is attached. The columns of several choices share one mixture."""

    mixture: Mixture
    choice: Switched

    def __enter__(self) -> Mixture:
        switch(self.mixture, mask=self.choice.mask, only=self.choice.only)
        return self.mixture.__enter__()

    def __exit__(self, *error: object) -> None:
        self.mixture.__exit__(*error)


def fixed_columns(
    model: nn.Module,
    experts: Sequence[Expert],
    *,
    modes: Sequence[str] | None = None,
    weights: Mapping[str, float] | None = None,
    method: MethodConfig | None = None,
    switched: Sequence[Switched] = ALL_ON,
) -> list[Column]:
    """The columns of `modes`, which need no training; by default the usual ones.

    Each mixture of LoRAs has one column for every choice in `switched`. Raises: UsageError if a mode needs LoRAs and
    there are none.
    """
    columns = []
    for mode in shown_beside("texts") if modes is None else modes:
        if mode != BASE and not experts:
            raise UsageError("--modes", f"{mode!r} needs LoRAs, but none are named", "Write --loras a=PATH,b=PATH.")
        if mode == BASE:
            columns.append(Column(BASE, nullcontext()))
        elif mode == ALONE:
            for expert in experts:
                # Eq. 1 for one LoRA with weight 1: the LoRA as it was trained.
                columns.append(Column(expert.name, sum_of(model, [expert]), single=True))
        else:
            check_runs_on(mode, "texts", "--modes")
            mixture = build_mixture(model, experts, mode=mode, weights=weights, method=method)
            columns += _switched(mode, mixture, switched)
    return columns


def composed_columns(
    model: nn.Module,
    compositions: Mapping[str, Composition],
    *,
    loras: Sequence[LoraLike] = (),
    experts: Sequence[Expert] = (),
    switched: Sequence[Switched] = ALL_ON,
) -> list[Column]:
    """One column for each composition and choice in `switched`; `experts` that are given are not read again.

    Raises: UsageError for a choice that names an unknown LoRA; MismatchError if a composition does not belong to this
    model or these LoRAs.
    """
    read = {(expert.name, expert.source): expert for expert in experts}
    columns = []
    for name, composition in compositions.items():
        own = [read.get((record.name, record.source)) for record in composition.experts]
        known = [expert for expert in own if expert is not None]
        given = known if not loras and len(known) == len(own) else None
        mixture = attach_composition(model, composition, loras=list(loras) or None, experts=given)
        columns += _switched(name, mixture, switched)
    return columns


def distinct(methods: Iterable[Column]) -> dict[str, Column]:
    """The columns by name; a name that is already taken gets a number."""
    listed = list(methods)
    return dict(zip(numbered(column.name for column in listed), listed, strict=True))


def folder_names(paths: Sequence[str]) -> dict[str, str]:
    """Name -> path: a composition has its folder's name, or its whole path if two folders have the same name."""
    names = [_folder_name(path) for path in paths]
    return {name if names.count(name) == 1 else path: path for name, path in zip(names, paths, strict=True)}


def _switched(name: str, mixture: Mixture, switched: Sequence[Switched]) -> list[Column]:
    for choice in switched:  # report a name that no LoRA has before anything is scored
        switch(mixture, mask=choice.mask, only=choice.only)
    return [Column(name + choice.label, _Switching(mixture, choice)) for choice in switched]


def _folder_name(path: str) -> str:
    place = Path(path).resolve()
    return place.parent.name if place.name == "composition.safetensors" else place.stem
