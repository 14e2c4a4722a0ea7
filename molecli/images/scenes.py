"""The scenes of an evaluation: its tasks, how each task is scored, and the reference pictures of each LoRA.

SceneBench       the scenes and metrics of each task, the reference pictures of each LoRA
load_scenes      EvalConfig -> SceneBench; finds mistakes before anything is loaded
suite_name       the suite of scenes for a name that the recipe gives
PlannedPicture   one picture to draw: a scene, its number and its seed
plan_pictures    every picture of some scenes
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from molecli.catalog.metrics import METRICS, metric_row
from molecli.catalog.suites import DEFAULT, DEFAULT_SCENES, OWN_SCENES, OWN_TEXTS
from molecli.errors import UsageError, suggestion
from molecli.files.concepts import Concept
from molecli.files.pictures import pictures_in
from molecli.metrics import load_picture_metric
from molecli.protocols import Note, Scene, SceneSuite
from molecli.suites import load_scene_suite, selected
from molecli.training.examples import sample

if TYPE_CHECKING:
    from molecli.config import EvalConfig

Concepts = Mapping[str, Concept | None]
SEEDS = 2**31


@dataclass(frozen=True)
class SceneBench:
    """Scenes and metrics by task, folders of reference pictures by LoRA; `suite` is the suite's name and version."""

    suite: tuple[str, str]
    scenes: Mapping[str, Sequence[Scene]]
    metrics: Mapping[str, Sequence[str]]
    references: Mapping[str, str]

    @property
    def all(self) -> list[Scene]:
        """The scenes of all tasks."""
        return [scene for scenes in self.scenes.values() for scene in scenes]

    @property
    def loras(self) -> list[str]:
        """Every LoRA that a scene names, once."""
        return list(dict.fromkeys(name for scene in self.all for name in scene.loras))

    @property
    def compared(self) -> set[str]:
        """What the metrics compare pictures with; see `catalog.metrics`."""
        return {what for metrics in self.metrics.values() for name in metrics for what in metric_row(name).reads}

    @property
    def asks_clip(self) -> bool:
        """Whether some metric compares by CLIP."""
        return any(metric_row(name).asks_clip for metrics in self.metrics.values() for name in metrics)


@dataclass(frozen=True)
class PlannedPicture:
    """One picture to draw of a scene: its number from 0, and the seed that every method draws it from."""

    scene: Scene
    number: int
    seed: int


def load_scenes(
    config: EvalConfig,
    concepts: Concepts,
    *,
    builtin: bool,
    note: Note = lambda text: None,
) -> SceneBench:
    """The scenes that `config` names, at most `data.limit` of each task, and how they are scored.

    `concepts`: each available LoRA and its concept, if known. `builtin`: whether the base is the embedded one. `note`
    receives a line for each of the suite's metrics that cannot be computed. Raises: UsageError, MismatchError.
    """
    _check_fields(config)
    data = config.data
    name = suite_name(data.suite, builtin=builtin)
    suite = load_scene_suite(name, files=data.files, scenes=data.scenes, split=data.split)
    tasks = selected(suite.name, suite.tasks(concepts, data.data_dir), data.tasks, data.data_dir)
    scenes = {task: sample(suite.scenes(task, concepts, data.data_dir), data.limit, task) for task in tasks}
    for task, some in scenes.items():
        _check_scenes(task, some, concepts)
    references = _references(suite, scenes, concepts, data.data_dir)
    metrics = {task: _metrics(config, suite, task, some, references, note) for task, some in scenes.items()}
    bench = SceneBench((suite.name, suite.version), scenes, metrics, references)
    if "concept pictures" in bench.compared:
        for folder in references.values():
            pictures_in(folder)
    return bench


def suite_name(name: str, *, builtin: bool) -> str:
    """The suite of scenes for `name`: a name that means a text suite is replaced by that of the matching scenes."""
    if name == DEFAULT and builtin:
        return DEFAULT_SCENES
    return OWN_SCENES if name == OWN_TEXTS else name


