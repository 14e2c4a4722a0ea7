"""The paired bootstrap: seeded, paired, and as wide as theory says."""

from __future__ import annotations

import pytest
import torch

from molecli.functional.bootstrap import (
    Scored,
    bootstrap,
    compare_scores,
    of_means,
    paired_bootstrap,
    resampled_means,
    standard_error,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scores(n: int, share: float, seed: int) -> torch.Tensor:
    return (torch.rand(n, generator=generator(seed)) < share).float()


def test_the_estimate_weighs_tasks_equally_whatever_their_size() -> None:
    tasks = [torch.ones(10), torch.zeros(1000)]
    assert bootstrap(tasks, generator=generator()).estimate == 0.5


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    tasks = [scores(50, 0.5, 1), scores(80, 0.3, 2)]
    one, two, three = (bootstrap(tasks, generator=generator(seed)) for seed in (3, 3, 4))
    assert one == two
    assert (one.low, one.high) != (three.low, three.high)


def test_the_interval_of_one_task_is_as_wide_as_its_standard_error_says() -> None:
    task = scores(400, 0.4, 0)
    interval = bootstrap([task], generator=generator(), samples=4000)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * standard_error(task), rel=0.08)
    assert interval.low < interval.estimate < interval.high


def test_pairing_cancels_what_both_methods_share() -> None:
    base = scores(200, 0.5, 0)
    better = base.clone()
    better[:20] = 1.0
    paired = paired_bootstrap([better], [base], generator=generator())
    alone = bootstrap([better], generator=generator())
    assert paired.high - paired.low < 0.6 * (alone.high - alone.low)
    assert paired.excludes_zero


def test_a_method_compared_with_itself_differs_by_exactly_zero() -> None:
    task = scores(30, 0.5, 0)
    interval = paired_bootstrap([task], [task], generator=generator())
    assert (interval.estimate, interval.low, interval.high) == (0.0, 0.0, 0.0)
    assert not interval.excludes_zero


def test_examples_are_not_drawn_across_tasks() -> None:
    # Within either task every score is alike, so no resample can differ; pooled ones would.
    interval = bootstrap([torch.zeros(5), torch.ones(5)], generator=generator())
    assert (interval.low, interval.high) == (0.5, 0.5)


def test_unpaired_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="same examples"):
        paired_bootstrap([torch.zeros(3)], [torch.zeros(4)], generator=generator())


def test_a_large_task_is_resampled_in_pieces() -> None:
    assert resampled_means(scores(150_000, 0.5, 0), samples=30, generator=generator()).shape == (30,)


def test_the_standard_error_of_one_example_is_zero() -> None:
    assert standard_error(torch.tensor([1.0])) == 0.0
    assert standard_error(torch.tensor([0.0, 1.0])) == pytest.approx(0.5)


def test_scores_from_sums_give_the_interval_of_the_means_they_are() -> None:
    first, second = ([scores(n, share, n) for n in (40, 70)] for share in (0.6, 0.4))
    wanted = paired_bootstrap(first, second, generator=generator(5), samples=300)
    found = compare_scores([of_means(s) for s in first], [of_means(s) for s in second], seed=5, samples=300)
    assert (found.estimate, found.low, found.high) == pytest.approx((wanted.estimate, wanted.low, wanted.high))


def test_repetitions_over_the_same_examples_count_as_their_mean() -> None:
    runs = torch.stack([scores(60, 0.5, seed) for seed in (1, 2, 3)])
    base = scores(60, 0.3, 4)
    both = (compare_scores([of_means(one)], [of_means(base)], seed=0) for one in (runs, runs.double().mean(dim=0)))
    found, wanted = both
    assert (found.estimate, found.low, found.high) == pytest.approx((wanted.estimate, wanted.low, wanted.high))


def test_a_score_that_is_no_mean_is_resampled_as_it_is_made() -> None:
    # A ratio of sums: its resamples are ratios of the resampled sums.
    rows = torch.tensor([[[1.0, 2.0], [3.0, 3.0], [0.0, 5.0]]])
    ratio = Scored(rows, lambda sums: sums[..., 0] / sums[..., 1])
    assert ratio.score == pytest.approx(0.4)
    drawn = ratio.resampled(samples=200, generator=generator())
    possible = {
        (a + b + c) / (d + e + f) for a, d in rows[0].tolist() for b, e in rows[0].tolist() for c, f in rows[0].tolist()
    }
    assert all(min(abs(value - one) for one in possible) < 1e-9 for value in drawn.tolist())
    assert len(set(drawn.tolist())) > 5


def test_unpaired_sums_are_refused() -> None:
    with pytest.raises(ValueError, match="same examples"):
        compare_scores([of_means(torch.zeros(3))], [of_means(torch.zeros(4))], seed=0)
