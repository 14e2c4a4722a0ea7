"""Win rates of methods against the baseline, by dimension, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from molecli.functional.bootstrap import Interval, bootstrap
from molecli.metrics.judge.pair import Failure, Judgement, Outcome, Verdict
from molecli.metrics.judge.parse import DIMENSIONS, Dimension


@dataclass(frozen=True)
class Matchup:
    """One method against the baseline on one dimension.

    wins, ties, losses: numbers of pairs; win, loss: their rates in [0, 1]; score, baseline_score: mean scores, 0 to 10;
    difference: of the scores. Rates and scores are means over the judged pairs of each task, and then over tasks with
    equal weight. Intervals come from resampling pairs within tasks, and are None without samples.
    """

    method: str
    baseline: str
    dimension: Dimension
    wins: int
    ties: int
    losses: int
    failed: int
    win: float
    loss: float
    score: float
    baseline_score: float
    difference: float
    win_interval: Interval | None
    loss_interval: Interval | None
    difference_interval: Interval | None

    def __str__(self) -> str:
        text = f"{self.method} against {self.baseline}, {self.dimension} quality: wins {100 * self.win:.1f}%"
        if self.win_interval is not None:
            text += f" [{100 * self.win_interval.low:.1f}, {100 * self.win_interval.high:.1f}]"
        text += f", loses {100 * self.loss:.1f}% of {self.wins + self.ties + self.losses} pairs"
        text += f"; {self.score:.2f} against {self.baseline_score:.2f}"
        return text + (f"; {self.failed} pairs failed" if self.failed else "")


def matchups(verdicts: Sequence[Verdict], *, samples: int = 1000, seed: int = 0) -> list[Matchup]:
    """A contest for each method and dimension; methods without judged pairs have none."""
    rows = []
    for method, baseline in dict.fromkeys((v.pair.method, v.pair.baseline) for v in verdicts):
        mine = [v for v in verdicts if (v.pair.method, v.pair.baseline) == (method, baseline)]
        judged = [v for v in mine if isinstance(v, Judgement)]
        failed = sum(isinstance(v, Failure) for v in mine)
        rows += [_contest(judged, dimension, failed, samples, seed) for dimension in DIMENSIONS if judged]
    return rows


def _contest(judged: Sequence[Judgement], dimension: Dimension, failed: int, samples: int, seed: int) -> Matchup:
    outcomes = [judgement.outcome(dimension) for judgement in judged]
    marks = [(v.picture.on(dimension), v.other.on(dimension)) for v in judged]

    def by_task(values: Sequence[float]) -> list[Tensor]:
        tasks = [judgement.pair.task for judgement in judged]
        split = {
            name: [v for v, task in zip(values, tasks, strict=True) if task == name] for name in dict.fromkeys(tasks)
        }
        return [torch.tensor(scores, dtype=torch.float64) for scores in split.values()]

    def rate(wanted: Outcome) -> list[Tensor]:
        return by_task([float(outcome == wanted) for outcome in outcomes])

    def interval(tasks: Sequence[Tensor]) -> Interval | None:
        # One seed for all: other methods in the run do not change these intervals.
        return bootstrap(tasks, generator=torch.Generator().manual_seed(seed), samples=samples) if samples else None

    differences = by_task([mine - theirs for mine, theirs in marks])
    return Matchup(
        method=judged[0].pair.method,
        baseline=judged[0].pair.baseline,
        dimension=dimension,
        wins=outcomes.count("win"),
        ties=outcomes.count("tie"),
        losses=outcomes.count("loss"),
        failed=failed,
        win=_mean(rate("win")),
        loss=_mean(rate("loss")),
        score=_mean(by_task([mine for mine, _ in marks])),
        baseline_score=_mean(by_task([theirs for _, theirs in marks])),
        difference=_mean(differences),
        win_interval=interval(rate("win")),
        loss_interval=interval(rate("loss")),
        difference_interval=interval(differences),
    )


def _mean(tasks: Sequence[Tensor]) -> float:
    return torch.stack([scores.mean() for scores in tasks]).mean().item()
