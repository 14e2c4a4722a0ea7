"""Comparing finished evaluations: pooled by method, paired by example, refused where they do not belong together."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from molecli.catalog.metrics import metric_row
from molecli.errors import MismatchError, UsageError
from molecli.evaluation.compare import CompareReport, judged, run_compare
from molecli.evaluation.results import document, write
from molecli.evaluation.scoring import OWN_LORA, TaskResult, score
from molecli.functional.bootstrap import paired_bootstrap
from molecli.images.scenes import PlannedPicture
from molecli.images.scoring import PictureResult
from molecli.protocols import Example, Scene
from molecli.text.evaluate import with_own_lora

TASKS = ("sum", "diff")
ROWS = 40


def examples(task: str, count: int = ROWS) -> list[Example]:
    return [Example(task, f"{task} {i}", f"answer {i}") for i in range(count)]


def result(task: str, right: Sequence[bool], *, metrics: Sequence[str] = ("exact_match",)) -> TaskResult:
    rows = examples(task, len(right))
    return score(task, rows, [row.target if hit else "wrong" for row, hit in zip(rows, right, strict=True)], metrics)


def hits(share: float, seed: int, count: int = ROWS) -> list[bool]:
    rng = random.Random(seed)
    return [rng.random() < share for _ in range(count)]


def save(
    folder: Path,
    methods: dict[str, list[Any]],
    *,
    config: Any = None,
    suite: tuple[str, str] = ("jsonl", "1"),
    **more: Any,
) -> str:
    """Writes what `mole evaluate` would; `more` replaces keys of results.json."""
    content = document(methods, list(methods)[-1], suite=suite, comparisons=[], config=config)
    write(folder, {**content, **more}, methods)
    return str(folder)


def method(share: float, seed: int) -> list[TaskResult]:
    return [result(task, hits(share, seed + i)) for i, task in enumerate(TASKS)]


@pytest.fixture
def run(tmp_path: Path) -> str:
    return save(tmp_path / "run", {"base": method(0.1, 1), "linear": method(0.5, 3), "gated": method(0.9, 5)})


def verdict(report: Any, row: str = "average", table: int = 0) -> dict[str, Any]:
    return report.document()["comparisons"][table]["verdicts"][row]


def test_scores_are_those_of_the_results_and_the_best_of_each_row_wins(run: str) -> None:
    report = run_compare([run])
    content = json.loads(Path(run, "results.json").read_text())
    scores = report.document()["comparisons"][0]["scores"]
    for task in TASKS:
        for name in ("base", "linear", "gated"):
            assert scores[task][name] == pytest.approx(100 * content["methods"][name][task]["exact_match,none"])
    assert scores["average"] == pytest.approx(content["average"])
    assert {row: verdict(report, row)["winner"] for row in (*TASKS, "average")} == dict.fromkeys(
        (*TASKS, "average"), "gated"
    )


def test_margins_are_paired_bootstrap_intervals_over_the_same_examples(run: str) -> None:
    report = run_compare([run], samples=300, seed=4)
    one, other = ([torch.tensor(r.percents) for r in method(*of)] for of in ((0.9, 5), (0.5, 3)))
    wanted = paired_bootstrap(one, other, generator=torch.Generator().manual_seed(4), samples=300)
    (found,) = (m for m in verdict(report)["margins"] if m["second"] == "linear")
    assert [found[key] for key in ("difference", "low", "high")] == pytest.approx(
        [wanted.estimate, wanted.low, wanted.high]
    )
    assert found["significant"] is True


def test_each_tasks_own_lora_is_what_the_others_are_measured_by(tmp_path: Path) -> None:
    run = save(tmp_path / "run", {"linear": method(0.4, 3), "own LoRA": method(0.95, 7), "gated": method(0.8, 5)})
    report = run_compare([run], samples=200)
    found = verdict(report)
    assert found["winner"] == "gated"
    (own,) = (m for m in found["margins"] if m["second"] == "own LoRA")
    assert own["difference"] < 0
    assert own["significant"] is True
    line = report.lines()[-1]
    assert "gated wins on average over 2 tasks; clearly ahead of linear; minus each task's own LoRA -" in line
    alone = save(tmp_path / "alone", {"own LoRA": method(0.9, 7)})
    assert verdict(run_compare([alone]))["winner"] == "own LoRA"


def test_a_difference_that_may_be_chance_is_not_significant(tmp_path: Path) -> None:
    first, second = hits(0.5, 1), hits(0.5, 1)
    second[0] = not second[0]
    run = save(tmp_path / "run", {"a": [result("sum", first)], "b": [result("sum", second)]})
    (margin,) = verdict(run_compare([run]), "sum")["margins"]
    assert margin["difference"] == pytest.approx(100 / ROWS)
    assert margin["significant"] is False


def test_methods_of_different_folders_stand_in_one_table(run: str, tmp_path: Path) -> None:
    other = save(tmp_path / "other", {"ties": method(0.7, 9)})
    report = run_compare([run, other])
    assert report.tables()[0].columns == ("base", "linear", "gated", "ties")
    assert {m["second"] for m in verdict(report)["margins"]} == {"base", "linear", "ties"}


def test_seeds_of_one_method_are_averaged_example_by_example(tmp_path: Path) -> None:
    seeds = [hits(0.6, seed) for seed in (1, 2, 3)]
    base = hits(0.3, 4)
    runs = [
        save(tmp_path / str(i), {"base": [result("sum", base)], "gated": [result("sum", right)]})
        for i, right in enumerate(seeds)
    ]
    report = run_compare(runs, samples=400)
    content = report.document()["comparisons"][0]
    assert content["methods"] == {"base": {"runs": 3}, "gated": {"runs": 3}}
    mean = torch.tensor(seeds).double().mean(dim=0)
    assert content["scores"]["sum"]["gated"] == pytest.approx(100 * mean.mean().item())
    assert content["by_run"]["gated"] == pytest.approx(
        {run: 100 * sum(right) / ROWS for run, right in zip(runs, seeds, strict=True)}
    )
    wanted = paired_bootstrap(
        [100 * mean],
        [100 * torch.tensor(base).double()],
        generator=torch.Generator().manual_seed(0),
        samples=400,
    )
    (margin,) = verdict(report, "sum")["margins"]
    assert (margin["low"], margin["high"]) == pytest.approx((wanted.low, wanted.high))
    assert "Each score is over 3 runs." in report.lines()


def test_a_method_of_one_run_beside_one_of_three_says_how_many_each_has(tmp_path: Path, run: str) -> None:
    seeds = [save(tmp_path / str(i), {"gated": method(0.8, 20 + i)}) for i in range(2)]
    report = run_compare([run, *seeds])
    assert report.tables()[0].columns == ("base", "linear", "gated (3 runs)")


def test_a_name_before_the_path_takes_the_last_method_under_it(run: str, tmp_path: Path) -> None:
    seeds = [save(tmp_path / str(i), {"base": method(0.1, 1), f"seed{i}": method(0.8, 20 + i)}) for i in range(2)]
    report = run_compare([run, *(f"mine={place}" for place in seeds)])
    content = report.document()["comparisons"][0]
    assert content["methods"] == {
        name: {"runs": 2 if name == "mine" else 1} for name in ("base", "linear", "gated", "mine")
    }


def in_parts(folder: Path, methods: dict[str, list[Any]], **more: Any) -> list[str]:
    """A run, and one of each of its tasks alone."""
    parts = [
        save(folder / task, {name: [some[i]] for name, some in methods.items()}, **more) for i, task in enumerate(TASKS)
    ]
    return [save(folder / "whole", methods, **more), *parts]


def test_runs_of_other_tasks_are_one_in_parts(run: str, tmp_path: Path) -> None:
    whole, *parts = in_parts(tmp_path / "ties", {"ties": method(0.7, 9)})
    wanted = run_compare([run, whole]).document()
    found = run_compare([run, *reversed(parts)]).document()
    assert found["comparisons"] == wanted["comparisons"]
    assert [one["place"] for one in found["runs"]] == [run, *reversed(parts)]


def test_parts_that_have_a_task_again_are_repetitions(run: str, tmp_path: Path) -> None:
    seeds = [in_parts(tmp_path / str(i), {"gated": method(0.8, 20 + i)}) for i in range(2)]
    wanted = run_compare([run, *(whole for whole, *_ in seeds)]).document()["comparisons"][0]
    by_seed = [part for _, *parts in seeds for part in parts]
    by_task = [part for parts in zip(*(parts for _, *parts in seeds), strict=True) for part in parts]
    for order in (by_seed, by_task):
        found = run_compare([run, *order]).document()["comparisons"][0]
        assert found["methods"]["gated"] == {"runs": 3}
        assert found["scores"] == wanted["scores"]
        assert found["verdicts"] == wanted["verdicts"]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"metric_versions": {"exact_match": "2"}}, "the metric exact_match is 2 here and 1"),
        ({"clip": "ViT-B-32"}, "the CLIP is ViT-B-32 here and None"),
    ],
)
def test_parts_that_are_not_scored_alike_are_refused(tmp_path: Path, other: dict[str, Any], said: str) -> None:
    _, one, _ = in_parts(tmp_path / "a", {"gated": method(0.5, 1)})
    _, _, two = in_parts(tmp_path / "b", {"gated": method(0.5, 2)}, **other)
    refused(MismatchError, f"{two}: {said} in {one}. Evaluate both alike.", [one, two])


def test_parts_of_other_settings_are_refused(tmp_path: Path) -> None:
    _, one, _ = in_parts(tmp_path / "a", {"gated": method(0.5, 1)}, config={"base": {"id": "a"}})
    _, _, two = in_parts(tmp_path / "b", {"gated": method(0.5, 2)}, config={"base": {"id": "b"}})
    what = f"the method 'gated' is also in {one}, and `base` differs between their recipes"
    refused(MismatchError, f"{two}: {what}. Give the last method of each its own name: NAME=PATH.", [one, two])


def test_a_folder_whose_name_holds_the_sign_is_a_folder(tmp_path: Path) -> None:
    run = save(tmp_path / "a=b", {"base": method(0.1, 1), "gated": method(0.9, 5)})
    assert list(run_compare([run]).runs[0].methods) == ["base", "gated"]


def test_results_json_itself_may_be_named(run: str) -> None:
    assert verdict(run_compare([f"{run}/results.json"])) == verdict(run_compare([run]))


def test_examples_in_another_order_are_paired_all_the_same(run: str, tmp_path: Path) -> None:
    """Two files that hold the same lines differently sorted."""

    def shuffled(task: TaskResult) -> TaskResult:
        order = list(range(ROWS))
        random.Random(0).shuffle(order)
        some = [task.examples[i] for i in order]
        return score(task.task, some, [task.outputs[i] for i in order], ["exact_match"])

    straight = save(tmp_path / "straight", {"ties": method(0.7, 9)})
    mixed = save(tmp_path / "mixed", {"ties": [shuffled(task) for task in method(0.7, 9)]})
    assert verdict(run_compare([run, straight])) == verdict(run_compare([run, mixed]))


def test_a_question_asked_twice_is_two_examples(tmp_path: Path) -> None:
    rows = [Example("sum", "the same", "yes")] * 3
    made = {
        name: [score("sum", rows, said, ["exact_match"])]
        for name, said in {"a": ["yes"] * 3, "b": ["yes", "no", "no"]}.items()
    }
    report = run_compare([save(tmp_path / "run", made)])
    assert report.document()["comparisons"][0]["examples"] == {"sum": 3}
    assert verdict(report, "sum")["margins"][0]["difference"] == pytest.approx(200 / 3)


def test_bleu_is_compared_over_the_whole_set_and_each_seed_by_itself(tmp_path: Path) -> None:
    rows = [Example("talk", str(i), f"the old cat number {i} sat on the mat near my door") for i in range(12)]
    rng = random.Random(0)

    def said(rate: float) -> TaskResult:
        words = [[w if rng.random() < rate else "um" for w in row.target.split()] for row in rows]
        return score("talk", rows, [" ".join(some) for some in words], ["bleu"])

    seeds = [said(0.9), said(0.9)]
    base = said(0.6)
    runs = [save(tmp_path / str(i), {"base": [base], "gated": [one]}) for i, one in enumerate(seeds)]
    report = run_compare(runs, samples=200)
    scores = report.document()["comparisons"][0]["scores"]["talk"]
    assert scores["gated"] == pytest.approx((seeds[0].percent + seeds[1].percent) / 2, abs=1e-3)
    (margin,) = verdict(report, "talk")["margins"]
    assert margin["difference"] == pytest.approx(scores["gated"] - base.percent, abs=1e-3)
    assert margin["low"] < margin["difference"] < margin["high"]
    assert margin["significant"] is True


def test_each_tasks_own_lora_is_read_from_that_loras_samples(tmp_path: Path) -> None:
    alone = {
        task: [result(name, hits(0.9 if name == task else 0.1, 7 + i)) for i, name in enumerate(TASKS)]
        for task in TASKS
    }
    methods = {**alone, "gated": method(0.5, 3)}
    shown = with_own_lora(methods, list(TASKS))
    write(tmp_path, document(shown, "gated", suite=("jsonl", "1"), comparisons=[]), methods)
    report = run_compare([str(tmp_path)])
    assert report.tables()[0].columns == (OWN_LORA, "sum", "diff", "gated")
    scores = report.document()["comparisons"][0]["scores"]
    assert [scores[task][OWN_LORA] for task in TASKS] == [scores[task][task] for task in TASKS]


def test_tasks_and_metrics_can_be_chosen(tmp_path: Path) -> None:
    both = ("exact_match", "exact_match_lm_eval")
    methods = {
        name: [result(task, hits(s, i), metrics=both) for i, task in enumerate(TASKS)]
        for name, s in {"a": 0.2, "b": 0.8}.items()
    }
    run = save(tmp_path / "run", methods)
    report = run_compare([run], tasks=["diff"], metrics=list(both))
    assert [table.corner for table in report.tables()] == [
        "exact_match (%)",
        "winner − other, exact_match",
        "exact_match_lm_eval (%)",
        "winner − other, exact_match_lm_eval",
    ]
    assert [row.label for row in report.tables()[0].rows] == ["diff"]


def test_the_tables_and_the_lines_below_them(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    run_compare([run], samples=200).show()
    shown = capsys.readouterr().out
    assert shown.startswith("| exact_match (%) | base | linear | gated |\n|---|---:|---:|---:|\n| sum | ")
    assert "| winner − other, exact_match | winner | base | linear | gated |\n" in shown
    assert (
        "* the 95% interval of the difference excludes zero (paired bootstrap, 200 resamples of 80 examples, seed 0)"
        in shown
    )
    assert shown.endswith("exact_match: gated wins on average over 2 tasks; clearly ahead of base, linear\n")


def test_without_resamples_there_are_differences_alone(run: str) -> None:
    report = run_compare([run], samples=0)
    assert verdict(report)["margins"][0]["significant"] is None
    assert report.lines() == ["exact_match: gated wins on average over 2 tasks"]
    assert "[" not in str(report.tables()[1].rows[-1])


def test_methods_that_score_the_same_win_alike(tmp_path: Path) -> None:
    run = save(tmp_path / "run", {"a": method(0.5, 1), "b": method(0.5, 1), "c": method(0.1, 2)})
    report = run_compare([run], samples=100)
    assert verdict(report)["tied"] == ("b",) or verdict(report)["tied"] == ["b"]
    assert report.tables()[1].rows[-1].cells()[0][0] == "a = b"
    assert report.lines()[-1] == "exact_match: a and b win alike on average over 2 tasks; clearly ahead of c"


def test_one_method_has_no_rival(tmp_path: Path) -> None:
    report = run_compare([save(tmp_path / "run", {"base": method(0.1, 1)})])
    assert len(report.tables()) == 1
    assert report.lines() == []


def test_what_is_written_is_what_is_shown(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run_compare([run], samples=50)
    report.write(tmp_path / "out")
    report.show()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"comparison.json", "comparison.md"}
    assert (tmp_path / "out" / "comparison.md").read_text("utf-8") == capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "comparison.json").read_text("utf-8"))
    assert written == json.loads(json.dumps(report.document()))


# Margins of a method that was named beforehand


def of(subject: str, *targets: str, samples: int = 200) -> CompareReport:
    """The comparison of `targets` with the margins of `subject`."""
    report = run_compare(targets, samples=0)
    contests = [(one, judged(one, samples=samples, seed=0, subject=subject)) for one, _ in report.contests]
    return CompareReport(report.runs, contests, samples, 0)


def test_a_subject_that_wins_has_the_margins_of_the_winner(run: str) -> None:
    report, plain = of("gated", run), run_compare([run], samples=200)
    assert verdict(report) == {**verdict(plain), "subject": "gated"}
    assert report.tables()[1].corner == "gated − other, exact_match"
    assert report.tables()[1].rows == plain.tables()[1].rows
    assert report.lines()[-1] == "exact_match: gated wins on average over 2 tasks; gated ahead of base, linear"


def test_a_subject_that_is_behind_says_so(tmp_path: Path) -> None:
    near = method(0.5, 3)
    near[0] = result("sum", [not hit if i == 0 else hit for i, hit in enumerate(hits(0.5, 3))])
    methods = {"base": method(0.1, 1), "near": near, "linear": method(0.5, 3), "gated": method(0.9, 5)}
    run = save(tmp_path / "run", {**methods, OWN_LORA: method(1.0, 7)})
    report = of("linear", run)
    found, scores = verdict(report), report.document()["comparisons"][0]["scores"]["average"]
    assert (found["winner"], found["subject"]) == ("gated", "linear")
    assert {one["second"]: one["difference"] for one in found["margins"]} == {
        name: pytest.approx(scores["linear"] - scores[name]) for name in ("base", "near", "gated", OWN_LORA)
    }
    behind = next(one for one in found["margins"] if one["second"] == "gated")
    back = next(one for one in verdict(run_compare([run], samples=200))["margins"] if one["second"] == "linear")
    assert [behind["difference"], behind["low"], behind["high"]] == pytest.approx(
        [-back["difference"], -back["high"], -back["low"]]
    )
    winner, _, _, own, gated, _ = (text for text, _ in report.tables()[1].rows[-1].cells())
    assert (winner, own, gated[0], gated[-1]) == ("gated", "–", "-", "*")
    told = "linear ahead of base; behind gated; no clear difference from near; minus each task's own LoRA -"
    assert report.lines()[-1].startswith(f"exact_match: gated wins on average over 2 tasks; {told}")


def test_ahead_and_behind_go_by_what_is_better(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fewer_errors = replace(metric_row("exact_match"), direction="lower")
    monkeypatch.setattr("molecli.evaluation.compare.metric_row", lambda name: fewer_errors)
    report = of("linear", run)
    assert verdict(report)["winner"] == "base"
    differences = {one["second"]: one["difference"] for one in verdict(report)["margins"]}
    assert differences["base"] > 0 > differences["gated"]
    assert report.lines()[-1].endswith("base wins on average over 2 tasks; linear ahead of gated; behind base")


def test_a_subject_that_shares_the_win_is_told_from_the_others_alone(tmp_path: Path) -> None:
    run = save(tmp_path / "run", {"a": method(0.5, 1), "b": method(0.5, 1), "c": method(0.1, 2)})
    assert of("b", run).lines()[-1] == "exact_match: a and b win alike on average over 2 tasks; b ahead of c"
    assert of("c", run).lines()[-1] == "exact_match: a and b win alike on average over 2 tasks; c behind a, b"


def test_without_a_score_of_the_subject_margins_are_the_winners(run: str) -> None:
    report, plain = of("not scored", run), run_compare([run], samples=200)
    assert report.document() == plain.document()
    assert "subject" not in verdict(plain)
    assert (report.tables(), report.lines()) == (plain.tables(), plain.lines())


# Pictures


def planned(seeds: Sequence[int], scenes: Sequence[str] = ("pond", "hill")) -> list[PlannedPicture]:
    return [
        PlannedPicture(Scene("2 LoRAs", name, f"a cat at the {name}", ("cat", "hat")), number, seed)
        for name in scenes
        for number, seed in enumerate(seeds)
    ]


def drawn(some: Sequence[PlannedPicture], score_of: Callable[[PlannedPicture], float]) -> list[PictureResult]:
    scores = {"recognised": tuple(score_of(picture) for picture in some), "text_alignment": (0.5,) * len(some)}
    return [PictureResult("2 LoRAs", tuple(some), tuple(f"{i}.png" for i in range(len(some))), scores, len(some))]


def test_pictures_are_paired_by_scene_and_seed_and_have_a_table_for_each_metric(tmp_path: Path) -> None:
    one = save(tmp_path / "one", {"nla": drawn(planned([1, 2, 3]), lambda picture: 0.2)})
    two = save(tmp_path / "two", {"gated": drawn(planned([3, 1, 2]), lambda picture: 0.2 + 0.1 * picture.seed)})
    report = run_compare([one, two], samples=100)
    assert [table.corner for table in report.tables()][::2] == ["recognised (%)", "text_alignment (%)"]
    (margin,) = verdict(report, "2 LoRAs")["margins"]
    assert (margin["second"], margin["difference"]) == ("nla", pytest.approx(20.0))
    assert 10.0 <= margin["low"] <= margin["high"] <= 30.0


def test_runs_of_other_seeds_pool_their_pictures(tmp_path: Path) -> None:
    def both(seeds: Sequence[int]) -> dict[str, list[PictureResult]]:
        some = planned(seeds)
        return {"nla": drawn(some, lambda picture: 0.1), "gated": drawn(some, lambda picture: picture.seed / 10)}

    # Seeds 1 and 2, then 2 and 3: one picture of each scene was drawn twice.
    runs = [save(tmp_path / str(seeds[0]), both(seeds)) for seeds in ((1, 2), (2, 3))]
    report = run_compare(runs, samples=50)
    content = report.document()["comparisons"][0]
    assert content["examples"] == {"2 LoRAs": 6}
    assert content["scores"]["2 LoRAs"] == pytest.approx({"nla": 10.0, "gated": 20.0})


def test_pictures_of_other_seeds_alone_cannot_be_paired(tmp_path: Path) -> None:
    one = save(tmp_path / "one", {"nla": drawn(planned([1, 2]), lambda picture: 0.1)})
    two = save(tmp_path / "two", {"gated": drawn(planned([5, 6]), lambda picture: 0.1)})
    with pytest.raises(MismatchError) as caught:
        run_compare([one, two])
    what = "'gated' and 'nla' were not drawn from the same seeds (4 here, 4 there)"
    assert str(caught.value) == f"task 2 LoRAs: {what}. Compare runs of the same seeds and --images."


def test_pictures_of_other_scenes_are_refused(tmp_path: Path) -> None:
    one = save(tmp_path / "one", {"nla": drawn(planned([1]), lambda picture: 0.1)})
    two = save(tmp_path / "two", {"gated": drawn(planned([1], ["pond", "sea", "city"]), lambda picture: 0.1)})
    with pytest.raises(MismatchError) as caught:
        run_compare([one, two])
    assert str(caught.value) == (
        f"{two}: its scenes of the task '2 LoRAs' are not those of {one} (3 here, 2 there, 1 of them shared). "
        "Compare runs on the same data, split, --limit and --holdout."
    )


def test_scores_of_two_clips_are_refused(tmp_path: Path) -> None:
    runs = [
        save(tmp_path / clip, {clip: drawn(planned([1]), lambda picture: 0.1)}, clip=clip)
        for clip in ("ViT-B-32", "ViT-L-14")
    ]
    assert run_compare(runs, metrics=["recognised"], samples=0).lines()
    with pytest.raises(MismatchError) as caught:
        run_compare(runs, metrics=["text_alignment"])
    assert str(caught.value) == f"{runs[1]}: the CLIP is ViT-L-14 here and ViT-B-32 in {runs[0]}. Evaluate both alike."


# What does not belong together


def refused(error: type[MismatchError | UsageError], message: str, targets: Sequence[str], **options: Any) -> None:
    with pytest.raises(error) as caught:
        run_compare(targets, **options)
    assert str(caught.value) == message


def test_other_examples_are_refused(run: str, tmp_path: Path) -> None:
    other = save(tmp_path / "other", {"ties": [result(task, hits(0.5, 1, 30)) for task in TASKS]})
    refused(
        MismatchError,
        f"{other}: its examples of the task 'sum' are not those of {run} (30 here, 40 there, 30 of them shared). "
        "Compare runs on the same data, split, --limit and --holdout.",
        [run, other],
    )


def test_another_answer_to_the_same_question_is_another_example(run: str, tmp_path: Path) -> None:
    rows = [Example("sum", f"sum {i}", f"answer {i}", (f"answer {i}", "also")) for i in range(ROWS)]
    methods = {"ties": [score("sum", rows, ["also"] * ROWS, ["exact_match"]), result("diff", hits(0.5, 1))]}
    with pytest.raises(MismatchError, match=r"\(40 here, 40 there, 0 of them shared\)"):
        run_compare([run, save(tmp_path / "other", methods)])


def test_other_tasks_are_refused_unless_left_out(run: str, tmp_path: Path) -> None:
    other = save(tmp_path / "other", {"ties": method(0.7, 9)[:1]})
    message = f"{other}: it has no task 'diff', which {run} has. Write --tasks with the tasks that all runs have."
    refused(MismatchError, message, [run, other])
    refused(MismatchError, message, [other, run])
    assert verdict(run_compare([run, other], tasks=["sum"]), "sum")["winner"]


def test_other_versions_of_suite_and_metric_are_refused(run: str, tmp_path: Path) -> None:
    suite = save(tmp_path / "suite", {"ties": method(0.7, 9)}, suite=("jsonl", "2"))
    refused(MismatchError, f"{suite}: the suite of 'sum' is 2 here and 1 in {run}. Evaluate both alike.", [run, suite])
    metric = save(tmp_path / "metric", {"ties": method(0.7, 9)}, metric_versions={"exact_match": "2"})
    refused(
        MismatchError, f"{metric}: the metric exact_match is 2 here and 1 in {run}. Evaluate both alike.", [run, metric]
    )
    # Joined with another, a suite has the versions of both; its examples are looked at all the same.
    joined = save(tmp_path / "joined", {"ties": method(0.7, 9)}, suite=("jsonl+bbh", "1+1"))
    assert run_compare([run, joined], samples=0).lines()


def test_other_metrics_are_refused(run: str, tmp_path: Path) -> None:
    other = save(tmp_path / "other", {"ties": [result(t, hits(0.5, 1), metrics=["f1"]) for t in TASKS]})
    message = f"{other}: the task 'sum' is not scored by exact_match. Write --metrics with some of: f1."
    refused(MismatchError, message, [run, other])
    refused(UsageError, "--metrics: no task is scored by bleu. Write some of: exact_match.", [run], metrics=["bleu"])
    refused(UsageError, "metrics: no metric is called 'blue'. Did you mean 'bleu'?", [run], metrics=["blue"])


def test_completions_of_another_length_are_refused(tmp_path: Path) -> None:
    def made(name: str, room: int) -> str:
        methods = {name: method(0.5, 1)}
        content = document(
            methods, name, suite=("jsonl", "1"), comparisons=[], max_new_tokens=dict.fromkeys(TASKS, room)
        )
        write(tmp_path / name, content, methods)
        return str(tmp_path / name)

    one, two = made("a", 8), made("b", 64)
    refused(MismatchError, f"{two}: the longest completion is 64 here and 8 in {one}. Evaluate both alike.", [one, two])


@pytest.mark.parametrize(
    ("setting", "one", "two"),
    [
        ("base", {"base": {"id": "a"}}, {"base": {"id": "b"}}),
        (
            "loras",
            {"loras": [{"name": "x", "source": "s/1", "weight": 1.0}]},
            {"loras": [{"name": "x", "source": "s/1", "weight": 0.5}]},
        ),
        ("mask", {"mask": ["x"]}, {"mask": []}),
    ],
)
def test_one_name_for_two_settings_is_refused(tmp_path: Path, setting: str, one: Any, two: Any) -> None:
    runs = [save(tmp_path / str(i), {"gated": method(0.5, i)}, config=config) for i, config in enumerate((one, two))]
    what = f"the method 'gated' is also in {runs[0]}, and `{setting}` differs between their recipes"
    refused(MismatchError, f"{runs[1]}: {what}. Give the last method of each its own name: NAME=PATH.", runs)
    assert run_compare([f"a={runs[0]}", f"b={runs[1]}"], samples=0).lines()


def test_a_method_of_several_masks_is_that_of_a_run_with_its_own_alone(tmp_path: Path) -> None:
    def made(name: str, method_name: str, mask: Any) -> str:
        methods = {method_name: method(0.5, 1)}
        if name == "both":
            methods = {"gated": method(0.5, 2), "gated without x": method(0.5, 3)}
        return save(tmp_path / name, methods, config={"mask": mask, "only": []})

    both = made("both", "", [["x"], []])
    for name, method_name, mask in (("off", "gated without x", ["x"]), ("on", "gated", [])):
        report = run_compare([both, made(name, method_name, mask)]).document()
        assert report["comparisons"][0]["methods"][method_name] == {"runs": 2}
    other = made("other", "gated", ["x"])
    what = f"the method 'gated' is also in {both}, and `mask` differs between their recipes"
    refused(MismatchError, f"{other}: {what}. Give the last method of each its own name: NAME=PATH.", [both, other])


def test_the_same_loras_from_other_folders_are_one_method(tmp_path: Path) -> None:
    runs = [
        save(
            tmp_path / str(i),
            {"gated": method(0.5, i)},
            config={"loras": [{"name": "x", "source": f"seed{i}/x", "weight": 1.0}]},
        )
        for i in range(2)
    ]
    assert run_compare(runs).document()["comparisons"][0]["methods"] == {"gated": {"runs": 2}}


def test_what_is_no_result_is_refused(run: str, tmp_path: Path) -> None:
    name = "Name folders that mole evaluate wrote."
    refused(UsageError, "--compare: no results are named. Write folders that mole evaluate wrote.", [])
    refused(UsageError, f"{tmp_path}/none: no such file or folder. {name}", [f"{tmp_path}/none"])
    refused(UsageError, f"{tmp_path}/none: no such file or folder. {name}", [f"x={tmp_path}/none"])
    (tmp_path / "empty").mkdir()
    refused(UsageError, f"{tmp_path}/empty: there is no results.json in it. {name}", [f"{tmp_path}/empty"])
    refused(UsageError, "--tasks: no task is called 'sun'. Did you mean 'sum'?", [run], tasks=["sun"])
    file = tmp_path / "empty" / "results.json"
    file.write_text("{")
    refused(MismatchError, f"{file}: it cannot be read as JSON. Evaluate again.", [str(file)])
    file.write_text('{"results": {}}')
    refused(MismatchError, f"{file}: mole evaluate did not write it. {name}", [str(file)])


def test_samples_that_are_missing_or_damaged_are_named(run: str) -> None:
    samples = Path(run, "samples_sum.jsonl")
    lines = samples.read_text().splitlines()
    samples.write_text("\n".join(lines[: 2 * ROWS]) + "\n")
    refused(MismatchError, f"{run}: the method 'gated' has no samples of the task 'sum'. Evaluate again.", [run])
    samples.write_text(lines[0] + "\n" + '{"method": "base"}\n')
    refused(MismatchError, f"{samples}, line 2: it is not a sample of mole evaluate. Evaluate again.", [run])
    sample = {**json.loads(lines[0])}
    del sample["exact_match"]
    samples.write_text("\n".join([json.dumps(sample), *lines[1:]]) + "\n")
    refused(MismatchError, f"{run}: a sample of the task 'sum' has no exact_match. Evaluate again.", [run])
    samples.unlink()
    what = "it cannot be read, and runs are compared by their samples"
    refused(MismatchError, f"{samples}: {what}. Keep it beside results.json.", [run])
