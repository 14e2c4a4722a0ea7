"""BLEU through sacrebleu (Post, 2018), with its default tokenizer (13a) and smoothing (exp)."""

from __future__ import annotations

from collections.abc import Sequence

from sacrebleu.metrics import BLEU


def score(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> list[float]:
    """Sentence BLEU in [0, 100]: for paired comparison only, since their mean is not BLEU (see `corpus`)."""
    # effective_order: without it every sentence shorter than four words scores 0.
    metric = BLEU(effective_order=True)
    return [
        float(metric.sentence_score(prediction, list(accepted)).score)
        for prediction, accepted in zip(predictions, answers, strict=True)
    ]


def corpus(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU in [0, 100] over all references of every example."""
    depth = max(len(accepted) for accepted in answers)
    # sacrebleu reads None as "this example has fewer references than others".
    streams = [[a[i] if i < len(a) else None for a in answers] for i in range(depth)]
    return float(BLEU().corpus_score(list(predictions), streams).score)
