"""What an evaluation reports, and which LoRAs and fixed modes it is about where the recipe leaves that open.

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
    """The content of results.json, with the tables that show it and what is said below them."""

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
        """The report as JSON would hold it."""
        return dict(self)

    def show(self) -> None:
        """Draws the tables on stdout, and what is said below them."""
        draw((self.table, *self.more), self.comparisons)


OWN_LORA = "own LoRA"


def usual_modes(
    modes: Sequence[str], loras: Sequence[LoraLike], compositions: Mapping[str, Composition]
) -> Sequence[str]:
    """`modes`, which compose `loras`; the base alone without any, and with a warning where some are missing."""
    gone = missing(loras, compositions.values())
    if gone:
        what = f"not all LoRAs are there (no {', no '.join(gone)}): of the fixed methods the base alone is scored"
        warnings.warn(what, stacklevel=2)
    return modes if loras and not gone else (BASE,)


def missing(loras: Iterable[LoraLike], compositions: Iterable[Composition]) -> list[str]:
    """The names of those LoRAs that are not to be found, and that merged compositions can do without."""
    gone = {(record.name, record.source) for composition in compositions for record in not_found(composition)}
    return [lora.name for lora in loras if (lora.name, lora.source) in gone]


def recorded_loras(compositions: Iterable[Composition]) -> list[LoraLike]:
    """The LoRAs that the compositions remember; of two that share a name the first."""
    sources: dict[str, str] = {}
    for composition in compositions:
        for expert in composition.experts:
            sources.setdefault(expert.name, expert.source)
    return [LoraSpec(name, source) for name, source in sources.items()]
