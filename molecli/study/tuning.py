"""Settings that a study chooses on held-out examples, before anything is scored on the test set.

For each combination of the values in a method's `tune`, a composition is made and scored on examples that `fit.holdout`
keeps out of training. The study uses the settings with the best average. So a fixed method is compared at a scale that
suits it, and a learned one at its learning rate, without using the test set. If a study fits each task separately, the
settings of a fixed method are also chosen for each task, on the examples that learned methods are trained on.

    Grid         values to try           listed         those in the recipe     widened     more, beyond an edge
    trial_jobs   the commands            chosen         the best -> Choice      settled     methods with them
    choice_table for the report          chosen_on      the examples used, in words
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from molecli.evaluation.results import RESULTS_FILE
from molecli.evaluation.tables import TextRow, TextTable
from molecli.study.jobs import (
    Job,
    Settled,
    Variant,
    column_label,
    composed,
    inside,
    lora_jobs,
    number_folder,
    placed,
    plain,
    scored,
    tasks_of,
)

if TYPE_CHECKING:
    from molecli.config.study import StudyMethod, StudyRecipe

# (number of LoRAs, method) -> that method; its `tune` has every value to try at that number
Grid = Mapping[tuple[int | None, str], "StudyMethod"]
TRIED_ON = 32  # held-out examples of each task, at most


@dataclass(frozen=True)
class Choice:
    """One method at one number of LoRAs: the chosen settings, and the held-out average in percent of all tried ones.

    task: the task that they were chosen for, if each task has its own.
    """

    number: int | None
    method: str
    settings: Mapping[str, Any]
    tried: Mapping[str, float]
    task: str | None = None

    @property
    def edge(self) -> str:
        """`least tried` or `most tried`, if the chosen value is at that end of the tried values; else empty."""
        values = list(self.settings.values())
        if len(values) != 1 or not isinstance(values[0], (int, float)) or len(self.tried) < 2:
            return ""
        tried = self._values()
        return {tried[0]: "least tried", tried[-1]: "most tried"}.get(float(values[0]), "")

    @property
    def beyond(self) -> float | None:
        """The next value beyond the edge, at the same ratio as the edge to its neighbour.

        None if the choice is not at an edge or no better than its neighbour, and for integers and values <= 0.
        """
        (value,) = self.settings.values() if self.edge else (None,)
        if not isinstance(value, float) or self._values()[0] <= 0:
            return None
        inward = self._values()[1 if self.edge == "least tried" else -2]
        scores = {_value(label): score for label, score in self.tried.items()}
        return float(f"{value * value / inward:.2g}") if scores[value] > scores[inward] else None

    def _values(self) -> list[float]:
        return sorted(map(_value, self.tried))


def _value(label: str) -> float:
    return float(label.partition("=")[2])


def listed(recipe: StudyRecipe) -> Grid:
    """The values in the recipe, the same at every number of LoRAs."""
    return {(number, name): recipe.methods[name] for number, name in recipe.columns if recipe.methods[name].tune}


def trial_jobs(recipe: StudyRecipe, grid: Grid) -> list[Job]:
    """The jobs of a composition and its score for every combination; none if no method is tuned."""
    jobs = []
    _, cast, _ = lora_jobs(recipe) if grid else ([], {}, [])
    for (number, name), method in grid.items():
        for settings in method.combinations():
            seed = None if method.fixed else (method.seeds or recipe.seeds)[0]
            place = placed("candidates", number, seed, name, _label(settings))
            learned = {} if method.fixed else {"data": plain(recipe.fit)}
            tree = composed(recipe, method.at(settings), cast[name][:number], learned, place, seed)
            jobs.append(Job("candidates", place, tree, (name,)))
            tried = _trial_place(recipe, number, name, settings)
            jobs.append(_held_out(recipe, tried, inside(recipe, place), (name,)))
    return jobs


def chosen(recipe: StudyRecipe, grid: Grid, folder: Path, done: Collection[str]) -> list[Choice]:
    """The best settings of every tuned method among the trials `done` in `folder`; among equal ones the first."""
    choices = []
    for (number, name), method in grid.items():
        places = [(settings, _trial_place(recipe, number, name, settings)) for settings in method.combinations()]
        found = {_label(settings): _found(folder / place) for settings, place in places if place in done}
        if not found:
            continue
        for task in tasks_of(recipe.test.data) if recipe.per_task else [None]:
            averages = {label: _score(content, task) for label, content in found.items()}
            best = max(averages, key=lambda label: averages[label])
            settings = next(settings for settings, _ in places if _label(settings) == best)
            choices.append(Choice(number, name, settings, averages, task))
    return choices


def widened(grid: Grid, choices: Sequence[Choice]) -> Grid | None:
    """The grid with one more value beyond every choice at an edge, at its number of LoRAs; None if no choice is at an
    edge.

    Choices for single tasks are not widened: a few examples do not show where the best value is.
    """
    wider = dict(grid)
    for one in choices:
        method = wider[one.number, one.method]
        for key, values in method.tune.items():
            if one.task is None and one.beyond is not None and one.beyond not in values:
                tune = {**method.tune, key: [*values, one.beyond]}
                wider[one.number, one.method] = method.model_copy(update={"tune": tune})
    return wider if wider != grid else None


def settled(recipe: StudyRecipe, choices: Sequence[Choice]) -> Settled:
    """The tuned methods with their chosen settings."""
    found: dict[tuple[int | None, str], list[Variant]] = {}
    for number, name, same in _columns(choices):
        method = recipe.methods[name]
        for label in dict.fromkeys(_label(one.settings) for one in same):
            alike = [one for one in same if _label(one.settings) == label]
            tasks = tuple(one.task for one in alike if one.task is not None)
            variant = Variant(method.at(alike[0].settings), label if tasks else "", tasks)
            found.setdefault((number, name), []).append(variant)
    return found


def choice_table(choices: Sequence[Choice]) -> TextTable:
    """The table of the chosen settings, with the held-out averages of all tried ones."""
    rows = []
    for number, name, same in _columns(choices):
        label = column_label(number, name)
        averages = {settings: fmean(one.tried[settings] for one in same) for settings in same[0].tried}
        tried = "; ".join(f"{settings}: {average:.1f}" for settings, average in averages.items())
        rows.append(TextRow(label, (_chosen_text(same), tried)))
    return TextTable("method", ("chosen", f"average on {chosen_on(choices)} (%)"), tuple(rows))


def chosen_on(choices: Sequence[Choice]) -> str:
    """In words, the examples by which settings were chosen."""
    return "held-out examples" if choices[0].task is None else "each task's training examples"


def _chosen_text(same: Sequence[Choice]) -> str:
    """The settings chosen for one column: for all tasks, with their edge; or each with its number of tasks."""
    if same[0].task is None:
        return f"{_label(same[0].settings)} ({same[0].edge})" if same[0].edge else _label(same[0].settings)
    counts = Counter(_label(one.settings) for one in same)
    return ", ".join(f"{label} ({n} task{'s' * (n != 1)})" for label, n in counts.most_common())


def _columns(choices: Sequence[Choice]) -> Iterator[tuple[int | None, str, list[Choice]]]:
    """(number of LoRAs, method, its choices) of every column."""
    for column in dict.fromkeys((one.number, one.method) for one in choices):
        yield *column, [one for one in choices if (one.number, one.method) == column]


def _label(settings: Mapping[str, Any]) -> str:
    """`scale=0.5, density=0.2`. It is used as a folder's name, so it has no slashes."""
    return ", ".join(f"{key.partition('.')[2]}={value}" for key, value in settings.items()).replace("/", "|")


def _trial_place(recipe: StudyRecipe, number: int | None, name: str, settings: Mapping[str, Any]) -> str:
    return "/".join(["trials", number_folder(number), name, _label(settings)])


def _held_out(recipe: StudyRecipe, place: str, composition: str, columns: tuple[str, ...]) -> Job:
    """An evaluation on the examples that `fit` keeps out of training. If each task is fitted separately, it uses all
    examples, because only methods that learn nothing are tuned then."""
    fit = {key: value for key, value in plain(recipe.fit).items() if key != "part"}
    limit = min(TRIED_ON, recipe.fit.limit or TRIED_ON)
    data = {**fit, "split": recipe.fit.split, "holdout": recipe.fit.holdout, "limit": limit}
    if recipe.per_task:
        data |= {"tasks": tasks_of(recipe.test.data), "holdout": 0.0}
    return scored(recipe, place, [composition], columns, data)


def _found(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / RESULTS_FILE).read_text(encoding="utf-8"))
    return content


def _score(content: Mapping[str, Any], task: str | None) -> float:
    """The main metric of a task, or the mean of each task's own, in percent."""
    if task is None:
        return float(content["average"][content["model_name"]])
    return 100 * float(next(value for key, value in content["results"][task].items() if key != "alias"))
