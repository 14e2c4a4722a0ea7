"""ROUGE-1, ROUGE-2 and ROUGE-L with rouge-score, without stemming; the best answer counts.

rouge-score keeps only the letters a-z and digits, so that it is of little use for languages other than English.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from rouge_score.rouge_scorer import RougeScorer


def _f_measures(kind: str, predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> list[float]:
    scorer = RougeScorer([kind])
    return [
        float(scorer.score_multi(list(accepted), prediction)[kind].fmeasure)
        for prediction, accepted in zip(predictions, answers, strict=True)
    ]


rouge1 = partial(_f_measures, "rouge1")
rouge2 = partial(_f_measures, "rouge2")
rougeL = partial(_f_measures, "rougeL")
