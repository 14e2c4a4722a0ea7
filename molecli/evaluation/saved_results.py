"""Finished evaluations, read from their folders, and checks that they can be compared.

Run               the content of results.json and of its samples        read_run          [NAME=]PATH -> Run
joined            runs over different tasks as one                      whole_runs        parts -> runs
check_tasks       the same tasks                                        check_settings    one name, one method
check_versions    the same metric, suite, CLIP and completions          check_examples    the same examples, or scenes
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molecli.config import choices
from molecli.errors import MismatchError, UsageError
from molecli.evaluation.results import RESULTS_FILE, samples_paths
from molecli.evaluation.scoring import OWN_LORA

# The parts of a recipe that a method's scores depend on: one name with two settings is not one method.
SETTINGS = ("base", "loras", "mask", "only", "method", "image")
AGAIN = "Evaluate again."
Sample = Mapping[str, Any]
# An example's content, and its number among equal ones: a suite can have the same example twice.
Key = tuple[tuple[Any, ...], int]


@dataclass(frozen=True)
class Run:
    """One evaluation: its path, the content of results.json, its samples (task -> method -> in order).

    methods: name in the comparison -> name in the results.
    """

    place: str
    content: Mapping[str, Any]
    samples: Mapping[str, Mapping[str, Sequence[Sample]]]
    methods: Mapping[str, str]

    def keyed(self, task: str, method: str) -> dict[Key, Sample]:
        """A method's samples of a task by example. Raises: MismatchError if there are none."""
        own = self.methods[method]
        by_method = self.samples[task]
        # The samples of each task's own LoRA have that LoRA's name.
        found = by_method.get(own) or (by_method.get(task) if own == OWN_LORA else None)
        if not found:
            what = f"the method {own!r} has no samples of the task {task!r}"
            raise MismatchError(self.place, what, AGAIN)
        seen: Counter[tuple[Any, ...]] = Counter()
        keyed: dict[Key, Sample] = {}
        for sample in found:
            example = _example(sample)
            keyed[example, seen[example]] = sample
            seen[example] += 1
        return keyed

    def scores(self, task: str) -> list[str]:
        """The metrics of a task, the main one first."""
        names = (key.partition(",")[0] for key in self.content["results"][task] if key != "alias")
        return [name for name in names if not name.endswith("_stderr")]

    @property
    def pictures(self) -> bool:
        """Whether the samples are pictures."""
        return any("picture" in sample for rows in self.samples.values() for some in rows.values() for sample in some)


def read_run(target: str) -> Run:
    """The run in a folder or results.json; with NAME=PATH, only its last method, under that name.

    Raises: UsageError if there is no such file, MismatchError for a file that `mole evaluate` did not write.
    """
    name, path = _split(target)
    file = path / RESULTS_FILE if path.is_dir() else path
    if not path.exists():
        raise UsageError(str(path), "no such file or folder", "Name folders that mole evaluate wrote.")
    if not file.is_file():
        raise UsageError(str(path), f"there is no {RESULTS_FILE} in it", "Name folders that mole evaluate wrote.")
    content = _content(file)
    subject = content["model_name"]
    methods = {name: subject} if name else {method: method for method in content["methods"]}
    paths = samples_paths(file.parent, content["results"])
    return Run(target, content, {task: _samples(path) for task, path in paths.items()}, methods)


def _split(target: str) -> tuple[str | None, Path]:
    """(NAME, PATH) of NAME=PATH; an existing path can contain the sign itself."""
    name, sign, path = target.partition("=")
    return (None, Path(target)) if not sign or not name or Path(target).exists() else (name, Path(path))


