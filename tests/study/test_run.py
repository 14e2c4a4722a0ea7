"""Studies: which commands one asks for, what is not done again, and the tables of what was scored."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path
from threading import Event, Lock, Thread
from time import sleep
from typing import Any

import pytest
from pair import Pair, make_pair
from studies import run_here

from molecli.config import RECIPES, StudyRecipe, dump_recipe, load_recipe
from molecli.errors import RunError, UsageError
from molecli.study import scheduler as study_work
from molecli.study.jobs import PHASES, Job
from molecli.study.report import curve_of, lines_of, study_report
from molecli.study.run import jobs_of, missing, run_study
from molecli.suites.jsonl import JsonlSuite
from molecli.training.examples import part_of


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


def test_a_column_may_have_seeds_of_its_own(pair: Pair, tmp_path: Path) -> None:
    methods = {"soup": {"seeds": [7]}, "gated": None}
    composed = names(jobs_of(recipe(pair, tmp_path, methods=methods, seeds=[0, 1], own=False)), "compositions")
    assert composed == ["all/seed-7/soup", "all/seed-0/gated", "all/seed-1/gated"]


def test_a_column_may_have_some_of_the_numbers(pair: Pair, tmp_path: Path, in_process: list[str]) -> None:
    methods = {"linear": None, "nla": {"numbers": [1]}}
    report = run_study(recipe(pair, tmp_path, methods=methods, numbers=[1, 2], own=False), at_once=1)
    assert [name for name in in_process if name.startswith("compositions/2")] == ["compositions/2-loras/fixed/linear"]
    assert [None in row.scores for row in report.curve().rows] == [False, True]
    assert (tmp_path / "study.png").stat().st_size > 1000
    with pytest.raises(UsageError, match=r"methods\.nla\.numbers: 3 is not among the study's `numbers`"):
        recipe(pair, tmp_path, methods={"nla": {"numbers": [3]}}, numbers=[1, 2])


def test_learning_on_each_task_by_itself(pair: Pair, tmp_path: Path) -> None:
    jobs = jobs_of(recipe(pair, tmp_path, per_task=True))
    assert "all/seed-0/up/gated" in names(jobs, "compositions")
    assert "all/fixed/linear" in names(jobs, "compositions")
    gated = next(job for job in jobs if job.name == "compositions/all/seed-0/up/gated")
    assert gated.tree["data"]["tasks"] == ["up"]
    scored = next(job for job in jobs if job.name == "scores/all/seed-0/up")
    assert scored.tree["eval"]["data"]["tasks"] == ["up"]


def test_of_methods_learned_on_each_task_xlora_is_scored_by_itself(pair: Pair, tmp_path: Path) -> None:
    methods = {"soup": None, "gated": None, "routed": {"mode": "xlora"}}
    jobs = jobs_of(recipe(pair, tmp_path, per_task=True, methods=methods, own=False))
    assert names(jobs, "scores") == [f"all/seed-0/{place}" for place in ("up", "down", "routed/up", "routed/down")]
    run = Path("compositions/all/seed-0/up")
    told = {job.name: job.tree.get("compositions") for job in jobs}
    assert told["scores/all/seed-0/up"] == [str(tmp_path / "study-steps" / run / name) for name in ("soup", "gated")]
    assert told["scores/all/seed-0/routed/up"] == [str(tmp_path / "study-steps" / run / "routed")]


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


def test_pem_adds_all_loras_alike_where_it_is_not_told(pair: Pair, tmp_path: Path) -> None:
    methods = {"pem": None, "own words": {"mode": "pem", "method": {"expression": "up - down"}}}
    told = {job.name: job.tree for job in jobs_of(recipe(pair, tmp_path, methods=methods, numbers=[1, 2]))}
    assert told["compositions/1-loras/fixed/pem"]["method"]["expression"] == "1.0 * 'up'"
    assert told["compositions/2-loras/fixed/pem"]["method"]["expression"] == "0.5 * 'up' + 0.5 * 'down'"
    assert told["compositions/2-loras/fixed/own words"]["method"]["expression"] == "up - down"


def test_a_method_may_have_adapters_of_its_own(pair: Pair, tmp_path: Path) -> None:
    experts = {"data": {"suite": "jsonl", "files": pair.files}, "adapter": {"rank": 3}, "train": {"steps": 5}}
    methods = {"linear": None, "svdiff": {"experts": {"adapter": {"method": "svdiff"}}}}
    jobs = {job.name: job for job in jobs_of(recipe(pair, tmp_path, experts=experts, methods=methods))}
    assert [job.name for job in jobs.values() if job.phase == "loras"] == [
        "loras/up",
        "loras/down",
        "own-loras/svdiff/up",
        "own-loras/svdiff/down",
    ]
    assert jobs["loras/up"].tree["adapter"] == {"rank": 3}
    assert jobs["own-loras/svdiff/up"].tree["adapter"] == {"method": "svdiff"}
    assert jobs["own-loras/svdiff/up"].tree["train"] == {"steps": 5}
    sources = [lora["source"] for lora in jobs["compositions/all/fixed/svdiff"].tree["loras"]]
    assert sources == [str(tmp_path / "study-steps" / "own-loras" / "svdiff" / name) for name in ("up", "down")]


def test_looking_at_gates_is_a_command_that_saves(pair: Pair, tmp_path: Path) -> None:
    looks = [job for job in jobs_of(recipe(pair, tmp_path, gates=True, per_task=True)) if job.phase == "gates"]
    assert [job.name for job in looks] == ["gates/all/seed-0/up/gated", "gates/all/seed-0/down/gated"]
    assert looks[0].command == "inspect-gates"
    assert looks[0].arguments == ["--output", str(tmp_path / "study-steps" / looks[0].name)]
    assert looks[0].tree["data"]["tasks"] == ["up"]
    assert looks[0].tree["data"]["limit"] == 64
    assert looks[0].tree["composition"] == str(tmp_path / "study-steps" / "compositions/all/seed-0/up/gated")


@pytest.mark.parametrize(
    ("sections", "folders"),
    [
        (("nli", "nli", "nli"), ("D", "D", "D")),
        (("nli", "nli", "bbh"), ("D/nli", "D/nli", "D/bbh")),
        (("nli+cbqa", "bbh", "bbh"), ("D", "D/bbh", "D/bbh")),
        (("nli+cbqa", "nli+cbqa", "nli+cbqa"), ("D", "D", "D")),
    ],
)
def test_one_folder_holds_the_files_of_all_suites(sections: tuple[str, ...], folders: tuple[str, ...]) -> None:
    trained, fit, test = sections
    tree = {
        "data_dir": "D",
        "methods": {"linear": None},
        "experts": {"data": {"suite": trained}},
        "fit": {"suite": fit},
        "test": {"data": {"suite": test}},
    }
    chosen = StudyRecipe.model_validate(tree)
    assert (chosen.experts.data.data_dir, chosen.fit.data_dir, chosen.test.data.data_dir) == folders
    tree["fit"] = {"suite": fit, "data_dir": "elsewhere"}
    assert StudyRecipe.model_validate(tree).fit.data_dir == "elsewhere"


def test_a_study_repeated_from_its_record_asks_for_the_same(pair: Pair, tmp_path: Path) -> None:
    chosen = recipe(pair, tmp_path, seeds=[0, 2])
    (tmp_path / "recipe.yaml").write_text(dump_recipe(chosen))
    again = load_recipe(tmp_path, "study")
    assert isinstance(again, StudyRecipe)
    assert [job.digest for job in jobs_of(again)] == [job.digest for job in jobs_of(chosen)]


def test_a_steps_digest_is_of_what_it_does_not_of_where(pair: Pair, tmp_path: Path) -> None:
    experts = {"data": {"suite": "jsonl", "files": pair.files}}
    here, there = (jobs_of(recipe(pair, tmp_path / n, experts=experts))[0] for n in ("a", "b"))
    assert here.digest == there.digest
    assert here.tree["output"] != there.tree["output"]
    other = jobs_of(recipe(pair, tmp_path / "a", experts={**experts, "adapter": {"rank": 2}}))[0]
    assert other.digest != here.digest


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
        ({"methods": {"a/b": {"mode": "linear"}}}, "not a valid name of a column"),
        ({"methods": {"g": {"mode": "gated", "gate": {"granularty": "block"}}}}, r"methods\.g\.gate\.granularty"),
        ({"subject": "gatde"}, "^subject: no column is called 'gatde'. Did you mean 'gated'"),
        ({"subject": "none", "methods": {"none": {"mode": "base"}, "nla": None}}, r"called 'none'. Known: base, nla\."),
        ({"numbers": [9]}, "9 LoRAs should be composed, but there are only 2"),
        ({"groups": {"some": ["up", "dwon"]}}, r"groups\.some: the test has no task 'dwon'.*down"),
        ({"methods": {"single": None}}, "single is one LoRA alone"),
        (
            {"methods": {"svdiff": {"experts": {"adapter": {"method": "svdiff"}}}}},
            r"methods\.svdiff\.experts: the LoRAs",
        ),
        ({"methods": {"g": {"mode": "gated", "experts": {"adaptor": {}}}}}, "adaptor|experts.loras"),
    ],
)
def test_what_cannot_be_a_study(pair: Pair, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        jobs_of(recipe(pair, tmp_path, **changes))


# -- running it --------------------------------------------------------------------------------------------------------


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return run_here(monkeypatch)


def test_a_study_ends_in_tables_and_goes_on_where_it_was(pair: Pair, tmp_path: Path, in_process: list[str]) -> None:
    told: list[tuple[str, int, int]] = []
    chosen = recipe(pair, tmp_path, title="Two of them")
    report = run_study(chosen, at_once=1, progress=lambda *args: told.append(args))
    for phase in ("compositions", "scores"):
        count = sum(name.startswith(phase) for name in in_process)
        assert [one for one in told if one[0] == phase] == [(phase, n, count) for n in range(1, count + 1)]
    contest = report.comparisons["all"].contests[0][0]
    assert list(contest.methods) == ["base", "own LoRA", "linear", "ties", "gated"]
    assert contest.rows()["average"]["own LoRA"] == 100.0
    text = (tmp_path / "study.md").read_text()
    assert text.startswith("# Two of them\n")
    assert "published" not in text

    first = list(in_process)
    run_study(chosen, at_once=1)
    assert in_process == first  # nothing is done again
    run_study(chosen.model_copy(update={"seeds": (0, 1)}), at_once=1)
    assert in_process[len(first) :] == ["compositions/all/seed-1/gated", "scores/all/seed-1/gated"]


def test_two_columns_of_one_setting_are_learned_once(pair: Pair, tmp_path: Path, in_process: list[str]) -> None:
    one, more = {"mode": "gated", "train": TRAIN}, {"mode": "gated", "train": {**TRAIN, "steps": 4}}
    methods = {"this": one, "that": one, "longer": more}
    report = run_study(recipe(pair, tmp_path, methods=methods, own=False, seeds=[0, 1]), at_once=1)
    composed = [name.removeprefix("compositions/all/") for name in in_process if name.startswith("compositions")]
    ours = [name for name in composed if "longer" not in name]
    assert sorted(set(composed) - set(ours)) == ["seed-0/longer", "seed-1/longer"]
    assert [name.partition("/")[0] for name in sorted(ours)] == ["seed-0", "seed-1"]  # of this or of that
    rows = report.comparisons["all"].contests[0][0].rows()
    assert rows["average"]["this"] == rows["average"]["that"]
    files = [tmp_path / f"study-steps/compositions/all/seed-1/{name}/composition.safetensors" for name in methods]
    assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()


def test_where_a_setting_fails_every_column_of_it_does(pair: Pair, tmp_path: Path, in_process: list[str]) -> None:
    wrong = {"mode": "pem", "method": {"expression": "up + elsewhere"}}
    methods = {"linear": None, "this": wrong, "that": wrong}
    report = run_study(recipe(pair, tmp_path, methods=methods, own=False), at_once=1)
    assert len([name for name in in_process if name.startswith("compositions")]) == 2
    why = {report.failed[f"compositions/all/fixed/{name}"] for name in ("this", "that")}
    assert len(why) == 1
    assert "elsewhere" in why.pop()


def test_published_figures_stand_beside_those_of_here(
    pair: Pair, tmp_path: Path, in_process: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    published = {"up": {"linear": 47.0, "theirs": 12.25}, "down": {"own LoRA": 1.5}, "average": {"linear": 48}}
    chosen = recipe(pair, tmp_path, methods={"linear": None}, published=published, source="Table 9")
    rows = run_study(chosen, at_once=1).comparisons["all"].contests[0][0].rows()
    text = (tmp_path / "study.md").read_text()
    assert "- published: not measured here, but taken from Table 9" in text
    assert f"- here: this study, on {pair.base}" in text
    lines = text[text.index("## Beside the published figures") :].splitlines()
    heads = ("linear, here", "linear, published", "theirs, published", "own LoRA, here", "own LoRA, published")
    assert lines[2] == f"| here and published | {' | '.join(heads)} |"
    assert lines[4] == f"| up | {rows['up']['linear']:.1f} | 47.0 | 12.25 | 100.0 | – |"
    assert lines[5] == f"| down | {rows['down']['linear']:.1f} | – | – | 100.0 | 1.5 |"
    assert lines[6] == f"| average | {rows['average']['linear']:.1f} | 48.0 | – | 100.0 | – |"
    run_study(chosen, at_once=1).show()
    assert "\n\n## Beside the published figures\n\n| here and" in capsys.readouterr().out
    document = json.loads((tmp_path / "study.json").read_text())
    assert document["published"] == {"source": "Table 9", "figures": published}


@pytest.mark.parametrize("row", ["elsewhere", None])
def test_an_average_over_other_tasks_is_not_shown(
    pair: Pair, tmp_path: Path, in_process: list[str], row: str | None
) -> None:
    more = {row: {"linear": 3}} if row else {}
    published = {"up": {"linear": 1}, **({"down": {"linear": 2}} if row else {}), **more, "average": {"linear": 4}}
    run_study(recipe(pair, tmp_path, methods={"linear": None}, own=False, published=published), at_once=1)
    lines = (tmp_path / "study.md").read_text().splitlines()
    assert "| average | – | 4.0 |" in lines
    assert any(line.startswith("| up | ") and line.endswith(" | 1.0 |") and "–" not in line for line in lines)


def test_every_metric_that_is_named_has_its_table(pair: Pair, tmp_path: Path, in_process: list[str]) -> None:
    base = recipe(pair, tmp_path).test
    rows = {"up": 2, "up rouge1": 1, "down": 5, "average of all": 3}
    published = {row: {"linear": value} for row, value in rows.items()}
    test = base.model_copy(update={"metrics": ("f1", "rouge1")})
    chosen = recipe(pair, tmp_path, methods={"linear": None}, own=False, test=test, published=published)
    report = run_study(chosen, at_once=1)
    f1, rouge = (contest for contest, _ in report.comparisons["all"].contests)
    assert (f1.label, rouge.label) == ("f1", "rouge1")
    row = (tmp_path / "study.md").read_text().splitlines()
    both = (f1.rows()["average"]["linear"] + rouge.rows()["average"]["linear"]) / 2
    assert f"| up rouge1 | {rouge.rows()['up']['linear']:.1f} | 1.0 |" in row
    assert f"| up | {f1.rows()['up']['linear']:.1f} | 2.0 |" in row
    assert f"| average of all | {both:.1f} | 3.0 |" in row


def test_loras_on_tasks_of_different_metrics_are_one_column(
    pair: Pair, tmp_path: Path, in_process: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in instruction_induction, where some tasks are scored by f1."""
    monkeypatch.setattr(JsonlSuite, "metrics", lambda self, task: ("f1",) if task == "down" else ("exact_match",))
    report = run_study(recipe(pair, tmp_path, methods={"base": None, "linear": None}), at_once=1)
    assert report.comparisons["all"].contests[0][0].metrics == {"up": "exact_match", "down": "f1"}


