"""The files of an evaluation: results.json and samples_<task>.jsonl, close to lm-eval's.

`results` holds the scores of the main method ({task: {"exact_match,none": ..}}), where lm-eval's readers look for them.
`methods` holds those of every method, `average` their means over tasks in percent, and `comparisons` the paired
bootstrap. The rest is what scores depend on: versions of suite, metrics and libraries, the metrics' normalisers, how
completions were generated. There is no date or time, so the same run gives the same file.
"""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from molecli import __version__
from molecli.catalog.metrics import metric_row
from molecli.evaluation.scoring import AVERAGE, Result, percent, percents, scored
from molecli.files.atomic import write_text
from molecli.functional.bootstrap import Interval, bootstrap, compare_scores, standard_error

Methods = Mapping[str, Sequence[Result]]
RESULTS_FILE = "results.json"
LIBRARIES = ("torch", "transformers", "diffusers", "peft", "datasets", "sacrebleu", "rouge-score")
_UNSAFE = re.compile(r"[^\w.-]+")


@dataclass(frozen=True)
class Comparison:
    """first − second in percentage points, averaged over tasks, with its bootstrap interval.

    metric: the metric that was compared; None for each task's main metric.
    """

    first: str
    second: str
    difference: float
    low: float
    high: float
    level: float
    metric: str | None = None

    def __str__(self) -> str:
        share, of = f"{100 * self.level:.0f}%", f", {self.metric}" if self.metric else ""
        numbers = f"{self.difference:+.1f} [{self.low:+.1f}, {self.high:+.1f}] ({share})"
        return f"{self.first} − {self.second}{of}: {numbers}"

    def document(self) -> dict[str, Any]:
        """The comparison as JSON stores it."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def compare(methods: Methods, subject: str, *, samples: int, seed: int, metric: str | None = None) -> list[Comparison]:
    """`subject` against every other method scored on the same examples; [] without samples.

    With `metric`, by that metric, over the tasks that have it.
    """
    if samples == 0:
        return []
    first = methods[subject]
    rows = []
    for name, results in methods.items():
        if name != subject:
            found = _interval(first, results, samples, seed, metric)
            rows.append(Comparison(subject, name, found.estimate, found.low, found.high, found.level, metric))
    return rows


def _interval(
    first: Sequence[Result], second: Sequence[Result], samples: int, seed: int, metric: str | None
) -> Interval:
    # The same seed for every pair, so that adding a method does not change the other intervals.
    one, other = (
        [scored(r, metric) for r in results if metric is None or metric in r.scores] for results in (first, second)
    )
    return compare_scores(one, other, seed=seed, samples=samples)


def intervals(methods: Methods, *, samples: int, seed: int) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Metric -> method -> task or "average" -> [low, high] in percent; {} without samples."""
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for name, results in methods.items() if samples else ():
        for metric in dict.fromkeys(metric for result in results for metric in result.scores):
            scores = {r.task: torch.tensor(percents(r, metric)) for r in results if metric in r.scores}
            cells = {task: [one] for task, one in scores.items()} | {AVERAGE: list(scores.values())}
            ranges = found.setdefault(metric, {})[name] = {}
            for cell, values in cells.items():
                interval = bootstrap(values, generator=torch.Generator().manual_seed(seed), samples=samples)
                ranges[cell] = [interval.low, interval.high]
    return found


def average(results: Sequence[Result]) -> float:
    """The mean over tasks of the main score, in percent."""
    return fmean(percent(result) for result in results)


