"""Loads the metrics in `catalog.metrics`. A new metric is one file and one row there.

A metric scores each completion separately, against all right answers, so that scores can be compared example by example
(paired bootstrap). If the score of a task is not the mean of these scores (BLEU), `aggregate` computes it, and
`statistics` gives the summands of each example from which it follows. Metrics of pictures score each picture in the
same way, against its scene; see `metrics.image_batch`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from statistics import fmean
from typing import TYPE_CHECKING, Any

from molecli.catalog.metrics import METRICS, MetricRow, metric_row
from molecli.errors import UsageError
from molecli.protocols import Metric

if TYPE_CHECKING:
    from molecli.metrics.image_batch import PictureMetric

Aggregate = Callable[[Sequence[str], Sequence[Sequence[str]]], float]


def load_metric(name: str) -> Metric:
    """The scoring function of a metric of completions. Raises: UsageError for other metrics."""
    metric: Metric = _load(_row_for(name, "texts").score)
    return metric


def load_picture_metric(name: str) -> PictureMetric:
    """The scoring function of a metric of pictures. Raises: UsageError for other metrics."""
    metric: PictureMetric = _load(_row_for(name, "pictures").score)
    return metric


def _row_for(name: str, takes: str) -> MetricRow:
    row = metric_row(name)
    if row.takes != takes:
        known = ", ".join(key for key, other in METRICS.items() if other.takes == takes)
        raise UsageError("metrics", f"{name!r} scores {row.takes}, not {takes}", f"Write some of: {known}.")
    return row


def aggregate(
    name: str, predictions: Sequence[str], answers: Sequence[Sequence[str]], scores: Sequence[float]
) -> float:
    """The score of a task: the mean of `scores`, or the `aggregate` of the metric."""
    target = metric_row(name).aggregate
    if target is None:
        return fmean(scores)
    whole: Aggregate = _load(target)
    return whole(predictions, answers)


def load_sums(
    name: str,
) -> tuple[Callable[[Sequence[str], Sequence[Sequence[str]]], list[list[float]]], Callable[[Any], Any]] | None:
    """(the summands of each example, the score of sums [..., k]); None if the score is a mean."""
    row = metric_row(name)
    return None if row.statistics is None or row.of_sums is None else (_load(row.statistics), _load(row.of_sums))


def _load(target: str):  # type: ignore[no-untyped-def]  # whatever the row names
    module, attribute = target.split(":")
    return getattr(import_module(module), attribute)
