"""Win rates: strictly higher wins, tasks weigh alike, intervals are the bootstrap's."""

from __future__ import annotations

import pytest
import torch

from molecli.functional.bootstrap import bootstrap
from molecli.metrics.judge import Failure, Judgement, Pair, Verdict
from molecli.metrics.judge.pair import Reply
from molecli.metrics.judge.parse import Scores
from molecli.metrics.judge.summary import matchups


def judgement(task: str, case: str, mine: float, theirs: float, method: str = "switch") -> Judgement:
    """One with composition scores `mine` and `theirs`, and image scores the other way round."""
    scores = Scores(mine, theirs), Scores(theirs, mine)
    pair = Pair(task, case, method, "merge", (), None, None)
    return Judgement(pair, "", (Reply("", scores, 1), Reply("", (scores[1], scores[0]), 1)))


VERDICTS: list[Verdict] = [
    judgement("2", "a", 8, 6),
    judgement("2", "b", 7, 7),
    judgement("2", "c", 5, 6.5),
    judgement("2", "d", 9, 3),
    judgement("3", "a", 4, 3.5),
    judgement("3", "b", 4, 8),
]


def test_wins_ties_and_losses_are_counted_by_dimension() -> None:
    composition, image = matchups(VERDICTS, samples=0)
    assert (composition.dimension, image.dimension) == ("composition", "image")
    assert (composition.wins, composition.ties, composition.losses) == (3, 1, 2)
    assert (image.wins, image.ties, image.losses) == (2, 1, 3)


def test_tasks_weigh_alike_whatever_their_size() -> None:
    composition, _ = matchups(VERDICTS, samples=0)
    assert composition.win == pytest.approx((2 / 4 + 1 / 2) / 2)
    assert composition.loss == pytest.approx((1 / 4 + 1 / 2) / 2)
    assert composition.score == pytest.approx(((8 + 7 + 5 + 9) / 4 + 4) / 2)
    assert composition.baseline_score == pytest.approx(((6 + 7 + 6.5 + 3) / 4 + 5.75) / 2)
    assert composition.difference == pytest.approx(composition.score - composition.baseline_score)


def test_intervals_are_the_bootstrap_of_wins_losses_and_differences() -> None:
    composition, _ = matchups(VERDICTS, samples=200, seed=3)
    expected = {
        "win_interval": [[1, 0, 0, 1], [1, 0]],
        "loss_interval": [[0, 0, 1, 0], [0, 1]],
        "difference_interval": [[2, 0, -1.5, 6], [0.5, -4]],
    }
    for name, rows in expected.items():
        tasks = [torch.tensor(row, dtype=torch.float64) for row in rows]
        interval = bootstrap(tasks, generator=torch.Generator().manual_seed(3), samples=200)
        assert getattr(composition, name) == interval
        assert interval.low < interval.high


def test_no_samples_no_intervals() -> None:
    composition, _ = matchups(VERDICTS, samples=0)
    assert composition.win_interval is composition.loss_interval is composition.difference_interval is None


def test_failures_are_counted_and_score_nothing() -> None:
    failed: Verdict = Failure(Pair("2", "e", "switch", "merge", (), None, None), "answer", "the judge declines")
    with_failure, _ = matchups([*VERDICTS, failed], samples=0)
    without, _ = matchups(VERDICTS, samples=0)
    assert (with_failure.failed, without.failed) == (1, 0)
    assert (with_failure.win, with_failure.score) == (without.win, without.score)


def test_every_method_has_its_contests_and_its_intervals_do_not_depend_on_the_others() -> None:
    more = [*VERDICTS, judgement("2", "a", 1, 2, "composite"), judgement("2", "b", 3, 2, "composite")]
    rows = matchups(more, samples=50, seed=1)
    assert [(row.method, row.dimension) for row in rows] == [
        ("switch", "composition"),
        ("switch", "image"),
        ("composite", "composition"),
        ("composite", "image"),
    ]
    assert rows[:2] == matchups(VERDICTS, samples=50, seed=1)


def test_a_method_that_was_never_judged_has_no_contest() -> None:
    failed: Verdict = Failure(Pair("2", "e", "nla", "merge", (), None, None), "picture", "nla drew no picture")
    assert [row.method for row in matchups([*VERDICTS, failed], samples=0)] == ["switch", "switch"]


def test_a_contest_is_one_line() -> None:
    failed: Verdict = Failure(Pair("2", "e", "switch", "merge", (), None, None), "answer", "the judge declines")
    composition, _ = matchups([*VERDICTS, failed], samples=0)
    text = "switch against merge, composition quality: wins 50.0%, loses 37.5% of 6 pairs; 5.62 against 5.69"
    assert str(composition) == f"{text}; 1 pairs failed"
    assert "wins 50.0% [" in str(matchups(VERDICTS, samples=20)[0])
