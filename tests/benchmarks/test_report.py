"""The page of results, and what blind answers score."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import chance, report  # noqa: E402


def test_the_page_is_what_the_results_make_of_it(tmp_path: Path) -> None:
    results = ROOT / "benchmarks" / "results"
    written = report.page(sorted(results.glob("study-*.json")), tmp_path)
    page = written.replace(os.path.relpath(results, tmp_path), "../benchmarks/results")
    assert page == (ROOT / "docs" / "results.md").read_text("utf-8"), "run python benchmarks/report.py"
    drawn = {file.name for file in tmp_path.glob("*.png")}
    assert drawn == {file.name for file in (ROOT / "docs").glob("study-*.png")}


def test_blind_answers() -> None:
    assert chance.blind(["a", "b", "a"], ["a", "b", "b", "b"]) == (75.0, 25.0)
    assert chance.blind(["c", "a"], ["a", "a", "b", "b"]) == (50.0, 0.0)  # of equals the first
