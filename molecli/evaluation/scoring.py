"""Scoring: completions of a frozen backbone against the answers of each task.

The caller attaches the composition that is scored (see `text.evaluate`).
Contents: Result, TaskResult, percent, percents, scored, scored_samples, score_tasks, generate, completion, own_lora.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from typing import Any, Protocol

import torch

from molecli.bases.out_of_memory import freed, out_of_memory
from molecli.catalog.metrics import metric_row
from molecli.errors import RunError, UsageError
from molecli.functional.bootstrap import Scored, of_means
from molecli.metrics import aggregate, load_metric, load_sums
from molecli.protocols import Backbone, Completion, Example, Progress

# What the row over all tasks is called.
AVERAGE = "average"
# What the column of each LoRA on its own task is called.
OWN_LORA = "own LoRA"


class Result(Protocol):
    """One method's result on one task. scores: one per sample, by metric (the main one first); values: the totals.

    counts: how many samples the task has, and how many of them are scored.
    """

    @property
    def task(self) -> str: ...
    @property
    def scores(self) -> Mapping[str, Sequence[float]]: ...
    @property
    def values(self) -> Mapping[str, float]: ...
    @property
    def counts(self) -> tuple[int, int]: ...
    def samples(self) -> list[dict[str, Any]]:
        """The samples as in samples_<task>.jsonl, with their scores."""
        ...


def main_metric(result: Result) -> str:
    """The metric that tables and comparisons show if only one is wanted."""
    return next(iter(result.scores))


def percent(result: Result, metric: str | None = None) -> float:
    """The task's score by `metric` (the main one when None) in [0, 100]."""
    name = metric or main_metric(result)
    return 100 * result.values[name] / metric_row(name).upper


def percents(result: Result, metric: str | None = None) -> list[float]:
    """The samples' scores by `metric` (the main one when None) in [0, 100]."""
    name = metric or main_metric(result)
    return [100 * score / metric_row(name).upper for score in result.scores[name]]


def scored(result: Result, metric: str | None = None) -> Scored:
    """The task's score by `metric` (the main one when None) in [0, 100], in a form for resampling."""
    return scored_samples([result.samples()], metric or main_metric(result))


def scored_samples(runs: Sequence[Sequence[Mapping[str, Any]]], metric: str) -> Scored:
    """The same from samples as in samples_<task>.jsonl, of one run or of several runs over the same examples."""
    upper, sums = metric_row(metric).upper, load_sums(metric)
    if sums is None:
        values = [[100 * sample[metric] / upper for sample in run] for run in runs]
        return of_means(torch.tensor(values, dtype=torch.float64))
    statistics, of_sums = sums
    rows = [
        statistics([sample["filtered_resps"][0] for sample in run], [sample["answers"] for sample in run])
        for run in runs
    ]
    return Scored(torch.tensor(rows, dtype=torch.float64), lambda totals: 100 * of_sums(totals) / upper)


@dataclass(frozen=True)
class TaskResult:
    """One task's examples, their outputs, and the scores by metric (the main one first), example by example."""

    task: str
    examples: tuple[Example, ...]
    outputs: tuple[str, ...]
    completions: tuple[str, ...]
    scores: Mapping[str, tuple[float, ...]]
    values: Mapping[str, float]

    @property
    def metric(self) -> str:
        """The main metric."""
        return main_metric(self)

    @property
    def percent(self) -> float:
        """The task's main score in [0, 100]."""
        return percent(self)

    @property
    def percents(self) -> list[float]:
        """The main scores of the examples, in [0, 100]."""
        return percents(self)

    @property
    def counts(self) -> tuple[int, int]:
        """All examples are scored."""
        return len(self.examples), len(self.examples)

    def samples(self) -> list[dict[str, Any]]:
        """Prompts and raw outputs, close to lm-eval's, so that scoring them again needs no second run."""
        return [
            {
                "prompt": example.prompt,
                "target": example.target,
                "answers": list(example.answers),
                "prompt_hash": _hash(example.prompt),
                "target_hash": _hash(example.target),
                "resps": [[self.outputs[i]]],
                "filtered_resps": [self.completions[i]],
                **{metric: scores[i] for metric, scores in self.scores.items()},
            }
            for i, example in enumerate(self.examples)
        ]


