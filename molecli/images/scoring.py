"""Scoring pictures from their files: a score for every take and metric, and results that pair across methods.

score_files    scores of one method's pictures            PictureResult    one task as one method drew it
paired         the results of methods on what all drew    make_instruments CLIP, recogniser and references of a bench
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
from molecli.images.scenes import SceneBench, Take
from molecli.metrics import load_picture_metric
from molecli.metrics.clip import load_clip
from molecli.metrics.image_batch import SMALLEST, Instruments, Shots, pixels_of
from molecli.metrics.recogniser import load_recogniser
from molecli.protocols import Progress

if TYPE_CHECKING:
    from molecli.config import ClipConfig

Scores = Mapping[Take, Mapping[str, float]]
RECOGNISER = package_folder() / "builtin" / "recogniser"
_AT_ONCE = 64


@dataclass(frozen=True)
class PictureResult:
    """One task's takes that every method drew: their files and their scores by metric, the main one first."""

    task: str
    takes: tuple[Take, ...]
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
        return self.planned, len(self.takes)

    def samples(self) -> list[dict[str, Any]]:
        """The pictures with what they should show and their scores."""
        return [
            {
                "scene": take.scene.name,
                "prompt": take.scene.prompt,
                "loras": list(take.scene.loras),
                "seed": take.seed,
                "picture": self.files[i],
                **{metric: scores[i] for metric, scores in self.scores.items()},
            }
            for i, take in enumerate(self.takes)
        ]


def make_instruments(bench: SceneBench, clip: ClipConfig, *, device: torch.device, builtin: bool) -> Instruments:
    """What the bench's pictures are looked at with, read now: what is missing shows before a picture is drawn.

    Raises: UsageError, MismatchError and RunError as loading a CLIP, the recogniser and pictures does.
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
    files: Mapping[Take, Path],
    instruments: Instruments,
    *,
    label: str = "scores",
    progress: Progress | None = None,
) -> dict[Take, dict[str, float]]:
    """The scores of every picture by its task's metrics, in batches."""
    scored: dict[Take, dict[str, float]] = {}
    for task, metrics in bench.metrics.items():
        takes = [take for take in files if take.scene.task == task]
        for start in range(0, len(takes), _AT_ONCE):
            some = takes[start : start + _AT_ONCE]
            pixels = torch.stack([pixels_of(read_picture(files[take], smallest=SMALLEST)) for take in some])
            shots = Shots(pixels, [take.scene for take in some], instruments)
            by_metric = {metric: load_picture_metric(metric)(shots) for metric in metrics}
            for i, take in enumerate(some):
                scored[take] = {metric: scores[i] for metric, scores in by_metric.items()}
            if progress is not None:
                progress(label, len(scored), len(files))
    return scored


def paired(
    bench: SceneBench,
    takes: Sequence[Take],
    files: Mapping[str, Mapping[Take, Path]],
    scored: Mapping[str, Scores],
    folder: Path,
) -> dict[str, list[PictureResult]]:
    """Each method's results, over the takes that every method drew: only those can be compared picture by picture.

    A task of which nothing is left is left out.
    """
    results: dict[str, list[PictureResult]] = {name: [] for name in scored}
    for task, metrics in bench.metrics.items():
        planned = [take for take in takes if take.scene.task == task]
        common = tuple(take for take in planned if all(take in scores for scores in scored.values()))
        if not common:
            continue
        for name, scores in scored.items():
            shown = tuple(files[name][take].relative_to(folder).as_posix() for take in common)
            columns = {metric: tuple(scores[take][metric] for take in common) for metric in metrics}
            results[name].append(PictureResult(task, common, shown, columns, len(planned)))
    return results
