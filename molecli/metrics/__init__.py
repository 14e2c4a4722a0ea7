"""Metrics: one row each, naming the file that scores it. A new metric is one file and one row.

A metric scores every completion by itself, against all answers that are right, so that scores can be compared example
by example (paired bootstrap). `aggregate` turns them into the task's score where that is not the mean (BLEU); such a
metric says in `statistics` what an example adds to the sums that the task's score follows from. Metrics that take
pictures score every picture by itself in the same way, against the scene it shows; see `metrics.shots`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from molecli.errors import UsageError
from molecli.files.near import suggestion
from molecli.protocols import Metric

if TYPE_CHECKING:
    from molecli.metrics.shots import PictureMetric

Aggregate = Callable[[Sequence[str], Sequence[Sequence[str]]], float]


@dataclass(frozen=True)
class MetricRow:
    """Where a metric lives and how to read it: scores lie in [0, upper]; raise `version` when a score can change.

    takes: what it scores, completions or pictures. statistics, of_sums: of a metric with `aggregate`, for resampling.
    """

    score: str
    summary: str
    aggregate: str | None = None
    statistics: str | None = None
    of_sums: str | None = None
    upper: float = 1.0
    direction: Literal["higher", "lower"] = "higher"
    version: str = "1"
    takes: Literal["texts", "pictures"] = "texts"


METRICS: dict[str, MetricRow] = {
    "exact_match": MetricRow("molecli.metrics.exact_match:strict", "equal to an answer after stripping white space"),
    "exact_match_lm_eval": MetricRow(
        "molecli.metrics.exact_match:lm_eval",
        "lm-eval's ignore_case and ignore_punctuation: also lower case, no punctuation",
    ),
    "exact_match_lorahub": MetricRow(
        "molecli.metrics.exact_match:lorahub", "LoRAHub's scoring of BBH: lower case, full stops removed"
    ),
    "accuracy": MetricRow(
        "molecli.metrics.accuracy:score", "first word equal to the label, case and punctuation aside"
    ),
    "set_match": MetricRow("molecli.metrics.set_match:score", "the same set of words, in any order"),
    "f1": MetricRow("molecli.metrics.f1:score", "overlap of words, harmonic mean of precision and recall"),
    "bleu": MetricRow(
        "molecli.metrics.bleu:score",
        "sacrebleu; the task's score is corpus BLEU",
        aggregate="molecli.metrics.bleu:corpus",
        statistics="molecli.metrics.bleu:statistics",
        of_sums="molecli.metrics.bleu:of_sums",
        upper=100.0,
    ),
    "rouge1": MetricRow("molecli.metrics.rouge:rouge1", "rouge-score, F of unigrams"),
    "rouge2": MetricRow("molecli.metrics.rouge:rouge2", "rouge-score, F of bigrams"),
    "rougeL": MetricRow("molecli.metrics.rouge:rougeL", "rouge-score, F of the longest common subsequence"),
    "text_alignment": MetricRow(
        "molecli.metrics.alignment:text", "CLIP cosine of the picture and its prompt", takes="pictures"
    ),
    "image_alignment": MetricRow(
        "molecli.metrics.alignment:image",
        "mean CLIP cosine of the picture and each concept's pictures, mean over the concepts",
        takes="pictures",
    ),
    "recognised": MetricRow(
        "molecli.metrics.recognised:score", "share of the scene's concepts that the recogniser finds", takes="pictures"
    ),
}


def metric_row(name: str) -> MetricRow:
    """The row of a metric. Raises: UsageError for an unknown name, with the nearest known one."""
    if name not in METRICS:
        raise UsageError("metrics", f"no metric is called {name!r}", suggestion(name, METRICS))
    return METRICS[name]


def load_metric(name: str) -> Metric:
    """The scoring function of a metric of completions. Raises: UsageError for an unknown one, or one of pictures."""
    metric: Metric = _load(_row_for(name, "texts").score)
    return metric


def load_picture_metric(name: str) -> PictureMetric:
    """The scoring function of a metric of pictures. Raises: UsageError for an unknown one, or one of completions."""
    metric: PictureMetric = _load(_row_for(name, "pictures").score)
    return metric


def _row_for(name: str, takes: str) -> MetricRow:
    row = metric_row(name)
    if row.takes != takes:
        known = ", ".join(key for key, other in METRICS.items() if other.takes == takes)
        raise UsageError("metrics", f"{name!r} scores {row.takes}, and here are {takes}", f"Write some of: {known}.")
    return row


def aggregate(
    name: str, predictions: Sequence[str], answers: Sequence[Sequence[str]], scores: Sequence[float]
) -> float:
    """One number for a task: the mean of `scores`, or what the metric's row says instead."""
    target = metric_row(name).aggregate
    if target is None:
        return fmean(scores)
    whole: Aggregate = _load(target)
    return whole(predictions, answers)


def load_sums(
    name: str,
) -> tuple[Callable[[Sequence[str], Sequence[Sequence[str]]], list[list[float]]], Callable[[Any], Any]] | None:
    """(what each example adds to the sums, the score of sums [..., k]); None where the score is a mean."""
    row = metric_row(name)
    return None if row.statistics is None or row.of_sums is None else (_load(row.statistics), _load(row.of_sums))


def _load(target: str):  # type: ignore[no-untyped-def]  # whatever the row names
    module, attribute = target.split(":")
    return getattr(import_module(module), attribute)
