"""What an evaluation of pictures compares: the base, LoRAs alone, fixed mixtures and compositions, scene by scene.

SceneColumn     one column of the table: what draws a scene, and a seal of all that its pictures follow from
scene_columns   the columns of a recipe, built and checked before the first picture is drawn
left_alone      the LoRAs that draw alone
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from molecli.catalog.methods import ALONE, BASE
from molecli.errors import UsageError
from molecli.files.composition import Composition
from molecli.files.unique_names import numbered
from molecli.images.columns import Column, Studio, masked
from molecli.images.scenes import SceneBench
from molecli.mixture.mixture import switch
from molecli.protocols import Scene

Loras = tuple[str, ...]
# What stands behind the methods' names -> the LoRAs that are switched off in every scene.
Off = Mapping[str, Sequence[str]]
ALL_ON: Off = {"": ()}


@dataclass(frozen=True)
class SceneColumn:
    """A method by name. `of(loras)` draws a scene of these LoRAs; it holds until the next call.

    `seal(loras)` changes where the method, its settings or a LoRA's weights do.
    """

    name: str
    of: Callable[[Loras], Column]
    seal: Callable[[Loras], Any]


@dataclass(frozen=True)
class Learned:
    """A composition, the file that it was read from, and its column with all its LoRAs on."""

    composition: Composition
    path: str
    column: Column

    @property
    def names(self) -> tuple[str, ...]:
        return self.composition.names

    @property
    def sha256(self) -> str:
        file = Path(self.path) / "composition.safetensors" if Path(self.path).is_dir() else Path(self.path)
        return hashlib.sha256(file.read_bytes()).hexdigest()


def scene_columns(
    studio: Studio,
    bench: SceneBench,
    modes: Sequence[str],
    learned: Mapping[str, Learned],
    *,
    off: Off = ALL_ON,
) -> list[SceneColumn]:
    """The columns, fixed methods first; every mixture is there once for each entry of `off`.

    A composition that has the LoRAs of every scene is a column of its own. Others of one mode make one column: each
    scene is drawn by the smallest of them that has its LoRAs. Raises: UsageError for a scene that none has.
    """
    columns: list[SceneColumn] = []
    for mode in dict.fromkeys(modes):
        if mode != BASE and not bench.loras:
            raise UsageError("--modes", f"{mode!r} needs LoRAs, and no scene names one", "Write --modes base.")
        if mode == ALONE:
            columns += [_alone(studio, name) for name in left_alone(bench.loras, off)]
        else:
            # Built once over all LoRAs: what is missing for one of them shows before the first picture.
            studio.fixed(mode, bench.loras)
            some_off = ALL_ON if mode == BASE else off
            columns += [_fixed(studio, mode, label, names) for label, names in some_off.items()]
    whole = {name: one for name, one in learned.items() if set(bench.loras) <= set(one.names)}
    columns += [_composed(name + label, [one], names) for name, one in whole.items() for label, names in off.items()]
    parts: dict[str, list[Learned]] = {}
    for name, one in learned.items():
        if name not in whole:
            parts.setdefault(one.composition.mode, []).append(one)
    for mode, some in parts.items():
        for scene in bench.all:
            _check_covered(some, scene)
        columns += [_composed(mode + label, some, names) for label, names in off.items()]
    if not columns:
        raise UsageError("--modes", "nothing is left to draw with", "Name a mode, or switch fewer LoRAs off.")
    names = numbered(column.name for column in columns)
    return [replace(column, name=name) for column, name in zip(columns, names, strict=True)]


def left_alone(loras: Sequence[str], off: Off) -> list[str]:
    """The LoRAs that draw alone too: those that are not off in every column."""
    return [name for name in loras if not all(name in names for names in off.values())]


def _fixed(studio: Studio, mode: str, label: str, off: Sequence[str]) -> SceneColumn:
    def column(loras: Loras) -> Column:
        return masked(studio.fixed(mode, loras), mask=[name for name in loras if name in off])

    def seal(loras: Loras) -> Any:
        if mode == BASE:
            return mode
        return [mode, studio.method.model_dump(mode="json"), _experts(studio, loras), sorted(set(off) & set(loras))]

    return SceneColumn(mode + label, column, seal)


def _alone(studio: Studio, name: str) -> SceneColumn:
    column = studio.alone(name)
    return SceneColumn(name, lambda loras: column, lambda loras: [ALONE, _experts(studio, (name,))])


def _composed(name: str, some: Sequence[Learned], off: Sequence[str]) -> SceneColumn:
    hashes = {one.path: one.sha256 for one in some}

    def kept(loras: Loras) -> tuple[Learned, list[str]]:
        one = min((one for one in some if set(loras) <= set(one.names)), key=lambda one: len(one.names))
        return one, [lora for lora in one.names if lora in loras and lora not in off]

    def column(loras: Loras) -> Column:
        one, on = kept(loras)
        assert one.column.mixture is not None
        # Always told: the scene before may have switched off what this one needs.
        switch(one.column.mixture, mask=tuple(lora for lora in one.names if lora not in on), only=())
        return replace(one.column, name=name, loras={lora: one.column.loras[lora] for lora in on})

    def seal(loras: Loras) -> Any:
        one, on = kept(loras)
        return [hashes[one.path], on]

    return SceneColumn(name, column, seal)


def _check_covered(some: Sequence[Learned], scene: Scene) -> None:
    """Nothing. Raises: UsageError where none of these compositions has the LoRAs of the scene."""
    if not any(set(scene.loras) <= set(one.names) for one in some):
        nearest = max(some, key=lambda one: len(set(scene.loras) & set(one.names)))
        missing = ", ".join(name for name in scene.loras if name not in nearest.names)
        what = f"it lacks {missing}, which the scene {scene.name} of {scene.task} needs"
        raise UsageError(nearest.path, what, "Name a composition that has it, or other --tasks.")


def _experts(studio: Studio, loras: Sequence[str]) -> list[Any]:
    return [[name, studio.experts[name].sha256, studio.weights.get(name, 1.0)] for name in loras]