def test_a_group_of_tasks_has_a_table_of_its_own(pair: Pair, tmp_path: Path, in_process: list[str]) -> None:
    chosen = recipe(pair, tmp_path, methods={"linear": None}, own=False, groups={"the first": ["up"]})
    report = run_study(chosen, at_once=1)
    whole, group = (contest for contest, _ in report.comparisons["all"].contests)
    assert (list(whole.scores), list(group.scores), group.among) == (["up", "down"], ["up"], "the first")
    assert "| exact_match (%), the first | linear |" in (tmp_path / "study.md").read_text()
    assert report.document()["comparisons"]["all"]["comparisons"][1]["among"] == "the first"
    assert "growth" not in report.document()  # of one number of LoRAs


def test_margins_are_of_the_column_that_the_recipe_names(pair: Pair, tmp_path: Path, in_process: list[str]) -> None:
    chosen = recipe(pair, tmp_path, methods={"base": None, "linear": None, "nla": None}, groups={"the first": ["up"]})
    plain = run_study(chosen, at_once=1).document()["comparisons"]["all"]["comparisons"]
    first = list(in_process)
    assert all("subject" not in one["verdicts"]["up"] for one in plain)
    run_study(chosen.model_copy(update={"subject": "base"}), at_once=1)
    assert in_process == first  # what was scored is read again, nothing else
    document = json.loads((tmp_path / "study.json").read_text())
    assert document["recipe"]["subject"] == "base"
    for one, before in zip(document["comparisons"]["all"]["comparisons"], plain, strict=True):
        for row, verdict in one["verdicts"].items():
            assert (verdict["subject"], verdict["winner"]) == ("base", before["verdicts"][row]["winner"])
            scores = one["scores"][row]
            differences = {margin["second"]: margin["difference"] for margin in verdict["margins"]}
            assert differences == {
                name: pytest.approx(scores["base"] - scores[name]) for name in scores if name != "base"
            }
    text = (tmp_path / "study.md").read_text()
    assert "| base − other, exact_match, the first | winner | base | linear | nla |" in text
    assert "winner − other" not in text


