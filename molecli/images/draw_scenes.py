"""Draws every planned picture with one column, as PNG files in `drawn`. Pictures of the same run are not drawn again.

DrawingPlan    the planned pictures, where their files go, and everything except the method that they depend on
draw_planned   the pictures of one column, and those that could not be drawn
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
from molecli.images.drawing import Failure, PictureJob, draw, guidance_of
from molecli.images.png_metadata import PictureFacts, write_png
from molecli.images.sample import facts_of
from molecli.images.scene_columns import SceneColumn
from molecli.images.scenes import PlannedPicture
from molecli.protocols import Note, Progress

FOLDER = "drawn"


@dataclass(frozen=True)
class DrawingPlan:
    """The planned pictures of an evaluation, the pipeline that draws them, and the folder of the run."""

    folder: Path
    pictures: Sequence[PlannedPicture]
    columns: Sequence[str]
    backbone: Any = field(repr=False)
    image: ImageConfig
    batch_size: int

    def path(self, picture: PlannedPicture, column: str) -> Path:
        """drawn/<task>/<scene>/<method>-<number>.png"""
        task, scene = self._places[picture.scene.task, picture.scene.name]
        return self.folder / FOLDER / task / scene / f"{self._methods[column]}-{picture.number}.png"

    def facts(self, picture: PlannedPicture, column: SceneColumn, drawn_by: Any) -> PictureFacts:
        """The facts about the picture that its PNG file stores."""
        facts = facts_of(picture.scene.prompt, picture.seed, drawn_by, self.image, self.backbone)
        return replace(facts, method=column.name, digest=self.digest(picture, column))

    def digest(self, picture: PlannedPicture, column: SceneColumn) -> str:
        """A hash of everything that the picture depends on: two pictures with the same hash look the same."""
        parts = [column.fingerprint(picture.scene.loras), picture.scene.prompt, picture.seed, self._settings]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    @cached_property
    def _settings(self) -> list[Any]:
        # The number of branches in one UNet call changes the memory used, not the picture.
        settings = self.image.model_dump(mode="json", exclude={"branches_at_once", "replay"})
        settings["guidance"] = guidance_of(self.image, self.backbone)
        return [settings, self.backbone.fingerprint(), str(self.backbone.pipe.unet.dtype)]

    @cached_property
    def _methods(self) -> dict[str, str]:
        return slugs(self.columns)

    @cached_property
    def _places(self) -> dict[tuple[str, str], tuple[str, str]]:
        scenes = list(dict.fromkeys((picture.scene.task, picture.scene.name) for picture in self.pictures))
        tasks = slugs(list(dict.fromkeys(task for task, _ in scenes)))
        names = {task: slugs([name for other, name in scenes if other == task]) for task in tasks}
        return {(task, name): (tasks[task], names[task][name]) for task, name in scenes}


def draw_planned(
    plan: DrawingPlan,
    column: SceneColumn,
    *,
    progress: Progress | None = None,
    note: Note = lambda text: None,
) -> tuple[dict[PlannedPicture, Path], list[Failure]]:
    """({picture: file}, what could not be drawn). A file with the same digest is kept and not drawn again."""
    found: dict[PlannedPicture, Path] = {}
    for picture in plan.pictures:
        path = plan.path(picture, column.name)
        if _digest_of(path) == plan.digest(picture, column):
            found[picture] = path
    missing = sorted((one for one in plan.pictures if one not in found), key=lambda one: one.scene.loras)
    failures: list[Failure] = []
    total = len(plan.pictures)
    if progress is not None:
        progress(column.name, len(found), total)
    for loras, some in groupby(missing, key=lambda one: one.scene.loras):
        drawn_by, pictures = column.of(loras), {plan.path(one, column.name): one for one in some}

        def keep(job: PictureJob, image: Image.Image, drawn_by: Any = drawn_by, pictures: Any = pictures) -> None:
            picture = pictures[Path(job.name)]
            found[picture] = write_png(Path(job.name), image, plan.facts(picture, column, drawn_by))
            if progress is not None:
                progress(column.name, len(found), total)

        jobs = [PictureJob(one.scene.prompt, one.seed, str(path)) for path, one in pictures.items()]
        with drawn_by.context:
            failures += draw(
                plan.backbone,
                jobs,
                plan.image,
                batch_size=plan.batch_size,
                keep=keep,
                prepare=drawn_by.prepare,
                ease=drawn_by.ease,
                note=note,
            )
    return found, failures


def _digest_of(path: Path) -> str | None:
    """The digest that a picture file stores; None if it stores none, or is not a picture."""
    try:
        with Image.open(path) as image:
            return getattr(image, "text", {}).get("digest")
    except (OSError, SyntaxError, ValueError):
        return None
