"""BLEU is sacrebleu's: parity with its own functions, with one and with many references."""

from __future__ import annotations

import random

import pytest
import sacrebleu
import torch

from molecli.catalog.metrics import METRICS
from molecli.metrics import aggregate, load_metric, load_sums

PREDICTIONS = ["the cat sat on the mat today", "a dog barked at night"]
ANSWERS = [("the cat sat on a mat today", "the cat was on the mat today"), ("the dog barked all night",)]


def test_the_tasks_score_is_corpus_bleu_over_all_references() -> None:
    scores = load_metric("bleu")(PREDICTIONS, ANSWERS)
    references = [[answers[0] for answers in ANSWERS], [ANSWERS[0][1], None]]
    wanted = sacrebleu.corpus_bleu(PREDICTIONS, references).score
    assert aggregate("bleu", PREDICTIONS, ANSWERS, scores) == pytest.approx(wanted)
    assert wanted != pytest.approx(sum(scores) / len(scores))


def test_an_examples_score_is_sentence_bleu() -> None:
    wanted = [sacrebleu.sentence_bleu(p, list(a)).score for p, a in zip(PREDICTIONS, ANSWERS, strict=True)]
    assert load_metric("bleu")(PREDICTIONS, ANSWERS) == pytest.approx(wanted)


def test_a_right_answer_of_one_word_scores_full_marks_and_an_empty_one_none() -> None:
    assert load_metric("bleu")(["hello", ""], [("hello",), ("hello",)]) == pytest.approx([100.0, 0.0])


def test_the_sums_over_sentences_make_the_corpus_bleu_of_any_of_them() -> None:
    rng = random.Random(0)
    words = ["the", "a", "cat", "dog", "sat", "on", "mat", "ran", "to", "his", "old", "house", "and", "ate"]

    def sentence(longest: int) -> str:
        return " ".join(rng.choice(words) for _ in range(rng.randint(0, longest)))

    statistics, of_sums = load_sums("bleu")
    scores = []
    for longest in (2, 3, 6, 6, 14, 14, 14):
        predictions = [sentence(longest) for _ in range(6)]
        answers = [tuple(sentence(longest) or "the" for _ in range(rng.randint(1, 3))) for _ in range(6)]
        rows = torch.tensor(statistics(predictions, answers))
        for chosen in ([0, 1, 2, 3, 4, 5], [0, 0, 3], [5, 5, 5, 1]):
            some = [predictions[i] for i in chosen], [answers[i] for i in chosen]
            scores.append(aggregate("bleu", *some, []))
            assert of_sums(rows[chosen].sum(dim=0)).item() == pytest.approx(scores[-1], abs=1e-4)
    assert min(scores) == 0.0
    assert max(scores) > 5.0


def test_every_metric_that_is_no_mean_has_its_sums() -> None:
    for name, row in METRICS.items():
        assert (row.aggregate is None) == (load_sums(name) is None)
