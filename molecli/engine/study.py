"""`mole study`: LoRAs trained on tasks, composed by every method, scored side by side, as `mole` commands in order.

    jobs_of      recipe -> the commands, in three phases that need one another: LoRAs, compositions, scores
    run_study    recipe -> StudyReport: runs those that are not done yet, some side by side, and tells the scores

Every job is a recipe of its own in study-steps/, with its log, that anybody can run again by hand. A job is done once
<name>.done holds the digest of its recipe, so that a study that was killed, or whose recipe grew, goes on.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from queue import Queue
from typing import TYPE_CHECKING, Any

import yaml

from molecli.engine.results import RESULTS_FILE
from molecli.engine.study_table import StudyReport, study_report
from molecli.errors import RunError, UsageError
from molecli.files.atomic import write_text
from molecli.suites import load_suite, select_tasks

if TYPE_CHECKING:
    from molecli.files.recipe.study import StudyMethod, StudyRecipe

Progress = Callable[[str, int, int], None]
Note = Callable[[str], object]
STEPS = "study-steps"
PHASES = ("loras", "compositions", "scores")
OWN = "own LoRA"  # the column of each LoRA on its own task


@dataclass(frozen=True)
class Job:
    """One `mole` command: its place below the study's folder, and its recipe."""

    phase: str
    name: str
    tree: dict[str, Any]

    @property
    def text(self) -> str:
        return yaml.safe_dump(self.tree, sort_keys=False, allow_unicode=True, width=120)

    @property
    def digest(self) -> str:
        """Of all but the place, so that a folder of LoRAs can be taken along to another study."""
        what = yaml.safe_dump({key: value for key, value in self.tree.items() if key != "output"})
        return hashlib.sha256(what.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Named:
    """A LoRA of the study: its name, its folder, and the tasks that it is for."""

    name: str
    source: str
    tasks: tuple[str, ...]


def jobs_of(recipe: StudyRecipe) -> list[Job]:
    """The study's commands in order. Raises: UserError for tasks that are not there."""
    loras, training = _loras(recipe)
    return [*training, *_compositions(recipe, loras), *_scores(recipe, loras)]


def run_study(
    recipe: StudyRecipe, *, at_once: int, progress: Progress | None = None, note: Note = lambda text: None
) -> StudyReport:
    """Runs the jobs, `at_once` side by side over the GPUs there are; the report of what was scored is also written.

    A job that fails is told by `note`, and what needs it is left out. Raises: RunError where nothing was scored.
    """
    jobs, folder = jobs_of(recipe), Path(recipe.output) / STEPS
    left = [job for job in jobs if not _done(folder, job)]
    finished = len(jobs) - len(left)
    for phase in PHASES:
        for job, failure in _run([job for job in left if job.phase == phase], folder, at_once):
            finished += 1
            if failure:
                note(f"{job.name}: {failure}")
            if progress is not None:
                progress(phase, finished, len(jobs))
    scored = [folder / job.name for job in jobs if job.phase == "scores" and _done(folder, job)]
    if not scored:
        raise RunError(str(folder), "nothing was scored", "Look at the logs there.")
    report = study_report(recipe, scored)
    report.write(Path(recipe.output))
    return report


def number_folder(number: int | None) -> str:
    """The part of a path that tells how many LoRAs were composed."""
    return "all" if number is None else f"{number}-loras"


# -- the jobs ----------------------------------------------------------------------------------------------------------


def _loras(recipe: StudyRecipe) -> tuple[list[Named], list[Job]]:
    """The LoRAs, first one of every task, then the second of every task, and so on; and the jobs that train them."""
    experts = recipe.experts
    if experts.loras:
        return _needed(recipe, [Named(lora.name, lora.source, (lora.name,)) for lora in experts.loras]), []
    named, jobs = [], []
    groups = experts.together or {task: (task,) for task in _tasks(experts.data)}
    for copy, (name, tasks) in product(range(1, experts.copies + 1), groups.items()):
        called = name if copy == 1 else f"{name}-{copy}"
        data: dict[str, Any] = {**_plain(experts.data), "tasks": list(tasks)}
        if experts.copies > 1:
            data["part"] = f"{copy}/{experts.copies}"
        tree = {
            "command": "train-lora",
            "base": _plain(recipe.base),
            "adapter": _plain(experts.adapter),
            "data": data,
            "train": _plain(experts.train),
            **_common(recipe, f"loras/{called}", recipe.seed),
        }
        jobs.append(Job("loras", f"loras/{called}", tree))
        named.append(Named(called, _inside(recipe, f"loras/{called}"), tuple(tasks)))
    named = _needed(recipe, named)
    names = {lora.name for lora in named}
    return named, [job for job in jobs if job.name.removeprefix("loras/") in names]


def _needed(recipe: StudyRecipe, loras: list[Named]) -> list[Named]:
    """No more than are composed at once. Raises: UsageError where there are fewer."""
    most = max(recipe.numbers, default=len(loras))
    if most > len(loras):
        what = f"{most} LoRAs are to be composed, and there are {len(loras)}"
        raise UsageError("numbers", what, "Raise experts.copies, or write smaller numbers.")
    return loras[:most]


def _compositions(recipe: StudyRecipe, loras: Sequence[Named]) -> list[Job]:
    jobs = []
    for number, (name, method) in product(recipe.numbers or (None,), recipe.methods.items()):
        chosen = loras[:number]
        for seed, task in _runs(recipe, method):
            if method.mode == "single":
                raise UsageError(f"methods.{name}", "single is one LoRA alone", "Write own: true for that column.")
            if method.mode != "base":
                place = _place("compositions", number, seed, task, name)
                jobs.append(Job("compositions", place, _composed(recipe, method, chosen, place, seed, task)))
    if recipe.own:
        for lora in _first(loras):
            place = f"compositions/own/{lora.name}/{OWN}"
            tree = {"mode": "single", "only": [lora.name], **_shared(recipe, [lora], place, recipe.seed)}
            jobs.append(Job("compositions", place, {"command": "compose", **tree}))
    return jobs


def _composed(
    recipe: StudyRecipe, method: StudyMethod, loras: Sequence[Named], place: str, seed: int | None, task: str | None
) -> dict[str, Any]:
    given = {key: value for key in ("preset", "gate", "method", "train") if (value := getattr(method, key))}
    data = _plain(recipe.fit) | ({"tasks": [task]} if task else {})
    learned = {} if method.fixed else {"data": data}
    return {"command": "compose", "mode": method.mode, **given, **learned, **_shared(recipe, loras, place, seed)}


def _shared(recipe: StudyRecipe, loras: Sequence[Named], place: str, seed: int | None) -> dict[str, Any]:
    return {
        "base": _plain(recipe.base),
        "loras": [{"name": lora.name, "source": lora.source} for lora in loras],
        "evaluate": None,
        **_common(recipe, place, seed),
    }


def _scores(recipe: StudyRecipe, loras: Sequence[Named]) -> list[Job]:
    jobs, base = [], [name for name, method in recipe.methods.items() if method.mode == "base"]
    for number in recipe.numbers or (None,):
        by_task: dict[tuple[int | None, str | None], list[str]] = {}
        for name, method in recipe.methods.items():
            for seed, task in _runs(recipe, method):
                if method.mode == "base":
                    continue
                composition = _inside(recipe, _place("compositions", number, seed, task, name))
                if task is None:
                    place = _place("scores", number, seed, None, name)
                    jobs.append(_scored(recipe, place, [composition], None))
                else:
                    by_task.setdefault((seed, task), []).append(composition)
        for (seed, task), compositions in by_task.items():  # one load of the base for all methods of a task
            jobs.append(_scored(recipe, _place("scores", number, seed, None, str(task)), compositions, task))
    if base:
        jobs.append(_scored(recipe, "scores/base", [], None, modes=["base"]))
    if recipe.own:
        for lora in _first(loras):
            there = [task for task in _tasks(recipe.test.data) if task in lora.tasks]
            composition = _inside(recipe, f"compositions/own/{lora.name}/{OWN}")
            jobs += [_scored(recipe, f"scores/own/{task}", [composition], task) for task in there]
    return jobs


def _scored(
    recipe: StudyRecipe, place: str, compositions: Sequence[str], task: str | None, *, modes: Sequence[str] = ()
) -> Job:
    test = _plain(recipe.test)
    test["baselines"], test["bootstrap"] = False, 0
    if task is not None:
        test["data"] = {**test.get("data", {}), "tasks": [task]}
    tree = {
        "command": "evaluate",
        "base": _plain(recipe.base),
        "compositions": list(compositions),
        **({"modes": list(modes)} if modes else {}),
        "eval": test,
        **_common(recipe, place, recipe.seed),
    }
    return Job("scores", place, tree)


def _runs(recipe: StudyRecipe, method: StudyMethod) -> list[tuple[int | None, str | None]]:
    """(seed, task) of every composition by the method: one where nothing is learned."""
    if method.fixed:
        return [(None, None)]
    tasks = _tasks(recipe.test.data) if recipe.per_task else [None]
    return list(product(recipe.seeds, tasks))


def _place(phase: str, number: int | None, seed: int | None, task: str | None, name: str) -> str:
    parts = [phase, number_folder(number), "fixed" if seed is None else f"seed-{seed}", task, name]
    return "/".join(part for part in parts if part)


def _first(loras: Sequence[Named]) -> list[Named]:
    """One LoRA of each task."""
    seen: dict[tuple[str, ...], Named] = {}
    for lora in loras:
        seen.setdefault(lora.tasks, lora)
    return list(seen.values())


def _tasks(data: Any) -> list[str]:
    return select_tasks(load_suite(data.suite, files=data.files), data.tasks, data.data_dir)


def _inside(recipe: StudyRecipe, place: str) -> str:
    return str(Path(recipe.output) / STEPS / place)


def _common(recipe: StudyRecipe, place: str, seed: int | None) -> dict[str, Any]:
    own = recipe.seed if seed is None else seed
    return {"output": _inside(recipe, place), "seed": own, "device": recipe.device}


def _plain(section: Any) -> dict[str, Any]:
    """What was written of a section, as YAML holds it: defaults stay those of the command."""
    return section.model_dump(mode="json", exclude_unset=True)


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
    command = [sys.executable, "-m", "molecli", job.tree["command"], str(record), "--overwrite"]
    with record.with_name(f"{record.stem}.log").open("w") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False).returncode
    if code:
        lines = record.with_name(f"{record.stem}.log").read_text(encoding="utf-8", errors="replace").splitlines()
        return f"exit {code}: {lines[-1] if lines else 'no message'}"
    write_text(_mark(folder, job), job.digest + "\n")
    return ""


def _done(folder: Path, job: Job) -> bool:
    mark = _mark(folder, job)
    made = folder / job.name / RESULTS_FILE if job.phase == "scores" else folder / job.name
    return mark.is_file() and mark.read_text().strip() == job.digest and made.exists()


def _mark(folder: Path, job: Job) -> Path:
    return folder / f"{job.name}.done"
