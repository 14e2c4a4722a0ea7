"""BLEU through sacrebleu (Post, 2018), with its default tokenizer (13a) and smoothing (exp).

score, corpus       BLEU of a sentence, and of a set     statistics, of_sums    BLEU of a set from sums over sentences
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sacrebleu.metrics import BLEU
from torch import Tensor

ORDER = 4


def score(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> list[float]:
    """Sentence BLEU in [0, 100]. Only for paired comparison: the mean is not BLEU (see `corpus`)."""
    # effective_order: without it every sentence shorter than four words scores 0.
    metric = BLEU(effective_order=True)
    return [
        float(metric.sentence_score(prediction, list(accepted)).score)
        for prediction, accepted in zip(predictions, answers, strict=True)
    ]


def corpus(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU in [0, 100] over all references of every example."""
    depth = max(len(accepted) for accepted in answers)
    # sacrebleu reads None as a missing reference.
    streams = [[a[i] if i < len(a) else None for a in answers] for i in range(depth)]
    return float(BLEU().corpus_score(list(predictions), streams).score)


def statistics(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> list[list[float]]:
    """The summands of each sentence: matching and all n-grams for n = 1 to 4, and both lengths."""
    metric = BLEU(effective_order=True)
    rows = []
    for prediction, accepted in zip(predictions, answers, strict=True):
        found = metric.sentence_score(prediction, list(accepted))
        rows.append([float(n) for n in (*found.counts, *found.totals, found.sys_len, found.ref_len)])
    return rows


def of_sums(sums: Tensor) -> Tensor:
    """Corpus BLEU [...] in [0, 100] of the sums [..., 10] of `statistics`, as in sacrebleu."""
    right, written = sums[..., :ORDER], sums[..., ORDER : 2 * ORDER]
    length, reference = sums[..., -2], sums[..., -1]
    # "exp": the k-th order without a match counts as 1 / 2^k.
    matches = torch.where(right == 0, 0.5 ** (right == 0).cumsum(dim=-1).to(sums), right)
    precision = (matches / written.clamp(min=1)).log().mean(dim=-1).exp()
    brevity = (1 - reference / length.clamp(min=1)).clamp(max=0).exp()
    usable = (right.sum(dim=-1) > 0) & (written > 0).all(dim=-1)
    return torch.where(usable, 100 * brevity * precision, torch.zeros_like(precision))