def test_what_the_gates_do_is_told_where_it_is_asked_for(pair: Pair, tmp_path: Path, in_process: list[str]) -> None:
    methods = {
        "linear": None,
        "balanced": {"mode": "gated", "train": {**TRAIN, "balance": 5.0}},
        "free": {"mode": "gated", "train": {**TRAIN, "steps": 12, "lr": 0.5, "balance": 0.0}},
    }
    published = {"largest mean weight": {"free": 68}}
    chosen = recipe(pair, tmp_path, methods=methods, own=False, seeds=[0, 1], gates=True, published=published)
    report = run_study(chosen, at_once=1)
    looked = [name for name in in_process if name.startswith("gates")]  # columns go on side by side, in no order
    assert sorted(looked) == [f"gates/all/seed-{seed}/{name}" for seed in (0, 1) for name in ("balanced", "free")]
    balanced, free = report.looks
    assert (balanced.name, free.name, free.compositions) == ("balanced", "free", 2)
    assert set(free.weights) == {"up", "down"}
    assert sum(free.weights.values()) == pytest.approx(1)
    assert list(free.course) == list(range(1, 13))
    assert free.course[1] == pytest.approx(free.uniform)  # a fresh gate is uniform
    assert free.course[12] < balanced.course[3]
    text = (tmp_path / "study.md").read_text()
    assert "| gate entropy (nats) | balanced | free |" in text
    assert f"| largest mean weight | {100 * free.largest:.1f} | 68.0 |" in text
    assert (tmp_path / "entropy.png").stat().st_size > 1000
    assert json.loads((tmp_path / "study.json").read_text())["gates"][1]["entropy"] == free.entropy


