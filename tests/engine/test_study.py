"""Studies: which commands one asks for, what is not done again, and the tables of what was scored."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pair import Pair, make_pair

from molecli.engine import study
from molecli.engine.data import part_of
from molecli.engine.study import Job, jobs_of, run_study
from molecli.errors import RunError, UsageError
from molecli.files.recipe import RECIPES, StudyRecipe


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[..., Path]) -> Pair:
    return make_pair(tiny_folder("llama"), tmp_path_factory.mktemp("study"))


def recipe(pair: Pair, output: Path, **changes: Any) -> StudyRecipe:
    data = {"suite": "jsonl", "files": pair.files}
    tree: dict[str, Any] = {
        "base": pair.base,
        "experts": {"loras": [f"{n}={p}" for n, p in pair.loras.items()]},
        "methods": {"base": None, "linear": None, "ties": {"method": {"density": 0.5}}, "gated": {"train": TRAIN}},
        "fit": data,
        "test": {"data": {**data, "split": "train"}, "bootstrap": 50, "max_new_tokens": 4},
        "output": str(output),
        "device": "cpu",
    }
    return StudyRecipe.model_validate({**tree, **changes})


TRAIN = {"steps": 3, "batch_size": 4, "warmup_steps": 1}


def names(jobs: list[Job], phase: str) -> list[str]:
    return [job.name.removeprefix(f"{phase}/") for job in jobs if job.phase == phase]


# -- which commands ----------------------------------------------------------------------------------------------------


def test_a_fixed_method_is_composed_once_and_a_learned_one_for_every_seed(pair: Pair, tmp_path: Path) -> None:
    jobs = jobs_of(recipe(pair, tmp_path, seeds=[0, 3]))
    assert names(jobs, "loras") == []
    composed = names(jobs, "compositions")
    assert composed[:4] == ["all/fixed/linear", "all/fixed/ties", "all/seed-0/gated", "all/seed-3/gated"]
    assert composed[4:] == ["own/up/own LoRA", "own/down/own LoRA"]
    assert names(jobs, "scores")[-3:] == ["base", "own/up", "own/down"]
    gated = next(job for job in jobs if job.name == "compositions/all/seed-3/gated")
    assert gated.tree["seed"] == 3
    assert gated.tree["train"] == TRAIN
    assert gated.tree["data"]["files"] == pair.files
    ties = next(job for job in jobs if job.name == "compositions/all/fixed/ties")
    assert "data" not in ties.tree  # it learns nothing
    for job in jobs:
        RECIPES[job.tree["command"]].model_validate(job.tree)  # a user could run each


def test_learning_on_each_task_by_itself(pair: Pair, tmp_path: Path) -> None:
    jobs = jobs_of(recipe(pair, tmp_path, per_task=True))
    assert "all/seed-0/up/gated" in names(jobs, "compositions")
    assert "all/fixed/linear" in names(jobs, "compositions")
    gated = next(job for job in jobs if job.name == "compositions/all/seed-0/up/gated")
    assert gated.tree["data"]["tasks"] == ["up"]
    scored = next(job for job in jobs if job.name == "scores/all/seed-0/up")
    assert scored.tree["eval"]["data"]["tasks"] == ["up"]


def test_loras_of_disjoint_parts_and_numbers_of_them(pair: Pair, tmp_path: Path) -> None:
    experts = {"data": {"suite": "jsonl", "files": pair.files}, "copies": 2}
    jobs = jobs_of(recipe(pair, tmp_path, experts=experts, numbers=[2, 3]))
    assert names(jobs, "loras") == ["up", "down", "up-2"]  # no more than are composed
    second = next(job for job in jobs if job.name == "loras/up-2").tree
    assert second["data"]["part"] == "2/2"
    assert second["data"]["tasks"] == ["up"]
    three = next(job for job in jobs if job.name == "compositions/3-loras/fixed/linear").tree
    assert [lora["name"] for lora in three["loras"]] == ["up", "down", "up-2"]
    assert three["loras"][2]["source"] == str(tmp_path / "study-steps" / "loras" / "up-2")


def test_one_lora_of_several_tasks(pair: Pair, tmp_path: Path) -> None:
    experts = {"data": {"suite": "jsonl", "files": pair.files}, "together": {"both": ["up", "down"]}}
    (job,) = [job for job in jobs_of(recipe(pair, tmp_path, experts=experts)) if job.phase == "loras"]
    assert job.name == "loras/both"
    assert job.tree["data"]["tasks"] == ["up", "down"]


def test_parts_share_nothing_and_leave_nothing_out() -> None:
    rows = list(range(11))
    parts = [part_of(rows, f"{k}/3", "t") for k in (1, 2, 3)]
    assert sorted(row for part in parts for row in part) == rows
    with pytest.raises(UsageError, match="there is no part 4 of 3"):
        part_of(rows, "4/3", "t")
    with pytest.raises(UsageError, match="too few for 3 parts"):
        part_of(rows[:2], "3/3", "t")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": {}}, "a study compares methods"),
        ({"methods": {"a/b": {"mode": "linear"}}}, "no name for a column"),
        ({"methods": {"g": {"mode": "gated", "gate": {"granularty": "block"}}}}, r"methods\.g\.gate\.granularty"),
        ({"numbers": [9]}, "9 LoRAs are to be composed, and there are 2"),
        ({"methods": {"single": None}}, "single is one LoRA alone"),
    ],
)
def test_what_cannot_be_a_study(pair: Pair, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        jobs_of(recipe(pair, tmp_path, **changes))


# -- running it --------------------------------------------------------------------------------------------------------


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Jobs run here, not as processes of their own, which cost seconds each; their names in order."""
    from molecli.engine.compose import run_compose
    from molecli.engine.evaluate import run_evaluate
    from molecli.engine.train_lora import run_train_lora

    made: list[str] = []
    runs: dict[str, Any] = {"train-lora": run_train_lora, "compose": run_compose, "evaluate": run_evaluate}

    def called(job: Job, folder: Path, environment: dict[str, str]) -> str:
        made.append(job.name)
        try:
            runs[job.tree["command"]](RECIPES[job.tree["command"]].model_validate(job.tree))
        except UsageError as error:
            return str(error)
        study._mark(folder, job).parent.mkdir(parents=True, exist_ok=True)
        study._mark(folder, job).write_text(job.digest + "\n")
        return ""

    monkeypatch.setattr(study, "_called", called)
    return made


