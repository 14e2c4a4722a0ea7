"""BLEU is sacrebleu's: parity with its own functions, with one and with many references."""

from __future__ import annotations

import pytest
import sacrebleu

from molecli.metrics import aggregate, load_metric

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