def plan_pictures(scenes: Sequence[Scene], images: int, seed: int) -> list[PlannedPicture]:
    """`images` pictures of every scene. A scene's seeds depend on its name and `seed`, not on the other scenes."""
    pictures = []
    for scene in scenes:
        # Each scene has its own noise: if all shared one seed, a lucky seed would count once for every scene.
        first = zlib.crc32(f"{scene.task}/{scene.name}".encode())
        pictures += [PlannedPicture(scene, number, (seed + first + number) % SEEDS) for number in range(images)]
    return pictures


def _check_fields(config: EvalConfig) -> None:
    for section, fields in ((config, ("max_new_tokens",)), (config.data, ("holdout",))):
        for name in fields:
            if getattr(section, name) != type(section).model_fields[name].default:
                prefix = "eval" if section is config else "eval.data"
                raise UsageError(f"{prefix}.{name}", "it is for language models, not for scenes", "Leave it out.")


def _check_scenes(task: str, scenes: Sequence[Scene], concepts: Concepts) -> None:
    if not scenes:
        raise UsageError(f"task {task}", "there is no scene to draw", "Leave the task out.")
    names: set[str] = set()
    for scene in scenes:
        if scene.name in names:
            raise UsageError(f"task {task}", f"two scenes are called {scene.name!r}", "Give each its own name.")
        names.add(scene.name)
        for lora in scene.loras:
            if lora not in concepts:
                what = f"it needs the LoRA {lora!r}, and no LoRA of this name is given"
                remedy = suggestion(lora, list(concepts)) if concepts else "Write --loras."
                raise UsageError(f"task {task}, scene {scene.name}", what, remedy)


def _references(
    suite: SceneSuite, scenes: Mapping[str, Sequence[Scene]], concepts: Concepts, data_dir: str | None
) -> dict[str, str]:
    """LoRA -> folder: the suite's own pictures (covered by its version), otherwise those that the concept names."""
    found: dict[str, str] = {}
    for name in dict.fromkeys(name for some in scenes.values() for scene in some for name in scene.loras):
        concept = concepts[name]
        folder = suite.pictures(name, data_dir) or (concept.pictures if concept is not None else None)
        if folder is not None:
            found[name] = folder
    return found


def _metrics(
    config: EvalConfig,
    suite: SceneSuite,
    task: str,
    scenes: Sequence[Scene],
    references: Mapping[str, str],
    note: Note,
) -> tuple[str, ...]:
    """The metrics that the recipe asks for, otherwise the suite's metrics that can be computed. Raises: UsageError."""
    wanted = config.metrics or suite.metrics(task)
    chosen = []
    for name in dict.fromkeys(wanted):
        load_picture_metric(name)
        missing = _missing(name, scenes, references)
        if missing is None:
            chosen.append(name)
        elif config.metrics:
            raise UsageError(f"metrics {name}", *missing)
        else:
            note(f"task {task}: {name} is not computed, because {missing[0]}")
    if not chosen:
        remedy = f"Write --metrics {next(name for name, row in METRICS.items() if row.reads == ('prompts',))}."
        raise UsageError(f"task {task}", "none of its metrics can be computed", remedy)
    return tuple(chosen)


def _missing(metric: str, scenes: Sequence[Scene], references: Mapping[str, str]) -> tuple[str, str] | None:
    """What these scenes lack for a metric, and the remedy; None if the metric can be computed."""
    compared = metric_row(metric).reads
    for scene in scenes:
        if "classes" in compared and not scene.classes:
            return f"the scene {scene.name} does not say what a recogniser should find", "Leave the metric out."
        if "concept pictures" in compared and not scene.loras:
            return f"the scene {scene.name} has no LoRA", "Leave the metric out."
        if "concept pictures" in compared:
            for name in scene.loras:
                if name not in references:
                    remedy = f"Write concepts.{name}.pictures with the folder of its pictures."
                    return f"there is no folder of pictures for the concept {name!r}", remedy
    return None