def test_a_study_of_numbers_has_a_curve(pair: Pair, tmp_path: Path, in_process: list[str]) -> None:
    published = {"1": {"nla": 1}, "2": {"nla": 2}, "average": {"nla": 9}}
    changes: dict[str, Any] = {"methods": {"linear": None, "nla": None}, "own": False, "published": published}
    chosen = recipe(pair, tmp_path, numbers=[1, 2], **changes)
    report = run_study(chosen, at_once=1)
    nla = [row.scores[1] for row in report.curve().rows]
    text = (tmp_path / "study.md").read_text()
    assert f"| 1 | {nla[0]:.1f} | 1.0 |" in text
    assert f"| average | {sum(nla) / 2:.1f} | 9.0 |" in text  # type: ignore[arg-type]
    curve = report.curve()
    assert [row.label for row in curve.rows] == ["1", "2"]
    assert curve.columns == ("linear", "nla")
    assert (tmp_path / "study.png").stat().st_size > 1000


def test_a_curve_names_methods_from_the_best_on_also_where_one_stops_early() -> None:
    curve = curve_of({"8-loras": {"low": 1.0, "early": 2.0}, "24-loras": {"low": 1.5, "high": 3.0}})
    assert lines_of(curve) == {"high": [(1, 3.0)], "early": [(0, 2.0)], "low": [(0, 1.0), (1, 1.5)]}
    assert list(lines_of(curve)) == ["high", "early", "low"]


