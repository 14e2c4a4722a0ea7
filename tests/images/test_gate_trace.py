"""The report on gates by denoising step: means over the right axes, and renderings that hold every number."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from molecli.evaluation.gate_report import GateReport, write_report
from molecli.images.gate_trace import StepReport, Trace, step_report

P, S, M, m, N = 2, 3, 2, 1, 2


def gates(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(2 * torch.randn(*shape, N, generator=generator), dim=-1)


def trace(seed: int, *, guided: bool = True) -> Trace:
    rows = ("conditional", "unconditional") if guided else ("conditional",)
    steps = {name: gates(P, S, M, seed=10 * seed + i) for i, name in enumerate(rows)}
    return Trace(("down", "up"), ("text",), (999.0, 500.0, 1.0), steps, gates(P, m, seed=10 * seed + 5))


TRACES = {"a teapot": trace(1), "a cactus": trace(2)}


@pytest.fixture
def report() -> StepReport:
    found = step_report(TRACES, ["x", "y"], composition="runs/xy", course=[(1, 0.69), (2, 0.5)])
    assert isinstance(found, StepReport)
    return found


def test_a_sites_weight_is_the_mean_over_pictures_and_steps_of_the_conditional_rows(report: StepReport) -> None:
    assert report.sites == ("down", "up", "text")
    assert report.examples == {"all": 2 * P, "a teapot": P, "a cactus": P}
    one = TRACES["a teapot"]
    for i in range(M):
        expected = sum(one.steps["conditional"][p, s, i] for p in range(P) for s in range(S)) / (P * S)
        assert report.weights["a teapot"][i] == pytest.approx(expected.tolist())  # type: ignore[union-attr]
    assert report.weights["a teapot"][M] == pytest.approx(one.text[:, 0].mean(0).tolist())
    both = [(report.weights["a teapot"][0][i] + report.weights["a cactus"][0][i]) / 2 for i in range(N)]
    assert report.weights["all"][0] == pytest.approx(both)


def test_entropy_is_averaged_over_steps_not_taken_of_the_average(report: StepReport) -> None:
    sharp = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]).reshape(1, 2, 1, 2)
    switching = Trace(("site",), (), (2.0, 1.0), {"conditional": sharp}, torch.zeros(1, 0, 2))
    found = step_report({"p": switching}, ["x", "y"])
    assert found.entropy["p"] == (0.0,)
    assert found.weights["p"] == ((0.5, 0.5),)
    assert all(0 < value < report.max_entropy for value in report.entropy["all"])


def test_each_step_holds_the_mean_over_all_pictures_apart_for_both_halves(report: StepReport) -> None:
    assert report.by_step is not None
    for rows in ("conditional", "unconditional"):
        expected = torch.cat([t.steps[rows] for t in TRACES.values()]).mean(0)
        assert torch.allclose(torch.tensor(report.by_step[rows]), expected)
        assert torch.allclose(torch.tensor(report.expert_course(rows)), expected.mean(1))


def test_the_text_shows_every_step_for_both_halves(report: StepReport) -> None:
    lines = report.lines()
    assert lines[0].split() == ["site", "x", "y", "entropy"]
    start = next(i for i, line in enumerate(lines) if line.startswith("step"))
    assert lines[start].split() == ["step", "x", "y", "x", "∅", "y", "∅"]
    shown = [line.split() for line in lines[start + 1 : start + 1 + S]]
    assert [row[:2] for row in shown] == [["1", "t=999"], ["2", "t=500"], ["3", "t=1"]]
    courses = [report.expert_course(rows) for rows in ("conditional", "unconditional")]
    for i, row in enumerate(shown):
        assert [float(v) for v in row[2:]] == pytest.approx([*courses[0][i], *courses[1][i]], abs=0.0051)


def test_csv_has_a_row_for_each_half_step_site_and_expert(report: StepReport) -> None:
    rows = list(csv.DictReader(io.StringIO(report.csv())))
    assert len(rows) == 2 * S * M * N
    assert report.by_step is not None
    last = rows[-1]
    assert (last["rows"], last["step"], last["timestep"], last["site"], last["expert"]) == (
        "unconditional", "3", "1", "up", "y",
    )  # fmt: skip
    assert float(last["weight"]) == pytest.approx(report.by_step["unconditional"][2][1][1], abs=1e-6)


def test_the_folder_holds_everything(report: StepReport, tmp_path: Path) -> None:
    write_report(report, tmp_path)
    document = json.loads((tmp_path / "gates.json").read_text())
    assert document["by_step"]["conditional"][0][0] == pytest.approx(report.by_step["conditional"][0][0])  # type: ignore[index]
    assert document["timesteps"] == [999.0, 500.0, 1.0]
    assert document["by_step_mean"]["unconditional"][1] == pytest.approx(report.expert_course("unconditional")[1])
    assert (tmp_path / "gates.csv").read_text() == report.csv()
    for name in ("gates.png", "entropy.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 200


def test_without_guidance_there_is_one_half(tmp_path: Path) -> None:
    found = step_report({"p": trace(3, guided=False)}, ["x", "y"])
    assert isinstance(found, StepReport)
    assert list(found.by_step or {}) == ["conditional"]
    assert "∅" not in "\n".join(found.lines())
    assert found.draw(tmp_path / "gates.png").stat().st_size > 1000


def test_loras_in_the_text_encoder_alone_have_no_denoising_steps() -> None:
    only_text = Trace((), ("text",), (2.0, 1.0), {"conditional": torch.zeros(P, 2, 0, N)}, TRACES["a teapot"].text)
    found = step_report({"p": only_text}, ["x", "y"])
    assert type(found) is GateReport
    assert found.weights["p"] == (pytest.approx(only_text.text.mean(0)[0].tolist()),)