def document(
    methods: Methods,
    subject: str,
    *,
    suite: tuple[str, str],
    comparisons: Sequence[Comparison],
    max_new_tokens: Mapping[str, int] | None = None,
    config: Any = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """The content of results.json; `suite` is the suite's name and version, `config` the resolved recipe.

    max_new_tokens: the longest completion by task; None for pictures. device: where the base ran.
    """
    shown = methods[subject]
    names = sorted({metric for result in shown for metric in result.scores})
    return {
        "model_name": subject,
        "results": _scores(shown),
        "methods": {name: _scores(results) for name, results in methods.items()},
        "average": {name: average(results) for name, results in methods.items()},
        "comparisons": [comparison.document() for comparison in comparisons],
        "configs": {result.task: _task_config(result, suite, max_new_tokens) for result in shown},
        "versions": {result.task: suite[1] for result in shown},
        "n-shot": {result.task: 0 for result in shown},
        "metric_versions": {name: metric_row(name).version for name in names},
        "normalisers": {name: metric_row(name).summary for name in names},
        "higher_is_better": {r.task: {m: metric_row(m).direction == "higher" for m in r.scores} for r in shown},
        "n-samples": {r.task: {"original": r.counts[0], "effective": r.counts[1]} for r in shown},
        "suite": suite[0],
        "molecli_version": __version__,
        "libraries": _libraries(),
        "device": device_name(device),
        "config": config,
    }


def device_name(device: torch.device | str) -> str:
    """The name of the accelerator, or the number of CPU cores and the kind of processor."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} CPU cores ({platform.machine()})"


def _task_config(result: Result, suite: tuple[str, str], max_new_tokens: Mapping[str, int] | None) -> dict[str, Any]:
    """A task's entry in lm-eval's `configs`: how its samples were generated and scored."""
    made: dict[str, Any] = {"output_type": "generate_image"}
    if max_new_tokens is not None:
        kwargs = {"do_sample": False, "max_gen_toks": max_new_tokens[result.task]}
        made = {"output_type": "generate_until", "generation_kwargs": kwargs}
    rows = {name: metric_row(name) for name in result.scores}
    metrics = [
        {
            "metric": name,
            "aggregation": "mean" if row.aggregate is None else name,
            "higher_is_better": row.direction == "higher",
        }
        for name, row in rows.items()
    ]
    shared = {"task": result.task, "dataset_name": suite[0], "num_fewshot": 0, "metadata": {"version": suite[1]}}
    return {**shared, **made, "metric_list": metrics}


def _libraries() -> dict[str, str]:
    """The versions of the libraries that generate and score the samples."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _scores(results: Sequence[Result]) -> dict[str, dict[str, Any]]:
    tasks = {}
    for result in results:
        row: dict[str, Any] = {"alias": result.task}
        for metric, value in result.values.items():
            row[f"{metric},none"] = value
            # The standard error of mean sentence scores is not that of corpus BLEU; lm-eval writes N/A too.
            mean = metric_row(metric).aggregate is None
            row[f"{metric}_stderr,none"] = standard_error(torch.tensor(result.scores[metric])) if mean else "N/A"
        tasks[result.task] = row
    return tasks


def write(folder: str | Path, content: Mapping[str, Any], methods: Methods) -> Path:
    """The path of results.json, after writing all files; no file is ever incomplete."""
    for task, path in samples_paths(folder, content["results"]).items():
        write_text(path, "".join(_sample_lines(methods, task)))
    # Written last: whoever finds results.json also finds its samples.
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False, default=str)
    return write_text(Path(folder) / RESULTS_FILE, text + "\n")


def samples_paths(folder: str | Path, tasks: Iterable[str]) -> dict[str, Path]:
    """Task -> samples_<task>.jsonl; characters that are unsafe in file names are replaced."""
    paths: dict[str, Path] = {}
    for task in tasks:
        stem = "samples_" + _UNSAFE.sub("_", task)
        # "a b" and "a/b" are two tasks, and neither may overwrite the other's samples.
        taken = {path.stem for path in paths.values()}
        names = (stem, *(f"{stem}-{n}" for n in range(2, len(taken) + 2)))
        paths[task] = Path(folder) / f"{next(name for name in names if name not in taken)}.jsonl"
    return paths


def _sample_lines(methods: Methods, task: str) -> list[str]:
    return [
        json.dumps({"doc_id": i, "method": method, **sample}, ensure_ascii=False) + "\n"
        for method, results in methods.items()
        for result in results
        if result.task == task
        for i, sample in enumerate(result.samples())
    ]