def score_tasks(
    backbone: Backbone,
    tasks: Mapping[str, Sequence[Example]],
    *,
    metrics: Mapping[str, Sequence[str]],
    max_new_tokens: Mapping[str, int],
    batch_size: int = 32,
    progress: Progress | None = None,
    label: str = "evaluate",
) -> list[TaskResult]:
    """The results of every task, in the order of `tasks`, with greedy decoding.

    Raises: UsageError for an unknown metric or a task without examples, before anything is generated.
    """
    for task, examples in tasks.items():
        for metric in metrics[task]:
            load_metric(metric)
        if not examples:
            raise UsageError(f"task {task}", "there are no examples to score", "Check its file and the split.")
    total, done = sum(len(examples) for examples in tasks.values()), 0
    outputs: dict[str, list[str]] = {}
    # Tasks with the same longest answer share batches: small tasks alone would leave most of each batch empty.
    for longest in dict.fromkeys(max_new_tokens[task] for task in tasks):
        alike = {task: examples for task, examples in tasks.items() if max_new_tokens[task] == longest}
        rows = [example for examples in alike.values() for example in examples]

        def step(count: int, before: int = done) -> None:
            if progress is not None:
                progress(label, before + count, total)

        made = iter(generate(backbone, rows, max_new_tokens=longest, batch_size=batch_size, progress=step))
        outputs |= {task: list(islice(made, len(examples))) for task, examples in alike.items()}
        done += len(rows)
    return [score(task, examples, outputs[task], metrics[task]) for task, examples in tasks.items()]


def generate(
    backbone: Backbone,
    examples: Sequence[Example],
    *,
    max_new_tokens: int,
    batch_size: int,
    progress: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """The raw outputs, in the order of `examples`. A batch that does not fit in memory is split.

    Raises: RunError if a single example does not fit.
    """
    # Longest first: prompts of similar length share a batch, and a batch that is too large fails right away.
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].prompt))
    outputs, done = [""] * len(examples), 0
    while done < len(order):
        batch = order[done : done + batch_size]
        made = _attempt(backbone, [examples[i].prompt for i in batch], max_new_tokens)
        if made is None:
            batch_size = _smaller(len(batch))
            continue
        for i, output in zip(batch, made, strict=True):
            outputs[i] = output
        done += len(batch)
        progress(done)
    return outputs


def _attempt(backbone: Backbone, prompts: Sequence[str], max_new_tokens: int) -> Sequence[str] | None:
    """The completions; None if they did not fit in memory together."""
    try:
        return backbone.generate(prompts, max_new_tokens=max_new_tokens)
    except Exception as error:
        if not out_of_memory(error):
            raise
        freed(error)
        return None


def _smaller(size: int) -> int:
    """Half of `size`, after a warning. Raises: RunError for 1."""
    if size == 1:
        what = "one example does not fit in memory"
        raise RunError("evaluate", what, "Write --dtype bfloat16, or end other programs that use the device.")
    warnings.warn(f"{size} examples at once do not fit in memory: completing {size // 2} at once", stacklevel=3)
    return size // 2


def score(task: str, examples: Sequence[Example], outputs: Sequence[str], metrics: Sequence[str]) -> TaskResult:
    """The outputs of one task, scored by every metric."""
    answers = [example.answers for example in examples]
    completions = [completion(output, accepted) for output, accepted in zip(outputs, answers, strict=True)]
    scores = {metric: tuple(load_metric(metric)(completions, answers)) for metric in metrics}
    values = {metric: aggregate(metric, completions, answers, scores[metric]) for metric in metrics}
    return TaskResult(task, tuple(examples), tuple(outputs), tuple(completions), scores, values)


def completion(output: str, answers: Sequence[str]) -> str:
    """The part of an output that is scored: its first line, unless an answer has several lines.

    A base model that was never trained to stop goes on after its answer, and a reasoning model thinks before it. The
    raw output is kept too.
    """
    said = output.answer if isinstance(output, Completion) else output
    text = (said or "").strip()
    if any("\n" in answer.strip() for answer in answers):
        return text
    return text.partition("\n")[0].rstrip()


def own_lora(
    methods: Mapping[str, Sequence[TaskResult]], owners: Mapping[str, str] | None = None
) -> list[TaskResult] | None:
    """Each task's result with only its own LoRA: that in `owners` (task -> method), otherwise the one with its name.

    None if a task has no LoRA of its own.
    """
    tasks = [result.task for result in next(iter(methods.values()), [])]
    by_task = {name: {result.task: result for result in results} for name, results in methods.items()}
    owned = [by_task.get((owners or {}).get(task, task), {}).get(task) for task in tasks]
    found = [result for result in owned if result is not None]
    return found if tasks and len(found) == len(tasks) else None


def _hash(text: str) -> str:
    """The same hash as lm-eval's. It shows whether two runs had the same prompts without reading them."""
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
