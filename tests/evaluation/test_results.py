"""results.json and samples: lm-eval's shape, whole files, seeded intervals."""

from __future__ import annotations

import json
import os
import platform
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import pytest

from molecli.evaluation.results import average, compare, document, samples_paths, write
from molecli.evaluation.scoring import TaskResult, score
from molecli.protocols import Example

ANSWERS = ["yes", "no", "yes", "no"]


def results(*outputs: str) -> list[TaskResult]:
    examples = [Example("talk", f"prompt {i}", target) for i, target in enumerate(ANSWERS)]
    return [score("talk", examples, outputs, ["exact_match", "bleu"])]


METHODS = {"base": results("yes", "yes", "yes", "yes"), "gated": results("yes", "no", "yes", "no\nmore")}


def test_results_hold_scores_and_errors_under_lm_evals_names() -> None:
    content = document(METHODS, "base", suite=("jsonl", "1"), comparisons=[], config={"seed": 0})
    assert content["device"] == f"{os.cpu_count()} CPU cores ({platform.machine()})"
    row = content["results"]["talk"]
    assert row["exact_match,none"] == 0.5
    assert row["exact_match_stderr,none"] == pytest.approx(0.288675)
    assert row["bleu_stderr,none"] == "N/A"
    assert content["methods"]["gated"]["talk"]["exact_match,none"] == 1.0
    assert content["average"] == {"base": 50.0, "gated": 100.0}
    assert content["model_name"] == "base"
    assert content["versions"] == {"talk": "1"}
    assert content["n-samples"]["talk"]["effective"] == 4
    assert content["metric_versions"] == {"bleu": "1", "exact_match": "1"}
    assert content["config"] == {"seed": 0}
    json.dumps(content, allow_nan=False)


def test_results_say_what_a_score_depends_on() -> None:
    content = document(METHODS, "gated", suite=("jsonl", "1"), comparisons=[], max_new_tokens={"talk": 64})
    assert content["configs"]["talk"] == {
        "task": "talk",
        "dataset_name": "jsonl",
        "num_fewshot": 0,
        "metadata": {"version": "1"},
        "output_type": "generate_until",
        "generation_kwargs": {"do_sample": False, "max_gen_toks": 64},
        "metric_list": [
            {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True},
            {"metric": "bleu", "aggregation": "bleu", "higher_is_better": True},
        ],
    }
    assert content["n-shot"] == {"talk": 0}
    assert content["normalisers"]["exact_match"] == "equal to an answer after stripping white space"
    assert content["libraries"]["torch"] == version("torch")


def test_lm_evals_own_table_can_be_made_of_it() -> None:
    """It reads these keys of every task, and takes a metric's name up to the comma."""
    content = document(METHODS, "gated", suite=("jsonl", "1"), comparisons=[])
    for task, row in content["results"].items():
        assert {task} <= content["versions"].keys() & content["n-shot"].keys() & content["higher_is_better"].keys()
        scores = {key.partition(",") for key in row if key != "alias"}
        assert {(name, comma, of) for name, comma, of in scores if comma == "," and of == "none"} == scores
        for name, _, of in scores:
            if not name.endswith("_stderr"):
                assert f"{name}_stderr,{of}" in row
                assert name in content["higher_is_better"][task]


def test_comparisons_are_paired_seeded_and_in_points() -> None:
    (one,) = compare(METHODS, "gated", samples=500, seed=1)
    assert (one.first, one.second, one.difference) == ("gated", "base", 50.0)
    assert 0.0 <= one.low <= 50.0 <= one.high <= 100.0
    assert compare(METHODS, "gated", samples=500, seed=1) == [one]
    assert str(one) == f"gated − base: +50.0 [{one.low:+.1f}, {one.high:+.1f}] (95%)"
    assert compare(METHODS, "gated", samples=0, seed=1) == []


def test_another_method_leaves_an_interval_as_it_was() -> None:
    more = {"other": results("a", "b", "c", "d"), **METHODS}
    assert compare(more, "gated", samples=200, seed=0)[-1] == compare(METHODS, "gated", samples=200, seed=0)[0]


def test_samples_keep_prompt_raw_output_and_score_of_every_method(tmp_path: Path) -> None:
    content = document(METHODS, "gated", suite=("jsonl", "1"), comparisons=[])
    path = write(tmp_path / "run", content, METHODS)
    assert json.loads(path.read_text(encoding="utf-8")) == content
    lines = [json.loads(line) for line in (tmp_path / "run" / "samples_talk.jsonl").read_text("utf-8").splitlines()]
    assert len(lines) == 8
    last = lines[-1]
    assert (last["method"], last["doc_id"], last["prompt"], last["target"]) == ("gated", 3, "prompt 3", "no")
    assert (last["resps"], last["filtered_resps"], last["exact_match"]) == ([["no\nmore"]], ["no"], 1.0)
    assert last["prompt_hash"] == sha256(b"prompt 3").hexdigest()


def test_an_interrupted_write_leaves_the_old_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = document(METHODS, "gated", suite=("jsonl", "1"), comparisons=[])
    path = write(tmp_path, content, METHODS)
    before = path.read_bytes()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, {**content, "model_name": "other"}, METHODS)
    assert path.read_bytes() == before
    assert {file.name for file in tmp_path.iterdir()} == {"results.json", "samples_talk.jsonl"}


def test_no_two_tasks_share_a_samples_file() -> None:
    paths = samples_paths("out", ["reverse french", "reverse/french", "a_b", "translation_en-de"])
    assert [path.name for path in paths.values()] == [
        "samples_reverse_french.jsonl",
        "samples_reverse_french-2.jsonl",
        "samples_a_b.jsonl",
        "samples_translation_en-de.jsonl",
    ]


def test_the_average_weighs_tasks_equally() -> None:
    assert average([*METHODS["base"], *METHODS["gated"]]) == 75.0


def test_bleu_is_compared_as_it_is_shown_over_the_whole_set() -> None:
    """Not as the mean of the sentences' BLEU, which is another number."""
    long = "the old cat sat on the mat near the door of my house"
    answers = [long, "a short dog ran"]
    examples = [Example("talk", str(i), answer) for i, answer in enumerate(answers)]
    right, half = (score("talk", examples, said, ["bleu"]) for said in (answers, [long, "no one came here"]))
    (row,) = compare({"half": [half], "right": [right]}, "right", samples=50, seed=0)
    assert row.difference == pytest.approx(right.percent - half.percent)
    assert row.difference != pytest.approx(sum(right.percents) / 2 - sum(half.percents) / 2, abs=5)