def _content(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise MismatchError(str(file), "it cannot be read as JSON", AGAIN) from None
    parts = ("results", "methods", "versions", "metric_versions")
    whole = isinstance(content, dict) and isinstance(content.get("model_name"), str)
    if not whole or not all(isinstance(content.get(part), dict) for part in parts):
        raise MismatchError(str(file), "mole evaluate did not write it", "Name folders that mole evaluate wrote.")
    return content


def _samples(path: Path) -> dict[str, list[Sample]]:
    found: dict[str, list[Sample]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        what = "it cannot be read, and runs are compared by their samples"
        raise MismatchError(str(path), what, f"Keep it beside {RESULTS_FILE}.") from None
    for number, line in enumerate(lines, start=1):
        try:
            sample = json.loads(line)
            found.setdefault(sample["method"], []).append(sample)
            _example(sample)
        except (ValueError, KeyError, TypeError):
            raise MismatchError(f"{path}, line {number}", "it is not a sample of mole evaluate", AGAIN) from None
    return found


def _example(sample: Sample) -> tuple[Any, ...]:
    if "picture" in sample:
        return (*_scene(sample), sample["seed"])
    return sample["prompt"], sample["target"], tuple(sample["answers"])


def _scene(sample: Sample) -> tuple[Any, ...]:
    return sample["scene"], sample["prompt"], tuple(sample["loras"])


# Parts of results.json that have an entry for each task, or for each metric of a task.
_BY_TASK = ("n-shot", "versions", "n-samples", "configs", "higher_is_better", "metric_versions", "normalisers")


def joined(runs: Sequence[Run]) -> Run:
    """Runs of the same methods over different tasks as one run, with the path of the first."""
    first = runs[0]
    results = {task: scores for run in runs for task, scores in run.content["results"].items()}
    samples = {task: by for run in runs for task, by in run.samples.items()}
    merged = {
        key: {k: v for run in runs for k, v in run.content[key].items()} for key in _BY_TASK if key in first.content
    }
    return Run(first.place, {**first.content, **merged, "results": results}, samples, first.methods)


def whole_runs(runs: Sequence[Run]) -> list[Run]:
    """The runs, after joining parts: runs of the same methods without a common task. A run with a task that is there
    already starts the next repetition.

    Raises: MismatchError if one name has two settings, or scores that were not computed alike.
    """
    groups: list[list[Run]] = []
    for run in runs:
        group = next((some for some in groups if all(_are_parts(one, run) for one in some)), None)
        if group is None:
            groups.append([run])
            continue
        for one in group:
            _check_parts(one, run)
        group.append(run)
    return [joined(some) for some in groups]


def _are_parts(first: Run, run: Run) -> bool:
    return run.methods == first.methods and run.content["results"].keys().isdisjoint(first.content["results"])


def _check_parts(first: Run, run: Run) -> None:
    for method in run.methods:
        check_settings(method, first, run)
    _check_alike("the CLIP", first, run, lambda content: content.get("clip"))
    for metric in sorted(run.content["metric_versions"].keys() & first.content["metric_versions"]):
        _check_alike(f"the metric {metric}", first, run, _version(metric))


def check_tasks(runs: Sequence[Run], tasks: Iterable[str]) -> None:
    """Raises: MismatchError if a run lacks one of the tasks."""
    for task in tasks:
        holder = next(run for run in runs if task in run.content["results"])
        for run in runs:
            if task not in run.content["results"]:
                what = f"it has no task {task!r}, which {holder.place} has"
                raise MismatchError(run.place, what, "Write --tasks with the tasks that all runs have.")


def check_versions(first: Run, run: Run, task: str, metric: str) -> None:
    """Raises: MismatchError if a run lacks the metric, or computed its scores in another way than `first`."""
    if metric not in run.scores(task):
        remedy = f"Write --metrics with some of: {', '.join(run.scores(task))}."
        raise MismatchError(run.place, f"the task {task!r} is not scored by {metric}", remedy)
    versions: dict[str, Callable[[Mapping[str, Any]], Any]] = {
        f"the metric {metric}": _version(metric),
        "the longest completion": lambda content: _longest(content, task),
    }
    if first.content.get("suite") == run.content.get("suite"):
        versions[f"the suite of {task!r}"] = lambda content: content["versions"].get(task)
    if metric.endswith("_alignment"):
        versions["the CLIP"] = lambda content: content.get("clip")
    for what, of in versions.items():
        _check_alike(what, first, run, of)


def _version(metric: str) -> Callable[[Mapping[str, Any]], Any]:
    return lambda content: content["metric_versions"].get(metric)


def _check_alike(what: str, first: Run, run: Run, of: Callable[[Mapping[str, Any]], Any]) -> None:
    here, there = of(run.content), of(first.content)
    if here != there:
        difference = f"{what} is {here} here and {there} in {first.place}"
        raise MismatchError(run.place, difference, "Evaluate both alike.")


def _longest(content: Mapping[str, Any], task: str) -> Any:
    """The longest completion; None for pictures."""
    return content.get("configs", {}).get(task, {}).get("generation_kwargs", {}).get("max_gen_toks")


def check_settings(method: str, first: Run, run: Run) -> None:
    """Raises: MismatchError if one name has two settings."""
    for name in SETTINGS:
        here, there = (_setting(one.content.get("config"), name, one.methods[method]) for one in (run, first))
        if here != there:
            what = f"the method {method!r} is also in {first.place}, and `{name}` differs between their recipes"
            raise MismatchError(run.place, what, "Give the last method of each its own name: NAME=PATH.")


def _setting(config: Any, name: str, method: str) -> Any:
    found = config.get(name) if isinstance(config, dict) else None
    if name in ("mask", "only") and found is not None:
        return _own_choice(config, name, method)
    # Only names and weights: the same LoRAs trained with other seeds are in other folders.
    return [(lora["name"], lora["weight"]) for lora in found or ()] if name == "loras" else found


def _own_choice(config: Mapping[str, Any], name: str, method: str) -> list[str]:
    """The `mask` or `only` of one method; if there are several choices, the method's name ends with its own."""
    several = choices(config.get("mask", ()), config.get("only", ()))
    if len(several) == 1:
        return list(getattr(several[0], name))
    own = [choice for choice in several if choice.label and method.endswith(choice.label)]
    return list(getattr(max(own, key=lambda choice: len(choice.label)), name)) if own else []


def check_examples(task: str, first: Run, run: Run, samples: tuple[Mapping[Key, Sample], Mapping[Key, Sample]]) -> None:
    """Raises: MismatchError if `samples`, of a method of `first` and one of `run`, are not of the same examples.

    Pictures only need the same scenes.
    """
    pictures = any("picture" in sample for sample in samples[1].values())
    there, here = ({_scene(sample) for sample in some.values()} if pictures else set(some) for some in samples)
    if here != there:
        kind = "scenes" if pictures else "examples"
        what = f"its {kind} of the task {task!r} are not those of {first.place} ({counts(len(here), len(there))}"
        remedy = "Compare runs on the same data, split, --limit and --holdout."
        raise MismatchError(run.place, f"{what}, {len(here & there)} of them shared)", remedy)


def counts(here: int, there: int) -> str:
    """Two counts for a message."""
    return f"{here} here, {there} there"
