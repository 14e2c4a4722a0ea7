"""The metrics: one row each, which names the scoring function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from molecli.catalog.table import Table
from molecli.errors import UsageError, suggestion

# What a metric compares pictures with: the first two by CLIP, the last by the recogniser.
Compared = Literal["prompts", "concept pictures", "classes"]


@dataclass(frozen=True)
class MetricRow:
    """A metric. Scores lie in [0, upper]. Raise `version` when a score can change.

    score: module:attribute of the function. aggregate: the function of the task's score, if that is not the mean;
    statistics, of_sums: for resampling such a score: the summands of an example, and the score of the sums.
    takes: completions or pictures. reads: what it compares pictures with; the scenes must provide it.
    """

    name: str
    score: str
    summary: str
    aggregate: str | None = None
    statistics: str | None = None
    of_sums: str | None = None
    upper: float = 1.0
    direction: Literal["higher", "lower"] = "higher"
    version: str = "1"
    takes: Literal["texts", "pictures"] = "texts"
    reads: tuple[Compared, ...] = ()

    @property
    def asks_clip(self) -> bool:
        """Whether it needs CLIP."""
        return bool({"prompts", "concept pictures"} & set(self.reads))


METRICS: Table[MetricRow] = Table(
    "molecli.metrics",
    MetricRow,
    (
        MetricRow(
            "exact_match",
            "molecli.metrics.exact_match:strict",
            "equal to an answer after stripping white space",
        ),
        MetricRow(
            "exact_match_lm_eval",
            "molecli.metrics.exact_match:lm_eval",
            "lm-eval's ignore_case and ignore_punctuation: also lower case, no punctuation",
        ),
        MetricRow(
            "exact_match_lorahub",
            "molecli.metrics.exact_match:lorahub",
            "LoRAHub's scoring of BBH: lower case, full stops removed",
        ),
        MetricRow(
            "accuracy", "molecli.metrics.accuracy:score", "first word equal to the label, case and punctuation aside"
        ),
        MetricRow("set_match", "molecli.metrics.set_match:score", "the same set of words, in any order"),
        MetricRow("f1", "molecli.metrics.f1:score", "overlap of words, harmonic mean of precision and recall"),
        MetricRow(
            "bleu",
            "molecli.metrics.bleu:score",
            "sacrebleu; the task's score is corpus BLEU",
            aggregate="molecli.metrics.bleu:corpus",
            statistics="molecli.metrics.bleu:statistics",
            of_sums="molecli.metrics.bleu:of_sums",
            upper=100.0,
        ),
        MetricRow("rouge1", "molecli.metrics.rouge:rouge1", "rouge-score, F of unigrams"),
        MetricRow("rouge2", "molecli.metrics.rouge:rouge2", "rouge-score, F of bigrams"),
        MetricRow("rougeL", "molecli.metrics.rouge:rougeL", "rouge-score, F of the longest common subsequence"),
        MetricRow(
            "text_alignment",
            "molecli.metrics.alignment:text",
            "CLIP cosine of the picture and its prompt",
            takes="pictures",
            reads=("prompts",),
        ),
        MetricRow(
            "image_alignment",
            "molecli.metrics.alignment:image",
            "mean CLIP cosine of the picture and each concept's pictures, mean over the concepts",
            takes="pictures",
            reads=("concept pictures",),
        ),
        MetricRow(
            "recognised",
            "molecli.metrics.recognised:score",
            "share of the scene's concepts that the recogniser finds",
            takes="pictures",
            reads=("classes",),
        ),
    ),
)


def metric_row(name: str) -> MetricRow:
    """The row of a metric. Raises: UsageError that suggests the nearest name."""
    if name not in METRICS:
        raise UsageError("metrics", f"no metric is called {name!r}", suggestion(name, METRICS))
    return METRICS[name]
