"""Gate reports: means, entropies and dead experts from gate values, without a model."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from molecli.evaluation.gate_report import GateReport, as_csv, entropy_png, heatmap_png, report_lines, summarise


def _values() -> dict[str, dict[str, Tensor]]:
    """Two tasks, two sites, three experts; c is asked by nobody."""
    one, other = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.5, 0.5, 0.0])
    return {
        "x": {"s": torch.stack([one, other]), "t": torch.stack([one, one])},
        "y": {"s": other[None], "t": other[None]},
    }


@pytest.fixture
def report() -> GateReport:
    return summarise(_values(), ("a", "b", "c"), composition="runs/ab", course=[(1, 1.1), (50, 0.2)])


def test_weights_are_means_over_examples_and_all_counts_every_example_once(report: GateReport) -> None:
    assert report.weights["x"][0] == pytest.approx((0.75, 0.25, 0.0))
    assert report.weights["all"][0] == pytest.approx((2 / 3, 1 / 3, 0.0))
    assert report.examples == {"all": 3, "x": 2, "y": 1}
    assert report.by_expert("x") == pytest.approx((0.875, 0.125, 0.0))


def test_entropy_is_that_of_each_gate_and_not_of_their_mean(report: GateReport) -> None:
    assert report.entropy["x"] == pytest.approx((math.log(2) / 2, 0.0))
    assert report.max_entropy == pytest.approx(math.log(3))
    assert report.mean_entropy == pytest.approx((math.log(2) * 2 / 3 + math.log(2) / 3) / 2)


def test_an_expert_is_dead_only_where_no_site_and_no_task_asks_it(report: GateReport) -> None:
    assert report.dead == ("c",)
    values = _values()
    values["y"]["t"] = torch.tensor([[0.9, 0.0, 0.1]])
    assert summarise(values, ("a", "b", "c")).dead == ()


def test_the_text_names_sites_tasks_course_and_dead(report: GateReport) -> None:
    assert report_lines(report) == [
        "site      a      b      c  entropy",
        "s      0.67   0.33   0.00     0.46",
        "t      0.83   0.17   0.00     0.23",
        "",
        "task      a      b      c  entropy",
        "all    0.75   0.25   0.00     0.35",
        "x      0.88   0.12   0.00     0.17",
        "y      0.50   0.50   0.00     0.69",
        "",
        "mean entropy 0.35 of at most 1.10",
        "in training  1.10 at step 1, 0.20 at step 50",
        "dead experts c",
    ]


def test_csv_has_a_row_for_every_task_site_and_expert(report: GateReport) -> None:
    rows = as_csv(report).splitlines()
    assert rows[0] == "task,site,expert,weight,entropy"
    assert rows[1] == "all,s,a,0.666667,0.462098"
    assert len(rows) == 1 + 3 * 2 * 3


def test_pictures_are_drawn_without_a_display(
    report: GateReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    for path in (heatmap_png(report, tmp_path / "g.png"), entropy_png(report, tmp_path / "e.png")):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_a_picture_of_many_sites_and_tasks_stays_readable_in_size(tmp_path: Path) -> None:
    from PIL import Image

    gates = torch.full((1, 8), 0.125)
    values = {f"task {i}": {f"model.layers.{j}.self_attn": gates for j in range(200)} for i in range(30)}
    path = heatmap_png(summarise(values, tuple("abcdefgh")), tmp_path / "g.png")
    assert max(Image.open(path).size) <= 24 * 150
