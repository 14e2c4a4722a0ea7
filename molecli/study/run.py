"""`mole study`: trains LoRAs on tasks, composes them by every method and compares the scores, as `mole` commands.

    jobs_of      recipe -> the commands, in phases: LoRAs, candidates and their trials if settings are to be chosen,
                 compositions, scores, gates
    run_study    recipe -> StudyReport: runs the commands that are not done yet, several at a time

Every job has its own recipe and log in study-steps/, and can be run again by hand. A job waits only for the jobs whose
output it reads, so a slow column or seed does not delay the others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from molecli.config.unread import check_keys, composing
from molecli.errors import RunError, UsageError, suggestion
from molecli.evaluation.scoring import OWN_LORA
from molecli.protocols import Note, Progress
from molecli.study.jobs import PHASES, STEPS, Job, chosen_jobs, column_label, number_folder, text_jobs
from molecli.study.report import SHARED, StudyReport, study_report
from molecli.study.scene_jobs import scene_jobs
from molecli.study.scheduler import Work, prepare
from molecli.study.tuning import Choice, Grid, chosen, listed, settled, trial_jobs, widened

if TYPE_CHECKING:
    from molecli.config.study import StudyRecipe


def jobs_of(recipe: StudyRecipe, choices: Sequence[Choice] = (), grid: Grid | None = None) -> list[Job]:
    """The study's commands in order. Tuned methods have the settings in `choices`, if these are known already. They are
    chosen from `grid`, otherwise from the values that the recipe lists.

    Raises: UserError for tasks that do not exist, and for a setting that a method does not read.
    """
    for name, method in recipe.methods.items():
        check_keys(method.settings, composing([method.mode]), f"methods.{name}.method")
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
    """The report on all scores, also written to files, after running the jobs, `at_once` at a time over the GPUs.

    columns: run only the jobs that these columns need. A job for several columns runs once all of them are named. The
    report includes everything that was done before. `note` receives a line when a job fails; the report lists it too,
    and jobs that need it are skipped. Raises: UsageError for an unknown column, RunError if nothing was scored.
    """
    check_columns(recipe, columns)
    prepare()
    folder = Path(recipe.output) / STEPS
    work = Work(folder, at_once, progress, note)
    try:
        grid = _all_lanes(recipe, work, columns)
    finally:
        work.close()
    choices = chosen(recipe, grid, folder, work.done(jobs_of(recipe, grid=grid), "trials"))
    jobs = jobs_of(recipe, choices, grid)
    scores = work.done(jobs, "scores")
    if not scores:
        raise RunError(str(folder), "nothing was scored", "Look at the logs there.")
    left = missing(recipe, jobs, {*scores, *work.failed})
    report = study_report(recipe, folder, scores, work.done(jobs, "gates"), choices, work.failed, left)
    report.write(Path(recipe.output))
    return report


def missing(recipe: StudyRecipe, jobs: Sequence[Job], over: Collection[str]) -> dict[str, str]:
    """{column with its number of LoRAs: how many of its evaluations are not in `over`}, because only other columns were
    run."""
    left = {}
    for number, name in [*recipe.columns, (None, OWN_LORA)]:
        places = (number_folder(number), *SHARED)
        asked = [job for job in jobs if job.phase == "scores" and name in job.columns]
        done = [job.name in over for job in asked if job.name.split("/")[1] in places]
        if not all(done):
            what = f"{done.count(False)} of {len(done)} evaluation{'s' * (len(done) != 1)} not run"
            left[column_label(number, name)] = what
    return left


def check_columns(recipe: StudyRecipe, columns: Sequence[str]) -> None:
    """Raises: UsageError for a name that is not a column of the study."""
    there = [*recipe.methods, *([OWN_LORA] if recipe.own and not recipe.draws else [])]
    for name in columns:
        if name not in there:
            raise UsageError("--column", f"the study has no column {name!r}", suggestion(name, there))


# -- columns side by side ----------------------------------------------------------------------------------------------


def _all_lanes(recipe: StudyRecipe, work: Work, columns: Sequence[str]) -> Grid:
    """Runs the jobs of all columns at the same time, and the jobs that score several columns once these are ready.
    Returns all settings that were tried, also those of columns that are not run now."""
    lanes = _lanes(recipe)
    running = {key: lane for key, lane in lanes.items() if not columns or key[1] in columns}
    shared = [job for job in chosen_jobs(jobs_of(recipe), columns) if job.shared]
    waiting = {name for job in shared for name in job.columns}
    for key, lane in running.items():
        work.plan(key, _own_jobs(lane))
    work.plan("shared", shared)
    with ThreadPoolExecutor(len(running) or 1) as pool:
        try:
            ends = {key: pool.submit(_lane, key, lane, work) for key, lane in running.items()}
            for key, end in ends.items():
                if key[1] in waiting:
                    end.result()
            work.do(shared, PHASES)
            grids = [ends[key].result() if key in ends else _tried(lane, work)[0] for key, lane in lanes.items()]
        except BaseException:
            work.close()  # otherwise the other columns would go on
            raise
    return {key: method for grid in grids for key, method in grid.items()}


def _lanes(recipe: StudyRecipe) -> dict[tuple[int | None, str], StudyRecipe]:
    """(number of LoRAs, column) -> the study of only that column."""
    alone = {"own": False, "subject": ""}
    found = {
        (number, name): recipe.model_copy(
            update={**alone, "methods": {name: recipe.methods[name]}, "numbers": () if number is None else (number,)}
        )
        for number, name in recipe.columns
    }
    if recipe.own and not recipe.draws:
        found[None, OWN_LORA] = recipe.model_copy(update={"methods": {}})
    return found


def _own_jobs(lane: StudyRecipe, choices: Sequence[Choice] = (), grid: Grid | None = None) -> list[Job]:
    return [job for job in jobs_of(lane, choices, grid) if not job.shared]


def _lane(key: tuple[int | None, str], lane: StudyRecipe, work: Work) -> Grid:
    """Runs the jobs of one column, from its LoRAs to its scores. Returns the settings that were tried for it."""

    def try_out(grid: Grid) -> None:
        jobs = _own_jobs(lane, grid=grid)
        work.plan(key, jobs)
        work.do(jobs, ("loras", "candidates", "trials"))

    grid, choices = _tried(lane, work, try_out)
    jobs = _own_jobs(lane, choices, grid)
    work.plan(key, jobs)
    work.do(jobs, ("compositions", "scores", "gates"))
    return grid


def _tried(
    lane: StudyRecipe, work: Work, try_out: Callable[[Grid], object] = lambda grid: None
) -> tuple[Grid, list[Choice]]:
    """(the settings tried for a column, the choices): the values in the recipe, then values beyond their range."""
    grid, choices = listed(lane), list[Choice]()
    for left in range(lane.wider, -1, -1):
        try_out(grid)
        choices = chosen(lane, grid, work.folder, work.done(jobs_of(lane, grid=grid), "trials"))
        wider = widened(grid, choices) if left else None
        if wider is None:
            break
        grid = wider
    return grid, choices
