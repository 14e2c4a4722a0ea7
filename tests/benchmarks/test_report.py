"""The page of results, what blind answers score, and what has the form of an answer."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import answer_form, chance, report  # noqa: E402


def test_the_page_is_what_the_results_make_of_it(tmp_path: Path) -> None:
    results = ROOT / "benchmarks" / "results"
    written = report.page(sorted(results.glob("study-*.json")), tmp_path)
    page = written.replace(os.path.relpath(results, tmp_path), "../benchmarks/results")
    assert page == (ROOT / "docs" / "results.md").read_text("utf-8"), "run python benchmarks/report.py"
    drawn = {file.name for file in tmp_path.glob("*.png")}
    assert drawn == {file.name for file in (ROOT / "docs").glob("study-*.png")}


def test_the_last_column_is_of_the_subject_else_of_the_winner() -> None:
    def told(first: str, second: str, difference: float, **more: str) -> list[str]:
        margin = {"second": second, "difference": difference, "low": difference - 1, "high": difference + 1}
        verdict: dict[str, Any] = {"winner": "soup", "margins": [{**margin, "significant": True}], **more}
        one = {"metrics": {"sum": "f1"}, "scores": {"sum": {"gated": 50.0, "soup": 52.0}}, "verdicts": {"sum": verdict}}
        one["methods"] = {"gated": {"runs": 3}, "soup": {"runs": 1}}
        (table,) = report.ranked({"comparisons": {"all": {"comparisons": [one]}}}, "all")
        assert table.splitlines()[0] == f"| f1: 1 tasks | average (%) | runs | {first} is ahead by |"
        return table.splitlines()[2:]

    assert told("soup", "gated", 2.0) == ["| soup | 52.0 | 1 | – |", "| gated | 50.0 | 3 | +2.0 [+1.0, +3.0] * |"]
    behind = ["| soup | 52.0 | 1 | -2.0 [-3.0, -1.0] * |", "| gated | 50.0 | 3 | – |"]
    assert told("gated", "soup", -2.0, subject="gated") == behind


def test_what_was_not_run_is_on_the_page(tmp_path: Path) -> None:
    found = json.loads((ROOT / "benchmarks" / "results" / "study-joint.json").read_text("utf-8"))
    place = tmp_path / "study-joint.json"
    place.write_text(json.dumps({**found, "missing": {"xlora": "3 of 3 evaluations not run"}}), "utf-8")
    assert report.page([place], tmp_path).endswith("\nMissing: xlora (3 of 3 evaluations not run).\n")
    place.write_text(json.dumps({**found, "missing": {}}), "utf-8")
    assert "Missing:" not in report.page([place], tmp_path)


def test_steps_between_numbers_of_loras_are_on_the_page_where_they_were_measured(tmp_path: Path) -> None:
    found = json.loads((ROOT / "benchmarks" / "results" / "study-scale.json").read_text("utf-8"))
    found.pop("growth", None)
    (tmp_path / "study-scale.json").write_text(json.dumps(found), "utf-8")
    older = report.page([tmp_path / "study-scale.json"], tmp_path)
    step = {"method": "gated", "from": "8-loras", "to": "24-loras", "difference": 13.2, "low": 11.0, "high": 15.4}
    back = {"method": "gated", "from": "24-loras", "to": "48-loras", "difference": -0.2, "low": -1.0, "high": 0.6}
    bare = {"method": "nla", "from": "24-loras", "to": "48-loras", "difference": 1.5, "low": None, "high": None}
    stars = (True, False, None)
    found["growth"] = [{**one, "significant": star} for one, star in zip((step, back, bare), stars, strict=True)]
    (tmp_path / "study-scale.json").write_text(json.dumps(found), "utf-8")
    page = report.page([tmp_path / "study-scale.json"], tmp_path)
    before, table, after = page.partition(
        "Averages at more LoRAs minus those at fewer, * where the interval excludes zero:\n\n"
        "| gain from more LoRAs | 8 → 24 | 24 → 48 |\n|---|---:|---:|\n"
        "| gated | +13.2 [+11.0, +15.4] * | -0.2 [-1.0, +0.6] |\n| nla | – | +1.5 |\n\n"
    )
    assert table
    assert before.endswith("![Averages by the number of LoRAs](study-scale-curve.png)\n\n")
    assert before + after == older


def test_blind_answers() -> None:
    assert chance.blind(["a", "b", "a"], ["a", "b", "b", "b"]) == (75.0, 25.0)
    assert chance.blind(["c", "a"], ["a", "a", "b", "b"]) == (50.0, 0.0)  # of equals the first


def test_what_has_the_form_of_an_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = {"a": ["(A)", "(a).", "(B)", "no"], "b": ["no", "no", "no", "no"]}
    for place, some in (("seed-0/up", ["a"]), ("seed-1/up", ["b"]), ("fixed/b", ["b"])):
        folder = tmp_path / "study-steps" / "scores" / "all" / place
        folder.mkdir(parents=True)
        content = {"model_name": "a", "methods": {name: {} for name in some}, "versions": {}, "metric_versions": {}}
        (folder / "results.json").write_text(json.dumps({**content, "results": {"up": {}}}), "utf-8")
        lines = [
            {"method": m, "prompt": str(i), "target": t, "answers": [t], "resps": [[said[m][i]]]}
            for m in some
            for i, t in enumerate(["(A)", "(A)", "(A)", "(B)"])
        ]
        (folder / "samples_up.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    answer_form.main([str(tmp_path)])
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| a | 75.0 | 50.0 | 66.7 | 50.0 |",
        "| b | 0.0 | 0.0 | – | 100.0 |",
    ]
    answer_form.main([str(tmp_path), "--only", "b", "--tasks-of", "a"])
    assert capsys.readouterr().out.splitlines()[2:] == ["| b | 0.0 | 0.0 | – | 100.0 |"]