def test_a_study_of_numbers_tells_whether_a_method_grows(
    pair: Pair, tmp_path: Path, in_process: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = recipe(pair, tmp_path, methods={"base": None, "linear": None, "iso": None}, numbers=[1, 2])
    document = run_study(chosen, at_once=1).document()
    assert json.loads((tmp_path / "study.json").read_text())["growth"] == document["growth"]
    scores = tmp_path / "study-steps" / "scores"

    def average(number: int, method: str) -> float:
        rows = [
            [json.loads(line)["exact_match"] for line in file.read_text().splitlines()]
            for file in (scores / f"{number}-loras" / "fixed" / method).glob("samples_*.jsonl")
        ]
        assert len(rows) == 2
        return 100 * sum(sum(some) / len(some) for some in rows) / 2

    found = {one["method"]: one for one in document["growth"]}
    assert list(found) == ["linear", "iso"]  # base and own LoRA are what they are at every number
    text = (tmp_path / "study.md").read_text()
    part = text[text.index("## Average by the number of LoRAs") :].splitlines()
    at = part.index("| gain from more LoRAs | 1 → 2 |")
    for line, (method, one) in zip(part[at + 2 :], found.items(), strict=False):
        assert (one["from"], one["to"]) == ("1-loras", "2-loras")
        assert one["difference"] == pytest.approx(average(2, method) - average(1, method))
        assert one["low"] <= one["difference"] <= one["high"]
        star = " *" * one["significant"]
        assert line == f"| {method} | {one['difference']:+.1f} [{one['low']:+.1f}, {one['high']:+.1f}]{star} |"
    assert {name: one["significant"] for name, one in found.items()} == {"linear": False, "iso": True}
    assert part[at + 5].startswith("- gain from more LoRAs: a method's average at the larger number")
    assert part[at + 6].startswith("- * the 95% interval of the difference excludes zero (paired bootstrap, 50 resam")

    done = list(in_process)
    plain = chosen.model_copy(update={"test": chosen.test.model_copy(update={"bootstrap": 0})})
    run_study(plain, at_once=1).show()
    assert in_process == done
    shown = capsys.readouterr().out
    assert f"| iso | {found['iso']['difference']:+.1f} |" in shown
    assert "interval" not in shown


def test_learned_on_each_task_the_tasks_come_together_again(pair: Pair, tmp_path: Path, in_process: list[str]) -> None:
    methods = {"linear": None, "gated": {"train": TRAIN}, "xlora": {"train": TRAIN}}
    report = run_study(recipe(pair, tmp_path, per_task=True, methods=methods, seeds=[0, 1]), at_once=1)
    contest = report.comparisons["all"].contests[0][0]
    assert set(contest.rows()) == {"up", "down", "average"}
    assert contest.methods == {"own LoRA": 1, "linear": 1, "gated": 2, "xlora": 2}


def test_a_job_that_fails_is_told_and_the_rest_goes_on(pair: Pair, tmp_path: Path, in_process: list[str]) -> None:
    notes: list[str] = []
    methods = {"linear": None, "pem": {"method": {"expression": "nobody"}}}
    report = run_study(recipe(pair, tmp_path, methods=methods), at_once=1, note=notes.append)
    assert any("compositions/all/fixed/pem" in note and "nobody" in note for note in notes)
    assert list(report.comparisons["all"].contests[0][0].methods) == ["own LoRA", "linear"]
    assert list(report.failed) == ["compositions/all/fixed/pem", "scores/all/fixed/pem"]
    made = json.loads((tmp_path / "study.json").read_text())["recipe"]
    assert made["methods"]["pem"] == {"mode": "pem", "method": {"expression": "nobody"}}
    assert StudyRecipe.model_validate(made).methods.keys() == {"linear", "pem"}
    told = (tmp_path / "study.md").read_text()
    assert "## Not done" in told
    assert f"- compositions/all/fixed/pem: {report.failed['compositions/all/fixed/pem']}" in told
    broken = recipe(pair, tmp_path / "b", methods={"pem": {"method": {"expression": "nobody"}}}, own=False)
    with pytest.raises(RunError, match="nothing was scored"):
        run_study(broken, at_once=1)


def test_columns_run_apart_are_one_study_once_put_together(pair: Pair, tmp_path: Path, in_process: list[str]) -> None:
    methods = {"base": None, "linear": None, "soup": {"train": TRAIN}, "gated": {"train": TRAIN}}

    def study(**changes: Any) -> StudyRecipe:
        # A study's commands name what they need by its output folder.
        return recipe(pair, tmp_path / "run", methods=methods, per_task=True, own=False, **changes)

    first = run_study(study(), at_once=1, columns=["soup", "linear"])
    assert list(first.comparisons["all"].contests[0][0].methods) == ["linear"]  # soup and gated are scored together
    together = "2 of 2 evaluations not run"
    assert first.missing == {"soup": together, "gated": together, "base": "1 of 1 evaluation not run"}
    assert "## Not done\n\n- base: 1 of 1 evaluation not run\n- soup: 2 of 2 evaluations not run\n" in first.markdown()
    assert first.document()["missing"] == first.missing
    assert [name for name in in_process if "gated" in name or "base" in name] == []
    assert "compositions/all/seed-0/up/soup" in in_process
    in_process.clear()
    both = run_study(study(), at_once=1, columns=["soup", "gated"])
    assert [name for name in in_process if "linear" in name or "/soup" in name or "loras" in name] == []
    assert set(both.comparisons["all"].contests[0][0].methods) == {"linear", "soup", "gated"}
    in_process.clear()
    whole = run_study(study(), at_once=1)
    assert in_process == ["scores/base"]
    assert set(whole.comparisons["all"].contests[0][0].methods) == {"base", "linear", "soup", "gated"}
    assert (whole.missing, "Not done" in whole.markdown()) == ({}, False)
    with pytest.raises(UsageError, match=r"no column 'sopu'.*soup"):
        run_study(study(), at_once=1, columns=["sopu"])
    with pytest.raises(UsageError, match="no column 'own LoRA'"):
        run_study(study(), at_once=1, columns=["own LoRA"])


def test_what_is_missing_is_told_by_column_and_number(pair: Pair, tmp_path: Path) -> None:
    methods = {"linear": None, "gated": {"train": TRAIN}}
    asked = recipe(pair, tmp_path, methods=methods, own=False, numbers=[1, 2], seeds=[0, 1])
    over = {f"scores/{n}-loras/fixed/linear" for n in (1, 2)} | {f"scores/2-loras/seed-{n}/gated" for n in (0, 1)}
    one = {"gated, 1 LoRA": "1 of 2 evaluations not run"}
    assert missing(asked, jobs_of(asked), {*over, "scores/1-loras/seed-1/gated"}) == one
    assert missing(asked, jobs_of(asked), over - {"scores/2-loras/seed-0/gated"}) == {
        "gated, 1 LoRA": "2 of 2 evaluations not run",
        "gated, 2 LoRAs": "1 of 2 evaluations not run",
    }


@pytest.mark.filterwarnings("ignore:.*are the same LoRA")
def test_each_task_without_its_own_lora(pair: Pair, tmp_path: Path, in_process: list[str]) -> None:
    loras = [f"{name}{again}={path}" for again in ("", "2") for name, path in pair.loras.items()]
    methods = {"base": None, "linear": None, "gated": {"train": TRAIN}}
    changes = {"experts": {"loras": loras}, "methods": methods, "own": False}
    chosen = recipe(pair, tmp_path, per_task=True, leave_out=True, **changes)
    made = {job.name: job.tree for job in jobs_of(chosen) if job.phase == "compositions"}
    for place, others in (("fixed/up/linear", ["down", "up2", "down2"]), ("seed-0/down/gated", ["up", "up2", "down2"])):
        assert [lora["name"] for lora in made[f"compositions/all/{place}"]["loras"]] == others
    contest = run_study(chosen, at_once=1).comparisons["all"].contests[0][0]
    assert set(contest.methods) == {"base", "linear", "gated"}
    assert set(contest.rows()) == {"up", "down", "average"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_task": False}, "leave_out: it needs one composition per task"),
        ({"numbers": [1]}, "leave_out: it needs one composition per task"),
        ({"methods": {"linear": {"tune": {"method.scale": [1.0]}}}}, r"methods\.linear\.tune: settings are tuned with"),
    ],
)
def test_what_leaves_nothing_out(pair: Pair, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        recipe(pair, tmp_path, **{"per_task": True, "leave_out": True, **changes})


def test_what_has_some_of_the_tasks_only_is_told_and_not_compared(
    pair: Pair, tmp_path: Path, in_process: list[str]
) -> None:
    methods = {"linear": None, "gated": {"train": TRAIN}, "xlora": {"train": TRAIN}}
    chosen = recipe(pair, tmp_path, per_task=True, own=False, methods=methods)
    run_study(chosen, at_once=1)
    scores = tmp_path / "study-steps" / "scores" / "all"
    shutil.rmtree(scores / "seed-0" / "xlora" / "down")
    done = [str(mark.relative_to(tmp_path / "study-steps").with_suffix("")) for mark in scores.rglob("*.done")]
    left = study_report(chosen, tmp_path / "study-steps", [name for name in done if "xlora/down" not in name])
    assert left.partial == {"scores/all/seed-0/xlora": "on 1 of 2 tasks, xlora"}
    assert set(left.comparisons["all"].contests[0][0].methods) == {"linear", "gated"}
    assert "- scores/all/seed-0/xlora: on 1 of 2 tasks, xlora" in left.markdown()
    assert left.document()["partial"] == left.partial


def held_until(monkeypatch: pytest.MonkeyPatch, slow: str, quick: str) -> None:
    """The job `slow` begins once `quick` is over."""
    called, over = study_work.called, Event()

    def slowly(job: Job, folder: Path, environment: dict[str, str]) -> str:
        if job.name == slow:
            assert over.wait(60), f"{quick} waited for {slow}"
        made = called(job, folder, environment)
        if job.name == quick:
            over.set()
        return made

    monkeypatch.setattr(study_work, "called", slowly)


def test_a_slow_column_does_not_hold_up_the_others(
    pair: Pair, tmp_path: Path, in_process: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    held_until(monkeypatch, "compositions/all/fixed/slow", "scores/all/fixed/quick")
    methods = {"slow": {"mode": "linear"}, "quick": {"mode": "ties"}}
    report = run_study(recipe(pair, tmp_path, methods=methods, own=False), at_once=2)
    assert list(report.comparisons["all"].contests[0][0].methods) == ["slow", "quick"]


def test_a_seed_is_scored_while_another_is_still_learned(
    pair: Pair, tmp_path: Path, in_process: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    held_until(monkeypatch, "compositions/all/seed-0/gated", "scores/all/seed-1/gated")
    methods = {"gated": {"train": {"steps": 1, "batch_size": 2}}}
    run_study(recipe(pair, tmp_path, methods=methods, own=False, seeds=[0, 1]), at_once=2)
    assert in_process.index("scores/all/seed-1/gated") < in_process.index("compositions/all/seed-0/gated")
    assert sum(name.startswith("scores") for name in in_process) == 2


def test_a_job_reads_what_others_make(pair: Pair, tmp_path: Path) -> None:
    data = {"suite": "jsonl", "files": pair.files}
    experts = {"data": data, "adapter": {"rank": 2}, "train": {"steps": 1, "batch_size": 2}}
    methods = {"gated": {"tune": {"train.lr": [0.1, 0.2]}}}
    fit = {**data, "holdout": 0.2}
    asked = recipe(pair, tmp_path, experts=experts, methods=methods, fit=fit, gates=True)
    jobs = jobs_of(asked)
    makers = {job.output: job.phase for job in jobs}
    read = {phase: {makers[path] for job in jobs if job.phase == phase for path in job.reads} for phase in PHASES}
    assert read == {
        "loras": set(),
        "candidates": {"loras"},
        "trials": {"candidates"},
        "compositions": {"loras"},
        "scores": {"compositions"},
        "gates": {"compositions"},
    }


def test_a_lora_that_several_columns_need_is_trained_once(pair: Pair, tmp_path: Path, in_process: list[str]) -> None:
    data = {"suite": "jsonl", "files": pair.files}
    experts = {"data": data, "adapter": {"rank": 2}, "train": {"steps": 1, "batch_size": 2}}
    methods = {"linear": None, "ties": None, "again": {"mode": "ties"}}
    run_study(recipe(pair, tmp_path, experts=experts, methods=methods, own=False, numbers=[1, 2]), at_once=1)
    assert sorted(name for name in in_process if name.startswith("loras")) == ["loras/down", "loras/up"]
    assert len(in_process) == len(set(in_process))


@pytest.mark.parametrize(
    ("left", "used"), [("", {"0", "1"}), ("2, 3", {"2", "3"}), ("GPU-a,GPU-b", {"GPU-a", "GPU-b"})]
)
def test_jobs_are_spread_over_the_gpus_that_the_study_may_use(
    pair: Pair, tmp_path: Path, in_process: list[str], monkeypatch: pytest.MonkeyPatch, left: str, used: set[str]
) -> None:
    seen: set[str] = set()
    called = study_work.called

    def noted(job: Job, folder: Path, environment: dict[str, str]) -> str:
        seen.add(environment["CUDA_VISIBLE_DEVICES"])
        with one_at_a_time:
            return called(job, folder, environment)

    one_at_a_time = Lock()
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", left)
    monkeypatch.setattr(study_work, "called", noted)
    run_study(recipe(pair, tmp_path, methods={"linear": None, "nla": None}), at_once=2)
    assert seen == used


def test_an_error_in_one_column_ends_the_study(
    pair: Pair, tmp_path: Path, in_process: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(job: Job, folder: Path, environment: dict[str, str]) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(study_work, "called", broken)
    with pytest.raises(KeyboardInterrupt):
        run_study(recipe(pair, tmp_path), at_once=1)


def test_who_waits_for_a_job_that_will_not_begin_ends(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = jobs_of(recipe(pair, tmp_path, methods={"linear": None, "nla": None}))
    first, second, *_ = (job for job in jobs if job.phase == "compositions")
    began, go_on, ended = Event(), Event(), Event()

    def called(job: Job, folder: Path, environment: dict[str, str]) -> str:
        began.set()
        assert go_on.wait(60)
        return "stopped"

    def waits() -> None:
        with pytest.raises(CancelledError):
            work.do([second], ["compositions"])
        ended.set()

    monkeypatch.setattr(study_work, "called", called)
    work = study_work.Work(tmp_path, 1, None, lambda text: None)
    threads = [Thread(target=work.do, args=([first], ["compositions"]), daemon=True), Thread(target=waits, daemon=True)]
    threads[0].start()
    assert began.wait(60)
    threads[1].start()
    while second.digest not in work._made and threads[1].is_alive():  # until it lies behind the first
        sleep(0.01)
    closing = Thread(target=work.close, daemon=True)
    closing.start()
    assert work._closed.wait(60)
    go_on.set()
    assert ended.wait(60)
    for thread in (closing, *threads):
        thread.join(60)
    assert work.failed == {first.name: "stopped"}


@pytest.mark.slow
def test_jobs_are_mole_commands(pair: Pair, tmp_path: Path) -> None:
    report = run_study(recipe(pair, tmp_path, methods={"linear": None}), at_once=2)
    assert report.comparisons["all"].contests[0][0].rows()["average"]["own LoRA"] == 100.0
    assert (tmp_path / "study-steps" / "scores" / "own" / "up.log").is_file()
