"""The report of an evaluation, and the LoRAs and fixed modes that it uses if the recipe names none.

Contents: EvaluationReport, usual_modes, missing, recorded_loras.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from molecli.adapters import LoraLike, LoraSpec
from molecli.catalog.methods import BASE
from molecli.evaluation.tables import ScoreTable, draw
from molecli.files.composition import Composition
from molecli.mixture.attach import not_found


class EvaluationReport(dict[str, Any]):
    """The content of results.json, with the tables that show it and the lines below them."""

    def __init__(
        self,
        content: Mapping[str, Any],
        table: ScoreTable,
        comparisons: Sequence[str] = (),
        more: Sequence[ScoreTable] = (),
    ) -> None:
        super().__init__(content)
        self.table, self.comparisons, self.more = table, tuple(comparisons), tuple(more)

    def document(self) -> dict[str, Any]:
        """The report as JSON stores it."""
        return dict(self)

    def show(self) -> None:
        """Draws the tables on stdout, and the lines below them."""
        draw((self.table, *self.more), self.comparisons)


def usual_modes(
    modes: Sequence[str], loras: Sequence[LoraLike], compositions: Mapping[str, Composition]
) -> Sequence[str]:
    """`modes`, or only the base if there are no `loras`, or (with a warning) if some of them are missing."""
    gone = missing(loras, compositions.values())
    if gone:
        what = f"some LoRAs are missing ({', '.join(gone)}): of the fixed methods, only the base is scored"
        warnings.warn(what, stacklevel=2)
    return modes if loras and not gone else (BASE,)


def missing(loras: Iterable[LoraLike], compositions: Iterable[Composition]) -> list[str]:
    """The names of the LoRAs that cannot be found. Only merged compositions work without theirs."""
    gone = {(record.name, record.source) for composition in compositions for record in not_found(composition)}
    return [lora.name for lora in loras if (lora.name, lora.source) in gone]


def recorded_loras(compositions: Iterable[Composition]) -> list[LoraLike]:
    """The LoRAs that the compositions record; if two have the same name, the first of them."""
    sources: dict[str, str] = {}
    for composition in compositions:
        for expert in composition.experts:
            sources.setdefault(expert.name, expert.source)
    return [LoraSpec(name, source) for name, source in sources.items()]
