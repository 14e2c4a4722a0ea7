"""`mole study`: the plan, what is refused, and that the shipped studies are recipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from molecli.study import scheduler as study_work
from molecli.study.jobs import Job

STUDY = """\
command: study
experts: {loras: [reverse, plural]}
methods:
  linear:
  gated: {train: {steps: 2}}
fit: {suite: builtin}
test: {data: {suite: builtin, tasks: [reverse, plural], limit: 2}}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(STUDY)
    return path


def test_a_dry_run_lists_the_commands(mole: Any, file: Path) -> None:
    result = mole("study", str(file), "--dry-run", "--output", str(file.parent / "out"))
    assert result.code == 0
    first, *lines = result.out.splitlines()
    assert first == "8 commands: 4 compositions, 4 scores"
    assert lines[1] == "mole compose       compositions/all/seed-0/gated"
    assert not (file.parent / "out").exists()
    document = json.loads(mole("study", str(file), "--dry-run", "--json").out)
    assert document[1]["recipe"]["mode"] == "gated"


def test_a_dry_run_of_some_columns(mole: Any, file: Path) -> None:
    lines = mole("study", str(file), "--dry-run", "--column", "gated", "--column", "own LoRA").out.splitlines()
    assert lines[0] == "6 commands: 3 compositions, 3 scores"
    assert not any("linear" in line for line in lines)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("{file}", "--column", "gatde"), "--column: the study has no column 'gatde'. Did you mean 'gated'?"),
        ((), "study: no recipe is named"),
        (("nowhere.yaml",), "nowhere.yaml: no such recipe"),
        (("paper/table3",), "paper/table3: no such recipe. Write one of: paper/table3-bbh, paper/table3-cbqa, "),
        (("{file}", "--set", "methods.gated.mode=gatd"), "methods.gated.mode"),
        (("{file}", "--set", "numbers=[7]", "--dry-run"), "numbers: 7 LoRAs should be composed, but there are only 2."),
        (("{file}", "--set", "experts.copies=0"), "experts.copies"),
        (("{file}", "--set", "test.data.tasks=[revers]", "--dry-run"), "revers"),
    ],
)
def test_what_is_wrong_is_said(mole: Any, file: Path, args: tuple[str, ...], message: str) -> None:
    result = mole("study", *(arg.format(file=file) for arg in args))
    assert result.code == 2
    assert message in result.err


def test_a_command_that_failed_ends_the_study_with_code_1_after_its_report(
    mole: Any, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unlucky(job: Job, folder: Path, environment: dict[str, str]) -> str:
        return "exit 1: mole: memory ran out" if "gated" in job.name else called(job, folder, environment)

    called = study_work.called
    monkeypatch.setattr(study_work, "called", unlucky)
    out = file.parent / "out"
    result = mole("study", str(file), "--output", str(out), "--quiet")
    assert result.code == 1
    assert (
        "2 commands failed, and the report lacks the results that depend on them. Read their logs in study-steps/"
        in result.err
    )
    assert "linear" in result.out
    assert json.loads((out / "study.json").read_text())["failed"].keys() == {
        "compositions/all/seed-0/gated",
        "scores/all/seed-0/gated",
    }
    monkeypatch.setattr(study_work, "called", called)
    result = mole("study", str(file), "--output", str(out), "--quiet", "--resume")
    assert result.code == 0
    assert "gated" in result.out


def test_overwrite_costs_nothing_where_the_study_cannot_run(
    mole: Any, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = file.parent / "out" / "study.md"
    done.parent.mkdir()
    done.write_text("# found")
    broken = mole("study", file, "--output", done.parent, "--overwrite", "--set", "numbers=[7]")
    assert (broken.code, done.read_text()) == (2, "# found")
    assert broken.err.startswith("mole: numbers: 7 LoRAs should be composed")

    def stop(recipe: Any, **how: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("molecli.study.run.run_study", stop)
    assert mole("study", file, "--output", done.parent, "--overwrite").code == 130
    assert not done.exists()  # it was about to begin


def test_the_record_of_a_study_that_grew_holds_what_it_was_told_last(
    mole: Any, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(recipe: Any, **how: Any) -> None:
        (Path(recipe.output) / "study-steps").mkdir(exist_ok=True)
        raise KeyboardInterrupt

    monkeypatch.setattr("molecli.study.run.run_study", stop)
    out = file.parent / "out"
    assert mole("study", file, "--output", out).code == 130
    assert "nla" not in (out / "recipe.yaml").read_text()
    assert mole("study", file, "--output", out, "--resume", "--set", "methods.nla.mode=nla").code == 130
    grown = (out / "recipe.yaml").read_text()
    assert "nla" in grown
    assert mole("study", file, "--output", out, "--resume", "--set", "numbers=[7]").code == 2
    assert mole("study", "--output", out, "--resume").code == 130
    assert (out / "recipe.yaml").read_text() == grown


@pytest.mark.parametrize("path", sorted(Path("benchmarks/studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_studies_of_the_benchmarks_are_recipes(mole: Any, path: Path) -> None:
    result = mole("recipe", "validate", str(path))
    assert result.code == 0, result.err
