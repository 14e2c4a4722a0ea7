"""Intervals for scores averaged over tasks: the (paired) percentile bootstrap.

Examples are drawn with replacement within each task, the task means are averaged with equal weight. Tasks themselves
are not resampled: the interval speaks of these tasks, with other examples of them.
Source: Efron and Tibshirani (1993), chapter 13; paired use after Koehn (2004).
"""

from __future__ import annotations

from collections.abc import Sequence
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
        """Whether a difference is told apart from none at this level."""
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
    """The mean over tasks of the mean score, with its interval; `tasks` holds one [n] tensor per task."""
    estimate = torch.stack([scores.double().mean() for scores in tasks]).mean().item()
    means = torch.stack([resampled_means(scores, samples=samples, generator=generator) for scores in tasks]).mean(dim=0)
    tail = (1 - level) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(estimate, low, high, level)


def paired_bootstrap(
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    *,
    generator: torch.Generator,
    samples: int = 1000,
    level: float = 0.95,
) -> Interval:
    """The interval of mean(first) − mean(second), both scored on the same examples in the same order.

    Raises: ValueError where the two do not hold the same number of examples task by task.
    """
    if [len(scores) for scores in first] != [len(scores) for scores in second]:
        raise ValueError("paired scores need the same examples in both")
    differences = [a.double() - b.double() for a, b in zip(first, second, strict=True)]
    return bootstrap(differences, generator=generator, samples=samples, level=level)


def standard_error(scores: Tensor) -> float:
    """The standard error of the mean of `scores` [n] (sample deviation / √n, as lm-eval has it); 0 for one example."""
    if scores.numel() < 2:
        return 0.0
    return (scores.double().std() / scores.numel() ** 0.5).item()
