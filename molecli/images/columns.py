"""The columns of a sheet or a table of pictures: the bare base, LoRAs alone, fixed mixtures, and compositions.

    ColumnBuilder   columns of a base and its LoRAs            masked          a column with some LoRAs switched off
    Column          one method over some LoRAs, ready to draw  read_concepts   what each LoRA adds

A fixed method is rebuilt for each set of LoRAs that a scene names. A composition stays as it is, and the LoRAs that a
scene does not name are masked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from molecli.adapters.source import resolve_source
from molecli.catalog.methods import BASE, get_method
from molecli.config import ConceptConfig, MethodConfig
from molecli.errors import UsageError, suggestion
from molecli.experts import Expert
from molecli.files.composition import Composition
from molecli.files.concepts import Concept, read_concept, trigger_of
from molecli.files.lora_spec import LoraLike, LoraSpec
from molecli.mixture.attach import attach_composition
from molecli.mixture.build import build_mixture, sum_of
from molecli.mixture.mixture import Mixture, switch
from molecli.protocols import Note


@dataclass(frozen=True)
class Column:
    """A method over some LoRAs: its name, its mixture (None: the bare base), the LoRAs' weights by name, and the
    settings that the method reads."""

    name: str
    mixture: Mixture | None = None
    loras: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def context(self) -> AbstractContextManager[Any]:
        """A context in which the pipeline draws with this method."""
        return nullcontext() if self.mixture is None else self.mixture

    @property
    def prepare(self) -> Note | None:
        """To be called with each prompt before its pictures; None for a method that does not read the prompt."""
        return self.mixture.prepare if getattr(self.mixture, "reads_prompt", False) else None  # type: ignore[union-attr]

    @property
    def ease(self) -> Callable[[], bool] | None:
        """Lowers the memory that a picture needs and returns whether it could; None for a method without branches."""
        return getattr(self.mixture, "ease", None)


@dataclass(frozen=True)
class ColumnBuilder:
    """Makes columns. Holds a pipeline's modules, the experts with weights and concepts, and the methods' settings."""

    model: Any
    experts: Mapping[str, Expert]
    weights: Mapping[str, float]
    concepts: Mapping[str, Concept]
    method: MethodConfig = field(default_factory=MethodConfig)
    branches_at_once: int | None = None

    def fixed(self, mode: str, names: Sequence[str]) -> Column:
        """The column of a method that learns nothing, over the LoRAs `names` in that order. Raises: UsageError."""
        if mode == BASE or not names:
            return Column(mode)
        chosen = [self._expert(name) for name in names]
        weights = {name: self.weights.get(name, 1.0) for name in names}
        method = self.method.model_copy(update={"order": tuple(name for name in self.method.order if name in names)})
        mixture = build_mixture(
            self.model,
            chosen,
            mode=mode,
            weights=weights,
            method=method,
            triggers={name: self.concepts[name].trigger for name in names if name in self.concepts},
            kinds={name: self.concepts[name].kind for name in names if name in self.concepts},
            branches_at_once=self.branches_at_once,
        )
        settings = method.model_dump(mode="json", include=set(get_method(mode).own_options))
        return Column(mode, mixture, weights, settings)

    def alone(self, name: str) -> Column:
        """The column of the LoRA `name` by itself, with its own weight."""
        weight = {name: self.weights.get(name, 1.0)}
        return Column(name, sum_of(self.model, [self._expert(name)], weight), weight)

    def composed(self, name: str, composition: Composition, loras: Sequence[LoraLike] = ()) -> Column:
        """The column of a composition, checked against the base and its LoRAs. Raises: UsageError, MismatchError."""
        known = [self.experts.get(record.name) for record in composition.experts]
        # Experts that the fixed methods have read already, if they are the same files that were composed.
        own = [e for e, r in zip(known, composition.experts, strict=True) if e is not None and e.sha256 == r.sha256]
        whole = len(own) == len(known)
        mixture = attach_composition(
            self.model, composition, loras=None if whole else list(loras) or None, experts=own if whole else None
        )
        return Column(name, mixture, recorded_weights(composition))

    def _expert(self, name: str) -> Expert:
        if name not in self.experts:
            raise UsageError(name, "no LoRA of this name is given", suggestion(name, list(self.experts)))
        return self.experts[name]


def masked(column: Column, *, mask: Sequence[str] = (), only: Sequence[str] = ()) -> Column:
    """The column with some LoRAs switched off by name. Raises: UsageError for a name that its mixture lacks."""
    if column.mixture is None or not (mask or only):
        return column
    switch(column.mixture, mask=tuple(mask), only=tuple(only))
    left = [name for name in column.loras if name not in mask and name in (only or column.loras)]
    return replace(column, loras={name: column.loras[name] for name in left})


def recorded_weights(composition: Composition) -> dict[str, float]:
    """{name: weight} of a composition's LoRAs, as given when it was made."""
    recipe = yaml.safe_load(composition.recipe)
    given = {lora["name"]: float(lora["weight"]) for lora in recipe.get("loras", [])}
    return {name: given.get(name, 1.0) for name in composition.names}


def read_concepts(loras: Sequence[LoraLike], given: Mapping[str, ConceptConfig]) -> dict[str, Concept]:
    """{name: what the LoRA adds}, from the recipe, otherwise from its concept.json; LoRAs with neither are left out.

    Raises: UsageError for a concept whose LoRA is not here; MismatchError for a damaged concept.json.
    """
    names = [lora.name for lora in loras]
    for name in given:
        if name not in names:
            raise UsageError(f"concepts.{name}", "no LoRA has this name", suggestion(name, names))
    found = {}
    for lora in loras:
        concept = _as_given(lora.name, given[lora.name]) if lora.name in given else read_concept(_place(lora))
        if concept is not None:
            found[lora.name] = concept
    return found


def _as_given(name: str, config: ConceptConfig) -> Concept:
    return Concept(name, config.prompt, config.trigger or trigger_of([config.prompt]), config.kind, config.pictures)


def _place(lora: LoraLike) -> Path:
    return resolve_source(LoraSpec(lora.name, lora.source))
