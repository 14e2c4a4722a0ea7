"""Settings that a study chooses on held-out examples."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pair import Pair, make_pair
from studies import run_here

from molecli.config import RECIPES, DataConfig, StudyRecipe
from molecli.errors import UsageError
from molecli.study.jobs import Job
from molecli.study.run import jobs_of, run_study
from molecli.study.tuning import Choice, choice_table, listed, widened
from molecli.training.examples import split_tasks


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[..., Path]) -> Pair:
    return make_pair(tiny_folder("llama"), tmp_path_factory.mktemp("trials"))


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return run_here(monkeypatch)


# Next to nothing of `up` answers no prompt; all of it answers half of them.
WEAK, WHOLE = "0.001 * up", "1.0 * up"
DOWN = "1.0 * down"


def recipe(pair: Pair, output: Path, tune: dict[str, Any], mode: str = "pem", **changes: Any) -> StudyRecipe:
    data = {"suite": "jsonl", "files": pair.files}
    train = {"steps": 3, "batch_size": 4, "warmup_steps": 1}
    learned = {"train": train} if mode == "gated" else {}
    tree: dict[str, Any] = {
        "base": pair.base,
        "experts": {"loras": [f"{n}={p}" for n, p in pair.loras.items()]},
        "methods": {"tuned": {"mode": mode, "tune": tune, **learned}},
        "fit": {**data, "holdout": 0.25},
        "test": {"data": {**data, "split": "train"}, "bootstrap": 50, "max_new_tokens": 4},
        "own": False,
        "output": str(output),
        "device": "cpu",
    }
    return StudyRecipe.model_validate({**tree, **changes})


def in_phase(jobs: list[Job], phase: str) -> list[Job]:
    return [job for job in jobs if job.phase == phase]


def test_every_combination_is_composed_and_scored_on_what_training_leaves_out(pair: Pair, tmp_path: Path) -> None:
    chosen = recipe(pair, tmp_path, {"train.lr": [0.1, 0.01], "gate.temperature": [1, 2]}, "gated", seeds=[4, 5])
    jobs = jobs_of(chosen)
    candidates = in_phase(jobs, "candidates")
    assert [job.name.rpartition("/")[2] for job in candidates] == [
        "lr=0.1, temperature=1",
        "lr=0.1, temperature=2",
        "lr=0.01, temperature=1",
        "lr=0.01, temperature=2",
    ]
    assert {job.tree["seed"] for job in candidates} == {4}  # the first alone
    assert candidates[1].tree["train"] == {"steps": 3, "batch_size": 4, "warmup_steps": 1, "lr": 0.1}
    assert candidates[1].tree["gate"] == {"temperature": 2}
    trials = in_phase(jobs, "trials")
    assert [job.tree["compositions"] for job in trials] == [[job.tree["output"]] for job in candidates]
    for job in jobs:
        RECIPES[job.command].model_validate(job.tree)
    tried = RECIPES["evaluate"].model_validate(trials[0].tree).eval.data  # type: ignore[attr-defined]
    assert (tried.split, tried.holdout, tried.limit) == ("train", 0.25, 32)
    trained, held = split_tasks(DataConfig.model_validate(candidates[0].tree["data"]))
    assert [len(rows) for rows in held.values()] == [1, 1]
    assert [len(rows) for rows in trained.values()] == [3, 3]


@pytest.mark.parametrize("order", [(WEAK, WHOLE), (WHOLE, WEAK)])
def test_the_best_on_held_out_examples_is_what_is_composed(
    pair: Pair, tmp_path: Path, in_process: list[str], order: tuple[str, ...]
) -> None:
    report = run_study(recipe(pair, tmp_path, {"method.expression": list(order)}), at_once=1)
    tried = {f"expression={WEAK}": 0.0, f"expression={WHOLE}": 50.0}
    assert report.choices == [Choice(None, "tuned", {"method.expression": WHOLE}, tried)]
    # What was chosen is taken from there as it was made to be tried.
    assert [name.partition("/")[0] for name in in_process] == ["candidates"] * 2 + ["trials"] * 2 + ["scores"]
    made = (tmp_path / "study-steps" / "compositions" / "all" / "fixed" / "tuned.yaml").read_text()
    assert f"expression: {WHOLE}" in made
    assert report.comparisons["all"].contests[0][0].rows()["average"]["tuned"] == 50.0
    text = (tmp_path / "study.md").read_text()
    assert "## Settings chosen on held-out examples" in text
    assert f"| tuned | expression={WHOLE} | " in text
    assert json.loads((tmp_path / "study.json").read_text())["tuned"][0]["settings"] == {"method.expression": WHOLE}

    ran = list(in_process)
    run_study(recipe(pair, tmp_path, {"method.expression": list(order)}), at_once=1)
    assert in_process == ran  # nothing is done again


def test_each_number_of_loras_has_its_own_choice(pair: Pair, tmp_path: Path, in_process: list[str]) -> None:
    report = run_study(recipe(pair, tmp_path, {"method.scale": [0.001, 1.0]}, "linear", numbers=[1, 2]), at_once=1)
    assert [(one.number, one.method) for one in report.choices] == [(1, "tuned"), (2, "tuned")]
    assert report.choices[0].settings == {"method.scale": 1.0}
    assert "| tuned, 1 LoRA | scale=1.0 | " in (tmp_path / "study.md").read_text()


def test_beyond_a_choice_at_the_edge_more_is_tried(pair: Pair, tmp_path: Path, in_process: list[str]) -> None:
    given = recipe(pair, tmp_path, {"method.scale": [0.01, 1.0]}, "linear")
    (choice,) = run_study(given, at_once=1).choices
    assert list(choice.tried) == ["scale=0.01", "scale=1.0", "scale=100.0"]
    assert (choice.settings, choice.edge) == ({"method.scale": 1.0}, "")
    written = json.loads((tmp_path / "study.json").read_text())["recipe"]
    assert written["methods"]["tuned"]["tune"] == {"method.scale": [0.01, 1.0]}
    ran = list(in_process)
    run_study(given, at_once=1)
    assert in_process == ran  # nothing is done again

    as_listed = recipe(pair, tmp_path / "b", {"method.scale": [0.01, 1.0]}, "linear", wider=0)
    (choice,) = run_study(as_listed, at_once=1).choices
    assert (list(choice.tried), choice.edge) == (["scale=0.01", "scale=1.0"], "most tried")
    assert "| tuned | scale=1.0 (most tried) |" in (tmp_path / "b" / "study.md").read_text()


def test_more_is_tried_at_the_number_whose_choice_lies_at_the_edge(pair: Pair, tmp_path: Path) -> None:
    grid = listed(recipe(pair, tmp_path, {"method.scale": [0.1, 0.5, 1.0]}, "linear", numbers=[1, 2]))
    choices = [
        Choice(1, "tuned", {"method.scale": 0.5}, {"scale=0.1": 1.0, "scale=0.5": 3.0, "scale=1.0": 2.0}),
        Choice(2, "tuned", {"method.scale": 0.1}, {"scale=0.1": 3.0, "scale=0.5": 2.0, "scale=1.0": 1.0}),
    ]
    wider = widened(grid, choices)
    assert wider is not None
    assert {number: method.tune["method.scale"] for (number, _), method in wider.items()} == {
        1: [0.1, 0.5, 1.0],
        2: [0.1, 0.5, 1.0, 0.02],
    }
    assert widened(grid, choices[:1]) is None


def test_of_what_learns_nothing_each_task_has_its_own_choice(pair: Pair, tmp_path: Path, in_process: list[str]) -> None:
    fit = {"suite": "jsonl", "files": pair.files}
    given = recipe(pair, tmp_path, {"method.expression": [WEAK, WHOLE, DOWN]}, per_task=True, fit=fit)
    jobs = in_phase(jobs_of(given), "trials")
    tried = RECIPES["evaluate"].model_validate(jobs[0].tree).eval.data  # type: ignore[attr-defined]
    assert (tried.tasks, tried.split, tried.holdout) == (
        ("up", "down"),
        "train",
        0.0,
    )  # what learned methods learn from

    report = run_study(given, at_once=1)
    assert [(one.task, one.settings["method.expression"]) for one in report.choices] == [("up", WHOLE), ("down", DOWN)]
    assert report.choices[0].tried == {
        f"expression={WEAK}": 0.0,
        f"expression={WHOLE}": 100.0,
        f"expression={DOWN}": 0.0,
    }
    scores = sorted(name for name in in_process if name.startswith("scores"))
    assert scores == [f"scores/all/fixed/tuned/expression={one}" for one in (DOWN, WHOLE)]
    assert report.comparisons["all"].contests[0][0].rows()["average"] == {"tuned": 100.0}
    text = (tmp_path / "study.md").read_text()
    assert "## Settings chosen on each task's training examples" in text
    assert f"| tuned | expression={WHOLE} (1 task), expression={DOWN} (1 task) | " in text
    ran = list(in_process)
    run_study(given, at_once=1)
    assert in_process == ran  # nothing is done again


def test_where_a_tasks_examples_do_not_tell_the_first_is_taken(
    pair: Pair, tmp_path: Path, in_process: list[str]
) -> None:
    fit = {"suite": "jsonl", "files": pair.files}
    nothing = ["0.002 * up", WEAK]
    report = run_study(recipe(pair, tmp_path, {"method.expression": nothing}, per_task=True, fit=fit), at_once=1)
    assert [one.settings["method.expression"] for one in report.choices] == [nothing[0]] * 2
    wide = recipe(pair, tmp_path / "b", {"method.scale": [0.01, 1.0]}, "linear", per_task=True, fit=fit)
    assert len(run_study(wide, at_once=1).choices[0].tried) == 2  # no wider: a few examples do not tell the best


@pytest.mark.parametrize(
    ("settings", "tried", "beyond"),
    [
        ({"method.scale": 0.02}, {"scale=0.05": 1.0, "scale=0.02": 3.0}, 0.008),
        ({"method.scale": 0.3}, {"scale=0.1": 1.0, "scale=0.3": 3.0}, 0.9),
        ({"method.scale": 0.1}, {"scale=0.02": 1.0, "scale=0.1": 3.0, "scale=1": 2.0}, None),
        ({"method.scale": 0.1}, {"scale=0.1": 3.0, "scale=0.2": 3.0}, None),
        ({"method.top_k": 1}, {"top_k=1": 3.0, "top_k=2": 1.0}, None),
        ({"method.scale": 0.0}, {"scale=0.0": 3.0, "scale=0.1": 1.0}, None),
    ],
)
def test_what_lies_beyond_the_edge(settings: dict[str, Any], tried: dict[str, float], beyond: float | None) -> None:
    assert Choice(None, "ties", settings, tried).beyond == beyond


@pytest.mark.parametrize(
    ("tune", "changes", "message"),
    [
        ({"scale": [1]}, {}, r"methods\.tuned\.tune: 'scale' is not a setting"),
        ({"experts.train": [1]}, {}, "is not a setting"),
        ({"method.scale": []}, {}, r"no values of method\.scale are listed"),
        ({"method.scael": [1]}, {}, r"methods\.tuned\.method\.scael"),
        ({"method.scale": [1, -1]}, {}, r"methods\.tuned\.method\.scale"),
        (
            {"gate.temperature": [1]},
            {"per_task": True, "methods": {"tuned": {"mode": "gated", "tune": {"gate.temperature": [1]}}}},
            "this method learns from each task",
        ),
        ({"method.scale": [1]}, {"fit": {"suite": "builtin"}}, r"held-out examples, and none are held out.*holdout"),
        ({"method.scale": [1]}, {"methods": {"base": {"mode": "base", "tune": {"method.scale": [1]}}}}, "is not"),
    ],
)
def test_what_cannot_be_chosen(
    pair: Pair, tmp_path: Path, tune: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        recipe(pair, tmp_path, tune, "linear", **changes)


@pytest.mark.parametrize(
    ("settings", "tried", "edge"),
    [
        ({"method.scale": 0.02}, {"scale=0.02": 3.0, "scale=0.1": 1.0}, "least tried"),
        ({"method.scale": 0.1}, {"scale=0.02": 1.0, "scale=0.1": 3.0}, "most tried"),
        ({"method.scale": 0.1}, {"scale=0.02": 1.0, "scale=0.1": 3.0, "scale=1": 2.0}, ""),
        ({"method.scale": 0.1}, {"scale=0.1": 3.0}, ""),
        ({"method.expression": "a"}, {"expression=a": 3.0, "expression=b": 1.0}, ""),
        ({"method.scale": 0.1, "method.rank": 2}, {"scale=0.1, rank=2": 3.0, "scale=0.2, rank=2": 1.0}, ""),
    ],
)
def test_a_choice_at_the_edge_of_what_was_tried_says_so(
    settings: dict[str, Any], tried: dict[str, float], edge: str
) -> None:
    choice = Choice(None, "ties", settings, tried)
    assert choice.edge == edge
    (row,) = choice_table([choice]).rows
    assert row.texts[0].endswith(f"({edge})") == bool(edge)
