"""Drawing every take by one column: into the folder `drawn`, a PNG each; what lies there from the same run is kept.

Stage       where an evaluation's pictures go, and all that they follow from beside the method
draw_takes  the pictures of one column, and what could not be drawn
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image

from molecli.config import ImageConfig
from molecli.files.unique_names import slugs
from molecli.images.drawing import Failure, Job, draw, guidance_of
from molecli.images.png_metadata import PictureFacts, write_png
from molecli.images.sample import facts_of
from molecli.images.scene_columns import SceneColumn
from molecli.images.scenes import Take
from molecli.protocols import Note, Progress

FOLDER = "drawn"


@dataclass(frozen=True)
class Stage:
    """The takes of an evaluation, the pipeline that draws them, and the folder of the run."""

    folder: Path
    takes: Sequence[Take]
    columns: Sequence[str]
    backbone: Any = field(repr=False)
    image: ImageConfig
    batch_size: int

    def path(self, take: Take, column: str) -> Path:
        """drawn/<task>/<scene>/<method>-<number>.png"""
        task, scene = self._places[take.scene.task, take.scene.name]
        return self.folder / FOLDER / task / scene / f"{self._methods[column]}-{take.number}.png"

    def facts(self, take: Take, column: SceneColumn, drawn_by: Any) -> PictureFacts:
        """What the PNG says of the picture."""
        facts = facts_of(take.scene.prompt, take.seed, drawn_by, self.image, self.backbone)
        return replace(facts, method=column.name, digest=self.digest(take, column))

    def digest(self, take: Take, column: SceneColumn) -> str:
        """A hash of all that the picture follows from: two pictures that share it look the same."""
        parts = [column.seal(take.scene.loras), take.scene.prompt, take.seed, self._settings]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    @cached_property
    def _settings(self) -> list[Any]:
        # How many branches share a UNet call changes the memory and not the picture.
        settings = self.image.model_dump(mode="json", exclude={"branches_at_once", "replay"})
        settings["guidance"] = guidance_of(self.image, self.backbone)
        return [settings, self.backbone.fingerprint(), str(self.backbone.pipe.unet.dtype)]

    @cached_property
    def _methods(self) -> dict[str, str]:
        return slugs(self.columns)

    @cached_property
    def _places(self) -> dict[tuple[str, str], tuple[str, str]]:
        scenes = list(dict.fromkeys((take.scene.task, take.scene.name) for take in self.takes))
        tasks = slugs(list(dict.fromkeys(task for task, _ in scenes)))
        names = {task: slugs([name for other, name in scenes if other == task]) for task in tasks}
        return {(task, name): (tasks[task], names[task][name]) for task, name in scenes}


def draw_takes(
    stage: Stage,
    column: SceneColumn,
    *,
    progress: Progress | None = None,
    note: Note = lambda text: None,
) -> tuple[dict[Take, Path], list[Failure]]:
    """({take: file}, what could not be drawn). A picture of the same digest that lies there is not drawn again."""
    found: dict[Take, Path] = {}
    for take in stage.takes:
        path = stage.path(take, column.name)
        if _digest_of(path) == stage.digest(take, column):
            found[take] = path
    missing = sorted((take for take in stage.takes if take not in found), key=lambda take: take.scene.loras)
    failures: list[Failure] = []
    total = len(stage.takes)
    if progress is not None:
        progress(column.name, len(found), total)
    for loras, some in groupby(missing, key=lambda take: take.scene.loras):
        drawn_by, takes = column.of(loras), {stage.path(take, column.name): take for take in some}

        def keep(job: Job, picture: Image.Image, drawn_by: Any = drawn_by, takes: Any = takes) -> None:
            take = takes[Path(job.name)]
            found[take] = write_png(Path(job.name), picture, stage.facts(take, column, drawn_by))
            if progress is not None:
                progress(column.name, len(found), total)

        jobs = [Job(take.scene.prompt, take.seed, str(path)) for path, take in takes.items()]
        with drawn_by.context:
            failures += draw(
                stage.backbone,
                jobs,
                stage.image,
                batch_size=stage.batch_size,
                keep=keep,
                prepare=drawn_by.prepare,
                ease=drawn_by.ease,
                note=note,
            )
    return found, failures


def _digest_of(path: Path) -> str | None:
    """The digest that a picture was drawn with; None where it says none, or is no picture."""
    try:
        with Image.open(path) as image:
            return getattr(image, "text", {}).get("digest")
    except (OSError, SyntaxError, ValueError):
        return None
