"""Intervals for scores averaged over tasks: the (paired) percentile bootstrap.

Examples are drawn with replacement within each task, and the task means are averaged with equal weight. Tasks are not
resampled: the interval is for these tasks, with other examples.
Source: Efron and Tibshirani (1993), chapter 13; paired use after Koehn (2004).

Interval, bootstrap, paired_bootstrap    scores of examples, whose mean is the task's score
Scored, of_means, compare_scores         scores computed from sums over the examples (a mean, corpus BLEU), in one or
                                         several repetitions on the same examples
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_DRAWS_AT_ONCE = 2_000_000  # indices held in memory at a time, 16 MB


@dataclass(frozen=True)
class Interval:
    """An estimate with its central interval at `level`."""

    estimate: float
    low: float
    high: float
    level: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval excludes zero: then a difference is significant at this level."""
        return self.low > 0 or self.high < 0


def resampled_means(scores: Tensor, *, samples: int, generator: torch.Generator) -> Tensor:
    """Means of `samples` resamples of `scores` [n], float64 [samples]."""
    values = scores.double()
    n = values.numel()
    chunk = max(1, _DRAWS_AT_ONCE // n)
    parts = [
        values[torch.randint(n, (min(chunk, samples - start), n), generator=generator)].mean(dim=1)
        for start in range(0, samples, chunk)
    ]
    return torch.cat(parts)


def bootstrap(
    tasks: Sequence[Tensor], *, generator: torch.Generator, samples: int = 1000, level: float = 0.95
) -> Interval:
    """The mean over tasks of the mean score, with its interval; `tasks` has one [n] tensor per task."""
    estimate = torch.stack([scores.double().mean() for scores in tasks]).mean().item()
    means = torch.stack([resampled_means(scores, samples=samples, generator=generator) for scores in tasks]).mean(dim=0)
    return central(estimate, means, level=level)


def paired_bootstrap(
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    *,
    generator: torch.Generator,
    samples: int = 1000,
    level: float = 0.95,
) -> Interval:
    """The interval of mean(first) − mean(second), both scored on the same examples in the same order.

    Raises: ValueError if the numbers of examples of a task differ.
    """
    if [len(scores) for scores in first] != [len(scores) for scores in second]:
        raise ValueError("paired scores need the same examples in both")
    differences = [a.double() - b.double() for a, b in zip(first, second, strict=True)]
    return bootstrap(differences, generator=generator, samples=samples, level=level)


@dataclass(frozen=True)
class Scored:
    """The results of one method on one task, in r repetitions on the same n examples.

    rows: [r, n, k], the summands of each example for k sums; combine: sums [..., k] -> scores [...].
    """

    rows: Tensor
    combine: Callable[[Tensor], Tensor]

    @property
    def score(self) -> float:
        """The task's score, the mean over repetitions."""
        return self._scores(torch.ones(1, self.rows.shape[1], dtype=torch.float64)).item()

    def resampled(self, *, samples: int, generator: torch.Generator) -> Tensor:
        """The scores of `samples` resamples, float64 [samples]; all repetitions use the same drawn examples."""
        n = self.rows.shape[1]
        chunk = max(1, _DRAWS_AT_ONCE // n)
        parts = []
        for start in range(0, samples, chunk):
            drawn = torch.randint(n, (min(chunk, samples - start), n), generator=generator)
            counts = torch.zeros(drawn.shape, dtype=torch.float64)
            parts.append(self._scores(counts.scatter_add_(1, drawn, torch.ones_like(counts))))
        return torch.cat(parts)

    def _scores(self, counts: Tensor) -> Tensor:
        """Scores [s]; counts [s, n] is how often each example was drawn."""
        return self.combine(counts @ self.rows.double()).mean(dim=0)


def of_means(scores: Tensor) -> Scored:
    """A task scored by the mean of `scores` over the examples: [n], or [r, n] for several repetitions."""
    rows = torch.atleast_2d(scores.double())
    return Scored(torch.stack([rows, torch.ones_like(rows)], dim=-1), lambda sums: sums[..., 0] / sums[..., 1])


def resampled_scores(tasks: Sequence[Scored], *, seed: int, samples: int) -> Tensor:
    """The scores [tasks, samples] of resamples; the same seed draws the same examples for every method."""
    generator = torch.Generator().manual_seed(
        seed
    )  # one for all: otherwise two tasks of equal size would be drawn alike
    return torch.stack([task.resampled(samples=samples, generator=generator) for task in tasks])


def central(estimate: float, draws: Tensor, *, level: float = 0.95) -> Interval:
    """The interval with the middle `level` of `draws` [samples]."""
    tail = (1 - level) / 2
    low, high = torch.quantile(draws.double(), torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(estimate, low, high, level)


def compare_scores(
    first: Sequence[Scored], second: Sequence[Scored], *, seed: int, samples: int = 1000, level: float = 0.95
) -> Interval:
    """The interval of the mean over tasks of score(first) − score(second), both on the same examples in the same order.

    Raises: ValueError if the numbers of examples differ.
    """
    if [one.rows.shape[1] for one in first] != [other.rows.shape[1] for other in second]:
        raise ValueError("paired scores need the same examples in both")
    estimate = sum(one.score - other.score for one, other in zip(first, second, strict=True)) / len(first)
    one, other = (resampled_scores(side, seed=seed, samples=samples) for side in (first, second))
    return central(estimate, (one - other).mean(dim=0), level=level)


def standard_error(scores: Tensor) -> float:
    """The standard error of the mean of `scores` [n] (sample deviation / √n, as in lm-eval); 0 for one example."""
    if scores.numel() < 2:
        return 0.0
    return (scores.double().std() / scores.numel() ** 0.5).item()
