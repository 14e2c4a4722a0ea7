"""Scores pictures from their files: one score per picture and metric, in results that are paired across methods.

score_files    scores of one method's pictures        PictureResult      one method's pictures of a task, with scores
paired         results on the pictures that all drew  make_instruments   CLIP, recogniser and references for a bench
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from molecli.catalog.builtin import package_folder
from molecli.files.pictures import read_picture
from molecli.images.scenes import PlannedPicture, SceneBench
from molecli.metrics import load_picture_metric
from molecli.metrics.clip import load_clip
from molecli.metrics.image_batch import SMALLEST, Instruments, Shots, pixels_of
from molecli.metrics.recogniser import load_recogniser
from molecli.protocols import Progress

if TYPE_CHECKING:
    from molecli.config import ClipConfig

Scores = Mapping[PlannedPicture, Mapping[str, float]]
RECOGNISER = package_folder() / "builtin" / "recogniser"
_AT_ONCE = 64


@dataclass(frozen=True)
class PictureResult:
    """One task's pictures that every method drew: their files and their scores by metric, the main one first."""

    task: str
    pictures: tuple[PlannedPicture, ...]
    files: tuple[str, ...]
    scores: Mapping[str, tuple[float, ...]]
    planned: int

    @property
    def values(self) -> Mapping[str, float]:
        """The mean of each metric."""
        return {metric: fmean(scores) for metric, scores in self.scores.items()}

    @property
    def counts(self) -> tuple[int, int]:
        """(pictures planned, pictures scored)."""
        return self.planned, len(self.pictures)

    def samples(self) -> list[dict[str, Any]]:
        """The pictures with what they should show and their scores."""
        return [
            {
                "scene": picture.scene.name,
                "prompt": picture.scene.prompt,
                "loras": list(picture.scene.loras),
                "seed": picture.seed,
                "picture": self.files[i],
                **{metric: scores[i] for metric, scores in self.scores.items()},
            }
            for i, picture in enumerate(self.pictures)
        ]


def make_instruments(bench: SceneBench, clip: ClipConfig, *, device: torch.device, builtin: bool) -> Instruments:
    """What the bench's metrics need. It is loaded now, so that a missing file is reported before anything is drawn.

    Raises: UsageError, MismatchError and RunError, from loading the CLIP, the recogniser and the pictures.
    """
    instruments = Instruments(
        clip=lambda: load_clip(clip, device=device, builtin=builtin),
        recogniser=lambda: load_recogniser(RECOGNISER).to(device),
        references=bench.references,
    )
    if "classes" in bench.compared:
        _ = instruments.recogniser
    if "prompts" in bench.compared:
        for scene in bench.all:
            instruments.text(scene.prompt)
    if "concept pictures" in bench.compared:
        for name in bench.loras:
            if name in bench.references:
                instruments.look(name)
    return instruments


def score_files(
    bench: SceneBench,
    files: Mapping[PlannedPicture, Path],
    instruments: Instruments,
    *,
    label: str = "scores",
    progress: Progress | None = None,
) -> dict[PlannedPicture, dict[str, float]]:
    """The scores of every picture by the metrics of its task, computed in batches."""
    scored: dict[PlannedPicture, dict[str, float]] = {}
    for task, metrics in bench.metrics.items():
        pictures = [picture for picture in files if picture.scene.task == task]
        for start in range(0, len(pictures), _AT_ONCE):
            some = pictures[start : start + _AT_ONCE]
            pixels = torch.stack([pixels_of(read_picture(files[picture], smallest=SMALLEST)) for picture in some])
            shots = Shots(pixels, [picture.scene for picture in some], instruments)
            by_metric = {metric: load_picture_metric(metric)(shots) for metric in metrics}
            for i, picture in enumerate(some):
                scored[picture] = {metric: scores[i] for metric, scores in by_metric.items()}
            if progress is not None:
                progress(label, len(scored), len(files))
    return scored


def paired(
    bench: SceneBench,
    pictures: Sequence[PlannedPicture],
    files: Mapping[str, Mapping[PlannedPicture, Path]],
    scored: Mapping[str, Scores],
    folder: Path,
) -> dict[str, list[PictureResult]]:
    """Each method's results on the pictures that every method drew: only those can be compared picture by picture.

    A task without such pictures is left out.
    """
    results: dict[str, list[PictureResult]] = {name: [] for name in scored}
    for task, metrics in bench.metrics.items():
        planned = [picture for picture in pictures if picture.scene.task == task]
        common = tuple(picture for picture in planned if all(picture in scores for scores in scored.values()))
        if not common:
            continue
        for name, scores in scored.items():
            shown = tuple(files[name][picture].relative_to(folder).as_posix() for picture in common)
            columns = {metric: tuple(scores[picture][metric] for picture in common) for metric in metrics}
            results[name].append(PictureResult(task, common, shown, columns, len(planned)))
    return results
