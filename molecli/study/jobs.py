"""The commands of a study of texts, each with its own recipe, and the parts that every kind of study shares.

Job         one command           lora_jobs     the LoRAs, and the jobs that train them
Named       one LoRA              text_jobs     all jobs of a study on a language model
Variant     one setting           chosen_jobs   the jobs of some columns
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from molecli.catalog.methods import ALONE, BASE, get_method
from molecli.errors import UsageError, suggestion
from molecli.evaluation.scoring import OWN_LORA
from molecli.suites import load_suite, select_tasks

if TYPE_CHECKING:
    from molecli.config.study import ExpertsConfig, StudyMethod, StudyRecipe

STEPS = "study-steps"
PHASES = ("loras", "candidates", "trials", "compositions", "scores", "gates")
LOOKED_AT = 64  # examples of each task for inspect-gates


@dataclass(frozen=True)
class Job:
    """One `mole` command: its path below the study's folder, its recipe, and the columns that need it (() for all).

    shared: it can score several columns at once.
    """

    phase: str
    name: str
    tree: dict[str, Any]
    columns: tuple[str, ...] = ()
    shared: bool = False

    @property
    def command(self) -> str:
        """The name of the command."""
        return str(self.tree["command"])

    @property
    def arguments(self) -> list[str]:
        """Flags after the recipe: inspect-gates saves nothing without --output."""
        return ["--output", self.output] if self.phase == "gates" else []

    @property
    def output(self) -> str:
        """The folder that it writes."""
        return str(self.tree["output"])

    @property
    def reads(self) -> list[str]:
        """The folders of LoRAs and compositions that it reads. Other jobs may write them."""
        made = self.tree.get("compositions", [self.tree["composition"]] if "composition" in self.tree else [])
        return [*(lora["source"] for lora in self.tree.get("loras", ())), *made]

    @property
    def text(self) -> str:
        return yaml.safe_dump(self.tree, sort_keys=False, allow_unicode=True, width=120)

    @property
    def digest(self) -> str:
        """A hash of the recipe without its output, so that a folder of LoRAs can be moved to another study."""
        what = yaml.safe_dump({key: value for key, value in self.tree.items() if key != "output"})
        return hashlib.sha256(what.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Named:
    """A LoRA of the study: its name, its folder, and its tasks."""

    name: str
    source: str
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class Variant:
    """A method with its settings. If they were chosen only for `tasks`, `label` names them; else both are empty."""

    method: StudyMethod
    label: str = ""
    tasks: tuple[str, ...] = ()


# method -> the LoRAs that it composes
Cast = Mapping[str, Sequence[Named]]
# (number of LoRAs, method) -> that method with its chosen settings; several if they were chosen for each task
Settled = Mapping[tuple[int | None, str], Sequence[Variant]]


def text_jobs(recipe: StudyRecipe, settled: Settled) -> list[Job]:
    """The study's commands in order, without those that choose settings. `settled`: methods with chosen settings.

    Raises: UserError for tasks that do not exist.
    """
    for group, tasks in recipe.groups.items():
        known = tasks_of(recipe.test.data)
        for task in tasks:
            if task not in known:
                raise UsageError(f"groups.{group}", f"the test has no task {task!r}", suggestion(task, known))
    loras, cast, training = lora_jobs(recipe)
    made = _compositions(recipe, loras, cast, settled)
    return [*training, *made, *_scores(recipe, loras, settled), *gate_jobs(recipe, made)]


def chosen_jobs(jobs: Sequence[Job], columns: Collection[str]) -> list[Job]:
    """The jobs that only these columns need and those that all columns need; every job if no column is named."""
    return [job for job in jobs if not columns or set(job.columns) <= set(columns)]


# -- LoRAs -------------------------------------------------------------------------------------------------------------


def lora_jobs(recipe: StudyRecipe) -> tuple[list[Named], Cast, list[Job]]:
    """(the study's LoRAs, the LoRAs of each method, the jobs that train them)."""
    shared, jobs = _trained(recipe, recipe.experts, "loras", ())
    cast: dict[str, Sequence[Named]] = {}
    for name, method in recipe.methods.items():
        cast[name] = shared
        if method.experts:
            own = type(recipe.experts).model_validate({**plain(recipe.experts), **method.experts})
            cast[name], more = _trained(recipe, own, f"own-loras/{name}", (name,))
            jobs += more
    return shared, cast, jobs


def _trained(
    recipe: StudyRecipe, experts: ExpertsConfig, folder: str, columns: tuple[str, ...]
) -> tuple[list[Named], list[Job]]:
    """The LoRAs and the jobs that train them for these columns; first one LoRA of each task, then the second of each,
    and so on."""
    if experts.loras:
        return _needed(recipe, [Named(lora.name, lora.source, (lora.name,)) for lora in experts.loras]), []
    named, trees = [], {}
    for name, tasks, what in _lessons(experts, recipe.data_dir):
        place = f"{folder}/{name}"
        trees[name] = {
            "command": "train-lora",
            "base": plain(recipe.base),
            "adapter": plain(experts.adapter),
            **what,
            "train": plain(experts.train),
            **common(recipe, place, recipe.seed),
        }
        named.append(Named(name, inside(recipe, place), tasks))
    named = _needed(recipe, named)
    return named, [Job("loras", f"{folder}/{lora.name}", trees[lora.name], columns) for lora in named]


def _lessons(experts: ExpertsConfig, data_dir: str | None) -> Iterable[tuple[str, tuple[str, ...], dict[str, Any]]]:
    """(name, tasks, the recipe's section of training data) of every LoRA to train."""
    for name, pictures in experts.pictures.items():
        # An absolute folder is kept as it is.
        folder = str(Path(data_dir or "", pictures.instance_dir))
        yield name, (name,), {"pictures": {**plain(pictures), "instance_dir": folder}}
    if experts.pictures:
        return
    groups = experts.together or {task: (task,) for task in tasks_of(experts.data)}
    for copy, (name, tasks) in product(range(1, experts.copies + 1), groups.items()):
        data: dict[str, Any] = {**plain(experts.data), "tasks": list(tasks)}
        if experts.copies > 1:
            data["part"] = f"{copy}/{experts.copies}"
        yield name if copy == 1 else f"{name}-{copy}", tuple(tasks), {"data": data}


def _needed(recipe: StudyRecipe, loras: list[Named]) -> list[Named]:
    """The LoRAs that are needed: as many as the largest composition has. Raises: UsageError if there are fewer."""
    most = max(recipe.numbers, default=len(loras))
    if most > len(loras):
        what = f"{most} LoRAs should be composed, but there are only {len(loras)}"
        raise UsageError("numbers", what, "Raise experts.copies, or write smaller numbers.")
    return loras[:most]


# -- compositions ------------------------------------------------------------------------------------------------------


def _compositions(recipe: StudyRecipe, loras: Sequence[Named], cast: Cast, settled: Settled) -> list[Job]:
    jobs = []
    for number, name, variant in _variants(recipe, settled):
        method = variant.method
        for seed, task in _runs(recipe, method):
            if method.mode == ALONE:
                raise UsageError(f"methods.{name}", f"{ALONE} is one LoRA alone", "Write own: true for that column.")
            if method.mode != BASE:
                place = placed("compositions", number, seed, task, variant.label, name)
                data = plain(recipe.fit) | ({"tasks": [task]} if task else {})
                learned = {} if method.fixed else {"data": data}
                members = [lora for lora in cast[name][:number] if not (recipe.leave_out and task in lora.tasks)]
                tree = composed(recipe, method, members, learned, place, seed)
                jobs.append(Job("compositions", place, tree, (name,)))
    if recipe.own:
        for lora in _first(loras):
            place = f"compositions/own/{lora.name}/{OWN_LORA}"
            tree = {"mode": ALONE, "only": [lora.name], **_shared(recipe, [lora], place, recipe.seed)}
            jobs.append(Job("compositions", place, {"command": "compose", **tree}, (OWN_LORA,)))
    return jobs


def composed(
    recipe: StudyRecipe,
    method: StudyMethod,
    loras: Sequence[Named],
    more: Mapping[str, Any],
    place: str,
    seed: int | None,
) -> dict[str, Any]:
    """The recipe of one composition; `more`: its training data, or how pictures are drawn."""
    keys = ("preset", "gate", "method", "train", "objective")
    given = {key: value for key in keys if (value := getattr(method, key))}
    row = get_method(method.mode)
    if set(row.written) - set(method.method):
        given["method"] = {**row.part("usual")([lora.name for lora in loras]), **method.method}
    return {"command": "compose", "mode": method.mode, **given, **more, **_shared(recipe, loras, place, seed)}


def _shared(recipe: StudyRecipe, loras: Sequence[Named], place: str, seed: int | None) -> dict[str, Any]:
    return {
        "base": plain(recipe.base),
        "loras": [{"name": lora.name, "source": lora.source} for lora in loras],
        "evaluate": None,
        **common(recipe, place, seed),
    }


# -- scores ------------------------------------------------------------------------------------------------------------


def _scores(recipe: StudyRecipe, loras: Sequence[Named], settled: Settled) -> list[Job]:
    jobs, base = [], [name for name, method in recipe.methods.items() if method.mode == BASE]
    by_task: dict[tuple[int | None, int | None, str, str], dict[str, str]] = {}
    for number, name, variant in _variants(recipe, settled):
        for seed, task in _runs(recipe, variant.method):
            if variant.method.mode == BASE:
                continue
            composition = inside(recipe, placed("compositions", number, seed, task, variant.label, name))
            if task is None:
                place = placed("scores", number, seed, name, variant.label)
                some = {"tasks": list(variant.tasks)} if variant.tasks else None
                jobs.append(scored(recipe, place, [composition], (name,), some))
            else:
                # A method that wraps the base in its own classes is slow; the others do not wait for it.
                alone = name if get_method(variant.method.mode).builds else ""
                by_task.setdefault((number, seed, alone, task), {})[name] = composition
    for (number, seed, alone, task), made in by_task.items():  # one load of the base for all methods of a task
        place = placed("scores", number, seed, alone, task)
        job = scored(recipe, place, [*made.values()], tuple(made), {"tasks": [task]})
        jobs.append(replace(job, shared=not alone))
    if base:
        jobs.append(scored(recipe, "scores/base", [], tuple(base), modes=[BASE]))
    if recipe.own:
        for lora in _first(loras):
            there = [task for task in tasks_of(recipe.test.data) if task in lora.tasks]
            composition = inside(recipe, f"compositions/own/{lora.name}/{OWN_LORA}")
            jobs += [
                scored(recipe, f"scores/own/{task}", [composition], (OWN_LORA,), {"tasks": [task]}) for task in there
            ]
    return jobs


def scored(
    recipe: StudyRecipe,
    place: str,
    compositions: Sequence[str],
    columns: tuple[str, ...],
    data: Mapping[str, Any] | None = None,
    *,
    modes: Sequence[str] = (),
) -> Job:
    """An evaluation for these columns with the study's `test` section, in which `data` replaces keys if it is given."""
    test = plain(recipe.test)
    test["baselines"], test["bootstrap"] = False, 0
    if data:
        test["data"] = {**test.get("data", {}), **data}
    tree = {
        "command": "evaluate",
        "base": plain(recipe.base),
        "compositions": list(compositions),
        **({"modes": list(modes)} if modes else {}),
        "eval": test,
        **common(recipe, place, recipe.seed),
    }
    return Job(place.partition("/")[0], place, tree, columns)


# -- gates -------------------------------------------------------------------------------------------------------------


def gate_jobs(recipe: StudyRecipe, compositions: Sequence[Job]) -> list[Job]:
    """A job that inspects the gates, for every composition with gates, if the study asks for it."""
    wanted = [job for job in compositions if recipe.gates and get_method(job.tree["mode"]).family == "gates"]
    places = [job.name.replace("compositions", "gates", 1) for job in wanted]
    return [Job("gates", place, _look(recipe, job), job.columns) for place, job in zip(places, wanted, strict=True)]


def _look(recipe: StudyRecipe, job: Job) -> dict[str, Any]:
    if recipe.draws:
        what: dict[str, Any] = {"image": plain(recipe.image)}
    else:
        tested = plain(recipe.test.data)
        own = {"tasks": job.tree["data"]["tasks"]} if recipe.per_task else {}
        what = {"data": {**tested, "limit": tested.get("limit", LOOKED_AT), **own}}
    place = job.name.replace("compositions", "gates", 1)
    return {
        "command": "inspect-gates",
        "base": plain(recipe.base),
        "composition": inside(recipe, job.name),
        **what,
        **common(recipe, place, recipe.seed),
    }


# -- parts of all jobs -------------------------------------------------------------------------------------------------


def _variants(recipe: StudyRecipe, settled: Settled) -> list[tuple[int | None, str, Variant]]:
    """(number of LoRAs, column, its method with the chosen settings) of all columns; as written if none were chosen."""
    written = recipe.methods
    return [(n, name, one) for n, name in recipe.columns for one in settled.get((n, name), [Variant(written[name])])]


def _runs(recipe: StudyRecipe, method: StudyMethod) -> list[tuple[int | None, str | None]]:
    """(seed, task) of every composition by the method; only one if nothing is learned and no LoRA is left out."""
    tasks = tasks_of(recipe.test.data) if recipe.per_task and (recipe.leave_out or not method.fixed) else [None]
    return list(product([None] if method.fixed else method.seeds or recipe.seeds, tasks))


def placed(phase: str, number: int | None, seed: int | None, *names: str | None) -> str:
    """The path of a job: phase, number of LoRAs, seed, and further names that make it unique."""
    parts = [phase, number_folder(number), "fixed" if seed is None else f"seed-{seed}", *names]
    return "/".join(part for part in parts if part)


def number_folder(number: int | None) -> str:
    """The part of a path that says how many LoRAs were composed."""
    return "all" if number is None else f"{number}-loras"


def column_label(number: int | None, name: str) -> str:
    """The name of a column together with its number of LoRAs."""
    return name if number is None else f"{name}, {number} LoRA{'s' * (number != 1)}"


def _first(loras: Sequence[Named]) -> list[Named]:
    """One LoRA of each task."""
    seen: dict[tuple[str, ...], Named] = {}
    for lora in loras:
        seen.setdefault(lora.tasks, lora)
    return list(seen.values())


def tasks_of(data: Any) -> list[str]:
    """The tasks that a `data` section names, or all tasks of its suite."""
    return select_tasks(load_suite(data.suite, files=data.files), data.tasks, data.data_dir)


def inside(recipe: StudyRecipe, place: str) -> str:
    """The full path of a job's folder in the study's folder."""
    return str(Path(recipe.output) / STEPS / place)


def common(recipe: StudyRecipe, place: str, seed: int | None) -> dict[str, Any]:
    """The keys that every job's recipe has."""
    own = recipe.seed if seed is None else seed
    return {"output": inside(recipe, place), "seed": own, "device": recipe.device}


def plain(section: Any) -> dict[str, Any]:
    """The keys of a section that were written, as YAML stores them; the command fills in its defaults."""
    found: dict[str, Any] = section.model_dump(mode="json", exclude_unset=True)
    return found