def test_a_study_ends_in_tables_and_goes_on_where_it_was(pair: Pair, tmp_path: Path, in_process: list[str]) -> None:
    told: list[tuple[str, int, int]] = []
    chosen = recipe(pair, tmp_path, title="Two of them", published={"up": {"paper": 47.0}}, source="Table 9")
    report = run_study(chosen, at_once=1, progress=lambda *args: told.append(args))
    assert told[-1] == ("scores", len(in_process), len(in_process))
    contest = report.comparisons["all"].contests[0][0]
    assert list(contest.methods) == ["base", "own LoRA", "linear", "ties", "gated"]
    assert contest.rows()["average"]["own LoRA"] == 100.0
    text = (tmp_path / "study.md").read_text()
    assert text.startswith("# Two of them\n")
    assert "Published, not measured here: Table 9" in text
    document = json.loads((tmp_path / "study.json").read_text())
    assert document["published"]["figures"] == {"up": {"paper": 47.0}}

    first = list(in_process)
    run_study(chosen, at_once=1)
    assert in_process == first  # nothing is done again
    run_study(chosen.model_copy(update={"seeds": (0, 1)}), at_once=1)
    assert in_process[len(first) :] == ["compositions/all/seed-1/gated", "scores/all/seed-1/gated"]


def test_a_study_of_numbers_has_a_curve(pair: Pair, tmp_path: Path, in_process: list[str]) -> None:
    chosen = recipe(pair, tmp_path, numbers=[1, 2], methods={"linear": None, "nla": None}, own=False)
    report = run_study(chosen, at_once=1)
    curve = report.curve()
    assert [row.label for row in curve.rows] == ["1", "2"]
    assert curve.columns == ("linear", "nla")
    assert (tmp_path / "study.png").stat().st_size > 1000


def test_learned_on_each_task_the_tasks_come_together_again(pair: Pair, tmp_path: Path, in_process: list[str]) -> None:
    report = run_study(recipe(pair, tmp_path, per_task=True), at_once=1)
    contest = report.comparisons["all"].contests[0][0]
    assert set(contest.rows()) == {"up", "down", "average"}
    assert "gated" in contest.methods


def test_a_job_that_fails_is_told_and_the_rest_goes_on(pair: Pair, tmp_path: Path, in_process: list[str]) -> None:
    notes: list[str] = []
    methods = {"linear": None, "pem": {"method": {"expression": "nobody"}}}
    report = run_study(recipe(pair, tmp_path, methods=methods), at_once=1, note=notes.append)
    assert any("compositions/all/fixed/pem" in note and "nobody" in note for note in notes)
    assert list(report.comparisons["all"].contests[0][0].methods) == ["own LoRA", "linear"]
    broken = recipe(pair, tmp_path / "b", methods={"pem": {"method": {"expression": "nobody"}}}, own=False)
    with pytest.raises(RunError, match="nothing was scored"):
        run_study(broken, at_once=1)


@pytest.mark.slow
def test_jobs_are_mole_commands(pair: Pair, tmp_path: Path) -> None:
    report = run_study(recipe(pair, tmp_path, methods={"linear": None}), at_once=2)
    assert report.comparisons["all"].contests[0][0].rows()["average"]["own LoRA"] == 100.0
    assert (tmp_path / "study-steps" / "scores" / "own" / "up.log").is_file()
