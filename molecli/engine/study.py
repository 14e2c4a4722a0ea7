"""`mole study`: LoRAs trained on tasks, composed by every method, scored side by side, as `mole` commands in order.

    jobs_of      recipe -> the commands, in phases that need one another: LoRAs, candidates and their trials where
                 settings are to be chosen, compositions, scores, gates
    run_study    recipe -> StudyReport: runs those that are not done yet, some side by side, and tells the scores

Every job is a recipe of its own in study-steps/, with its log, that anybody can run again by hand. A job is done once
<name>.done holds the digest of its recipe, so that a study that was killed, or whose recipe grew, goes on.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import TYPE_CHECKING, Any

from molecli.compose.options import check_keys, told
from molecli.engine.results import RESULTS_FILE
from molecli.engine.side_by_side import prepare, run_mole
from molecli.engine.study_jobs import OWN, PHASES, STEPS, Job, text_jobs
from molecli.engine.study_scenes import scene_jobs
from molecli.engine.study_table import StudyReport, study_report
from molecli.engine.study_trials import Choice, Grid, chosen, listed, settled, trial_jobs, widened
from molecli.errors import RunError, UsageError
from molecli.files.atomic import write_text
from molecli.files.near import suggestion

if TYPE_CHECKING:
    from molecli.files.recipe.study import StudyRecipe

Progress = Callable[[str, int, int], None]
Note = Callable[[str], object]


def jobs_of(recipe: StudyRecipe, choices: Sequence[Choice] = (), grid: Grid | None = None) -> list[Job]:
    """The study's commands in order; methods to be tuned are composed as `choices` say, where these are known, which
    are chosen from `grid`, else from what the recipe lists.

    Raises: UserError for tasks that are not there, and for a setting that a method does not read.
    """
    for name, method in recipe.methods.items():
        check_keys(method.told, told([method.mode]), f"methods.{name}.method")
    if recipe.draws:
        return scene_jobs(recipe)
    return [*trial_jobs(recipe, listed(recipe) if grid is None else grid), *text_jobs(recipe, settled(recipe, choices))]


def run_study(
    recipe: StudyRecipe,
    *,
    at_once: int,
    columns: Sequence[str] = (),
    progress: Progress | None = None,
    note: Note = lambda text: None,
) -> StudyReport:
    """Runs the jobs, `at_once` side by side over the GPUs there are; the report of what was scored is also written.

    columns: only the jobs that these need, those of several columns once all are named; the report has what else was
    done before. A job that fails is told by `note` and in the report, and what needs it is left out.
    Raises: UsageError for a column that there is not, RunError where nothing was scored.
    """
    check_columns(recipe, columns)
    prepare()
    folder = Path(recipe.output) / STEPS
    work = _Work(folder, at_once, frozenset(columns), progress, note)
    work.do(jobs_of(recipe), ("loras", "candidates", "trials"))
    grid = listed(recipe)
    choices = chosen(recipe, grid, folder, work.done["trials"])
    for _ in range(recipe.wider):
        wider = widened(grid, choices)
        if wider is None:
            break
        grid = wider
        work.do(jobs_of(recipe, grid=grid), ("candidates", "trials"))
        choices = chosen(recipe, grid, folder, work.done["trials"])
    jobs = jobs_of(recipe, choices, grid)
    _reuse(folder, jobs)
    work.do(jobs, ("compositions", "scores", "gates"))
    if not work.done["scores"]:
        raise RunError(str(folder), "nothing was scored", "Look at the logs there.")
    report = study_report(recipe, folder, work.done["scores"], work.done["gates"], choices, work.failed)
    report.write(Path(recipe.output))
    return report


def check_columns(recipe: StudyRecipe, columns: Sequence[str]) -> None:
    """Nothing. Raises: UsageError for a name that is no column of the study."""
    there = [*recipe.methods, *([OWN] if recipe.own and not recipe.draws else [])]
    for name in columns:
        if name not in there:
            raise UsageError("--column", f"the study has no column {name!r}", suggestion(name, there))


def chosen_jobs(jobs: Sequence[Job], columns: Collection[str]) -> list[Job]:
    """The jobs for these columns alone and those for all; every job where none is named."""
    return [job for job in jobs if not columns or set(job.columns) <= set(columns)]


class _Work:
    """Jobs of a study, phase by phase; done: what is, by phase; failed: the name of a job -> why."""

    def __init__(
        self, folder: Path, at_once: int, columns: Collection[str], progress: Progress | None, note: Note
    ) -> None:
        self.folder, self.at_once, self.columns, self.progress, self.note = folder, at_once, columns, progress, note
        self.done: dict[str, list[str]] = {phase: [] for phase in PHASES}
        self.failed: dict[str, str] = {}

    def do(self, jobs: Sequence[Job], phases: Sequence[str]) -> None:
        """Those of these phases that are not done yet, in order; each is told.

        What is the same but for its place is made once: learned again on a GPU, it would not come out alike.
        """
        wanted = chosen_jobs(jobs, self.columns)
        for phase in phases:
            now = [job for job in wanted if job.phase == phase]
            left = [job for job in now if not _done(self.folder, job) and job.name not in self.failed]
            finished = sum(job.name in self.failed or _done(self.folder, job) for job in wanted)
            alike: dict[str, list[Job]] = {}
            for job in left:
                alike.setdefault(job.digest, []).append(job)
            for job, failure in _run([same[0] for same in alike.values()], self.folder, self.at_once):
                for one in alike[job.digest]:
                    finished += 1
                    if failure:
                        self.failed[one.name] = failure
                        self.note(f"{one.name}: {failure}")
                    elif one is not job:
                        _copy(self.folder, job, one)
                if self.progress is not None:
                    self.progress(phase, finished, len(wanted))
            self.done[phase] = [job.name for job in jobs if job.phase == phase and _done(self.folder, job)]


# -- running them ------------------------------------------------------------------------------------------------------


def _run(jobs: Sequence[Job], folder: Path, at_once: int) -> Any:
    """(job, what went wrong or "") of every job, as they finish."""
    import torch

    slots: Queue[int] = Queue()
    for slot in range(at_once):
        slots.put(slot)
    gpus, threads = torch.cuda.device_count(), max(1, (os.cpu_count() or 1) // at_once)

    def one(job: Job) -> tuple[Job, str]:
        slot = slots.get()
        try:
            environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
            if gpus:
                environment["CUDA_VISIBLE_DEVICES"] = str(slot % gpus)
            return job, _called(job, folder, environment)
        finally:
            slots.put(slot)

    with ThreadPoolExecutor(at_once) as pool:
        yield from pool.map(one, jobs)


def _called(job: Job, folder: Path, environment: dict[str, str]) -> str:
    """What went wrong, "" if nothing did; recipe, log and the mark of being done lie beside the job's folder."""
    record = folder / f"{job.name}.yaml"
    write_text(record, job.text)
    log = folder / f"{job.name}.log"
    code = run_mole([job.command, str(record), *job.arguments, "--overwrite"], log, environment)
    if code:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        return f"exit {code}: {lines[-1] if lines else 'no message'}"
    write_text(_mark(folder, job), job.digest + "\n")
    return ""


def _reuse(folder: Path, jobs: Sequence[Job]) -> None:
    """A composition that was already made to be tried, with the same settings and seed, is taken from there."""
    alike = {job.digest: job for job in jobs if job.phase == "candidates" and _done(folder, job)}
    for job in jobs:
        if job.phase == "compositions" and job.digest in alike and not _done(folder, job):
            _copy(folder, alike[job.digest], job)


def _copy(folder: Path, source: Job, job: Job) -> None:
    """What `source` made becomes what `job` did, too."""
    shutil.copytree(folder / source.name, folder / job.name, dirs_exist_ok=True)
    write_text(folder / f"{job.name}.yaml", job.text)
    write_text(_mark(folder, job), job.digest + "\n")


def _done(folder: Path, job: Job) -> bool:
    mark = _mark(folder, job)
    made = folder / job.name / RESULTS_FILE if job.phase in ("trials", "scores") else folder / job.name
    return mark.is_file() and mark.read_text().strip() == job.digest and made.exists()


def _mark(folder: Path, job: Job) -> Path:
    return folder / f"{job.name}.done"
