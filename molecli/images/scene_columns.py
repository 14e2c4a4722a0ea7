"""What an evaluation of pictures compares: the base, LoRAs alone, fixed mixtures and compositions, scene by scene.

SceneColumn     one column of the table: what draws a scene, and a fingerprint of everything its pictures depend on
scene_columns   the columns of a recipe, built and checked before the first picture is drawn
Learned         a composition, its file and its column      left_alone   the LoRAs with a column of their own
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
from molecli.images.columns import Column, ColumnBuilder, masked
from molecli.images.scenes import SceneBench
from molecli.mixture.mixture import switch
from molecli.protocols import Scene

Loras = tuple[str, ...]
# Suffix of the methods' names -> the LoRAs that are switched off in every scene.
Off = Mapping[str, Sequence[str]]
ALL_ON: Off = {"": ()}


@dataclass(frozen=True)
class SceneColumn:
    """A method by name. `of(loras)` is what draws a scene of these LoRAs; it is valid until the next call.

    `fingerprint(loras)` changes if the method, its settings or a LoRA's weights change.
    """

    name: str
    of: Callable[[Loras], Column]
    fingerprint: Callable[[Loras], Any]


@dataclass(frozen=True)
class Learned:
    """A composition, the file that it was read from, and its column with all its LoRAs switched on."""

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
    builder: ColumnBuilder,
    bench: SceneBench,
    modes: Sequence[str],
    learned: Mapping[str, Learned],
    *,
    off: Off = ALL_ON,
) -> list[SceneColumn]:
    """The columns, fixed methods first; every mixture has one column for each entry of `off`.

    A composition that has the LoRAs of every scene gets its own column. The others share one column per mode: each
    scene is drawn by the smallest of them that has its LoRAs. Raises: UsageError for a scene that none of them covers.
    """
    columns: list[SceneColumn] = []
    for mode in dict.fromkeys(modes):
        if mode != BASE and not bench.loras:
            raise UsageError("--modes", f"{mode!r} needs LoRAs, but no scene names one", f"Write --modes {BASE}.")
        if mode == ALONE:
            columns += [_alone(builder, name) for name in left_alone(bench.loras, off)]
        else:
            # Built once over all LoRAs, so that a problem with one of them is reported before the first picture.
            builder.fixed(mode, bench.loras)
            some_off = ALL_ON if mode == BASE else off
            columns += [_fixed(builder, mode, label, names) for label, names in some_off.items()]
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
        raise UsageError("--modes", "no method is left that draws", "Name a mode, or switch fewer LoRAs off.")
    names = numbered(column.name for column in columns)
    return [replace(column, name=name) for column, name in zip(columns, names, strict=True)]


def left_alone(loras: Sequence[str], off: Off) -> list[str]:
    """The LoRAs that get a column of their own: those that are not switched off in every column."""
    return [name for name in loras if not all(name in names for names in off.values())]


def _fixed(builder: ColumnBuilder, mode: str, label: str, off: Sequence[str]) -> SceneColumn:
    def column(loras: Loras) -> Column:
        return masked(builder.fixed(mode, loras), mask=[name for name in loras if name in off])

    def fingerprint(loras: Loras) -> Any:
        if mode == BASE:
            return mode
        return [mode, builder.method.model_dump(mode="json"), _experts(builder, loras), sorted(set(off) & set(loras))]

    return SceneColumn(mode + label, column, fingerprint)


def _alone(builder: ColumnBuilder, name: str) -> SceneColumn:
    column = builder.alone(name)
    return SceneColumn(name, lambda loras: column, lambda loras: [ALONE, _experts(builder, (name,))])


def _composed(name: str, some: Sequence[Learned], off: Sequence[str]) -> SceneColumn:
    hashes = {one.path: one.sha256 for one in some}

    def kept(loras: Loras) -> tuple[Learned, list[str]]:
        one = min((one for one in some if set(loras) <= set(one.names)), key=lambda one: len(one.names))
        return one, [lora for lora in one.names if lora in loras and lora not in off]

    def column(loras: Loras) -> Column:
        one, on = kept(loras)
        assert one.column.mixture is not None
        # Switched for every scene: the scene before may have switched off a LoRA that this one needs.
        switch(one.column.mixture, mask=tuple(lora for lora in one.names if lora not in on), only=())
        return replace(one.column, name=name, loras={lora: one.column.loras[lora] for lora in on})

    def fingerprint(loras: Loras) -> Any:
        one, on = kept(loras)
        return [hashes[one.path], on]

    return SceneColumn(name, column, fingerprint)


def _check_covered(some: Sequence[Learned], scene: Scene) -> None:
    """Raises: UsageError if none of these compositions has all LoRAs of the scene."""
    if not any(set(scene.loras) <= set(one.names) for one in some):
        nearest = max(some, key=lambda one: len(set(scene.loras) & set(one.names)))
        missing = ", ".join(name for name in scene.loras if name not in nearest.names)
        what = f"it lacks {missing}, which the scene {scene.name} of {scene.task} needs"
        raise UsageError(nearest.path, what, "Name a composition that has it, or other --tasks.")


def _experts(builder: ColumnBuilder, loras: Sequence[str]) -> list[Any]:
    return [[name, builder.experts[name].sha256, builder.weights.get(name, 1.0)] for name in loras]
