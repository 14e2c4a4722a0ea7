"""From one number of LoRAs to the next: the differences, their intervals, and what is paired with what."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from molecli.errors import MismatchError
from molecli.evaluation.compare import CompareReport, judged, line_up
from molecli.evaluation.saved_results import Run
from molecli.evaluation.tables import to_markdown
from molecli.functional.bootstrap import paired_bootstrap
from molecli.study.scaling import Growth, growth_table, growths

TASKS = ("sum", "diff")
ROWS = 60
METRICS = dict.fromkeys(TASKS, "exact_match")
# task -> whether each example was answered
Hits = Mapping[str, Sequence[float]]


def hits(share: float, seed: int, tasks: Sequence[str] = TASKS) -> dict[str, list[float]]:
    rng = random.Random(seed)
    return {task: [float(rng.random() < share) for _ in range(ROWS)] for task in tasks}


def run(place: str, methods: Mapping[str, Hits], order: Sequence[int] = range(ROWS)) -> Run:
    """What `mole evaluate` would have scored, in this order of the examples."""
    samples: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name, by_task in methods.items():
        for task, right in by_task.items():
            rows = [
                {"prompt": f"{task} {i}", "target": "x", "answers": ["x"], "exact_match": right[i]} for i in range(ROWS)
            ]
            samples.setdefault(task, {})[name] = [rows[i] for i in order]
    content = {
        "results": {task: {"alias": task, "exact_match,none": 0.0} for task in samples},
        "versions": {},
        "metric_versions": {"exact_match": 1},
    }
    return Run(place, content, samples, {name: name for name in methods})


def report(*runs: Run, metrics: Mapping[str, str] = METRICS, samples: int = 400, seed: int = 3) -> CompareReport:
    contest = line_up(runs, metrics)
    return CompareReport(runs, [(contest, judged(contest, samples=samples, seed=seed))], samples, seed)


def average(found: Hits) -> float:
    return sum(100 * sum(right) / len(right) for right in found.values()) / len(found)


def test_a_step_is_the_difference_of_averages_with_its_paired_interval() -> None:
    at = {n: hits(share, n) for n, share in ((8, 0.3), (24, 0.6), (128, 0.5))}
    # As a user may write them: the largest first.
    found = growths({f"{n}-loras": report(run(f"scores/{n}", {"gated": at[n]})) for n in (128, 8, 24)})
    assert [(one.method, one.margin.second, one.number) for one in found] == [
        ("gated", "8-loras", "24-loras"),
        ("gated", "24-loras", "128-loras"),
    ]
    for one, (fewer, more) in zip(found, ((8, 24), (24, 128)), strict=True):
        assert one.margin.difference == pytest.approx(average(at[more]) - average(at[fewer]))
        sides = [[100 * torch.tensor(at[n][task]) for task in TASKS] for n in (more, fewer)]
        wanted = paired_bootstrap(*sides, generator=torch.Generator().manual_seed(3), samples=400)
        assert (one.margin.low, one.margin.high) == pytest.approx((wanted.low, wanted.high))


def test_a_step_is_told_apart_where_its_interval_excludes_zero() -> None:
    before = hits(0.5, 1)
    worse = {task: [float(hit and i % 2) for i, hit in enumerate(right)] for task, right in before.items()}
    # As many answers are won as are lost, but for one.
    moved = {task: [1.0, *right[1:-1][::-1], 1.0] for task, right in before.items()}
    methods = {8: {"falls": before, "stays": before}, 24: {"falls": worse, "stays": moved}}
    falls, stays = growths({f"{n}-loras": report(run(f"scores/{n}", methods[n])) for n in methods})
    assert falls.margin.high is not None
    assert falls.margin.high < 0
    assert falls.margin.significant is True
    assert str(falls.margin).endswith("] *")
    assert stays.margin.low is not None
    assert stays.margin.high is not None
    assert stays.margin.low < 0 < stays.margin.high
    assert stays.margin.significant is False


def test_examples_are_paired_whatever_order_the_numbers_had_them_in() -> None:
    """Paired by their places, a method that answers alike at both numbers would have an interval all the same."""
    before = hits(0.5, 1)
    better = {task: [1.0, 1.0, 1.0, *right[3:]] for task, right in before.items()}
    mixed = list(range(ROWS))
    random.Random(0).shuffle(mixed)
    few = report(run("scores/8", {"gated": before}))
    straight = growths({"8-loras": few, "24-loras": report(run("scores/24", {"gated": better}))})
    shuffled = growths({"8-loras": few, "24-loras": report(run("scores/24", {"gated": better}, mixed))})
    assert shuffled == straight
    same = growths({"8-loras": few, "24-loras": report(run("scores/24", {"gated": before}, mixed))})
    assert (same[0].margin.difference, same[0].margin.low, same[0].margin.high) == pytest.approx((0, 0, 0))


def test_the_numbers_may_have_been_repeated_by_other_seeds() -> None:
    seeds = [hits(0.6, seed) for seed in (1, 2, 3)]
    before = hits(0.4, 4)
    many = report(*(run(f"scores/24/{i}", {"gated": one}) for i, one in enumerate(seeds)))
    (found,) = growths({"8-loras": report(run("scores/8", {"gated": before})), "24-loras": many})
    mean = [100 * torch.tensor([one[task] for one in seeds]).double().mean(dim=0) for task in TASKS]
    sides = mean, [100 * torch.tensor(before[task]) for task in TASKS]
    wanted = paired_bootstrap(*sides, generator=torch.Generator().manual_seed(3), samples=400)
    assert (found.margin.difference, found.margin.low, found.margin.high) == pytest.approx(
        (wanted.estimate, wanted.low, wanted.high)
    )


def test_what_is_the_same_at_every_number_or_has_one_alone_is_left_out() -> None:
    base, own = run("scores/base", {"base": hits(0.1, 1)}), run("scores/own/sum", {"own LoRA": hits(0.9, 2)})
    numbers = {
        "8-loras": {"nla": hits(0.3, 3), "xlora": hits(0.5, 4), "soup": hits(0.4, 5)},
        "24-loras": {"nla": hits(0.4, 6), "xlora": hits(0.6, 7)},
        "48-loras": {"nla": hits(0.5, 8), "soup": hits(0.5, 9)},
    }
    found = growths({n: report(base, own, run(f"scores/{n}", methods)) for n, methods in numbers.items()})
    table = growth_table(found)
    assert (table.corner, table.columns) == ("gain from more LoRAs", ("8 → 24", "24 → 48"))
    rows = {row.label: row.texts for row in table.rows}
    assert list(rows) == ["nla", "xlora"]  # of soup no two are neighbours
    assert rows["nla"] == tuple(str(one.margin) for one in found if one.method == "nla")
    assert rows["xlora"] == (str(found[-1].margin), "–")
    assert to_markdown(table).splitlines()[0] == "| gain from more LoRAs | 8 → 24 | 24 → 48 |"


def test_a_method_of_the_larger_numbers_alone_keeps_its_columns_in_order() -> None:
    numbers = {8: ("nla", "xlora"), 24: ("nla", "late", "xlora"), 48: ("late",)}
    found = growths(
        {
            f"{n}-loras": report(run(f"scores/{n}", {name: hits(0.4, n + i) for i, name in enumerate(names)}))
            for n, names in numbers.items()
        }
    )
    table = growth_table(list(reversed(found)))
    assert table.columns == ("8 → 24", "24 → 48")
    assert {row.label: [text == "–" for text in row.texts] for row in table.rows} == {
        "late": [True, False],
        "xlora": [False, True],
        "nla": [False, True],
    }


def test_one_task_alone_is_its_own_average() -> None:
    at = {n: hits(share, n, ["sum"]) for n, share in ((2, 0.2), (4, 0.7))}
    metrics = {"sum": "exact_match"}
    (found,) = growths({f"{n}-loras": report(run(f"scores/{n}", {"nla": at[n]}), metrics=metrics) for n in at})
    assert found.margin.difference == pytest.approx(average(at[4]) - average(at[2]))
    assert found.margin.significant is True


def test_without_a_bootstrap_a_step_has_no_interval() -> None:
    at = {8: hits(0.3, 1), 24: hits(0.6, 2)}
    (found,) = growths({f"{n}-loras": report(run(f"scores/{n}", {"nla": at[n]}), samples=0) for n in at})
    assert str(found.margin) == f"{average(at[24]) - average(at[8]):+.1f}"
    assert (found.margin.low, found.margin.high, found.margin.significant) == (None, None, None)


def test_one_number_has_no_steps() -> None:
    assert growths({"all": report(run("scores/all", {"nla": hits(0.3, 1)}))}) == []


def test_averages_over_other_tasks_are_no_step() -> None:
    few = report(run("scores/8", {"nla": hits(0.3, 1)}))
    more = report(run("scores/24", {"nla": hits(0.3, 1, ["sum"])}), metrics={"sum": "exact_match"})
    assert growths({"8-loras": few, "24-loras": more}) == []


def test_other_examples_are_refused() -> None:
    few, more = (report(run(f"scores/{n}", {"nla": hits(0.3, n)}, range(n))) for n in (50, 40))
    with pytest.raises(MismatchError, match=r"scores/40.*its examples of the task 'sum' are not those of scores/50"):
        growths({"8-loras": few, "24-loras": more})


def test_a_step_is_read_back_from_its_document() -> None:
    at = {8: hits(0.3, 1), 24: hits(0.6, 2)}
    (found,) = growths({f"{n}-loras": report(run(f"scores/{n}", {"nla": at[n]})) for n in at})
    document = json.loads(json.dumps(found.document()))
    assert list(document) == ["method", "from", "to", "difference", "low", "high", "significant"]
    assert (document["method"], document["from"], document["to"]) == ("nla", "8-loras", "24-loras")
    assert Growth.read(document) == found
