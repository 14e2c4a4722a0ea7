"""`mole evaluate` on a tiny T5: each method is attached alone, scored on the same examples, and left behind clean."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from molecli.bases.loading import load_backbone
from molecli.commands.evaluate import run_evaluate
from molecli.config import BaseConfig, EvalConfig, EvaluateRecipe
from molecli.errors import UsageError
from molecli.evaluation.scoring import OWN_LORA
from molecli.text.evaluate import make_bench

PROMPTS = ["one two", "three", "four five six", "seven", "eight nine", "ten"]
ROOM = 6


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory,
    make_tiny: Callable[..., Any],
    tiny_folder: Callable[..., Path],
    make_peft_adapter: Callable[..., Path],
) -> dict[str, Any]:
    """A base, two LoRAs, and for each a task whose targets are what PEFT's own model with that LoRA says."""
    folder = tmp_path_factory.mktemp("evaluate")
    base = tiny_folder("t5")
    model = make_tiny("t5").model
    loras, files = {}, {}
    for seed, name in enumerate(("up", "down")):
        loras[name] = str(make_peft_adapter(model, folder / name, seed=seed, scale=0.6))
        backbone = load_backbone(BaseConfig(id=str(base)), "cpu")
        backbone.model = peft.PeftModel.from_pretrained(copy.deepcopy(model), loras[name]).merge_and_unload()
        outputs = backbone.generate(PROMPTS, max_new_tokens=ROOM)
        lines = [json.dumps({"input": p, "target": o.strip()}) for p, o in zip(PROMPTS, outputs, strict=True)]
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {"base": str(base), "loras": loras, "files": {name: str(path) for name, path in files.items()}}


def recipe(world: dict[str, Any], output: Path, **changes: Any) -> EvaluateRecipe:
    evaluation = {
        "data": {"suite": "jsonl", "files": world["files"]},
        "max_new_tokens": ROOM,
        "batch_size": 4,
        "bootstrap": 50,
    }
    loras = [{"name": name, "source": source} for name, source in world["loras"].items()]
    base = {"id": world["base"], "dtype": "float32"}
    fields = {"base": base, "loras": loras, "eval": evaluation, "output": str(output), "device": "cpu", **changes}
    return EvaluateRecipe.model_validate(fields)


@pytest.fixture(scope="module")
def run(world: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    output = tmp_path_factory.mktemp("out")
    return run_evaluate(recipe(world, output)), output


def score(report: Any, method: str, task: str) -> float:
    return report["methods"][method][task]["exact_match,none"]


def test_every_baseline_is_scored_in_order(run: tuple[Any, Path]) -> None:
    report, _ = run
    assert list(report["methods"]) == ["base", OWN_LORA, "up", "down", "linear", "nla"]
    assert report["model_name"] == "nla"


def test_a_lora_alone_says_what_peft_says_and_the_others_do_not(run: tuple[Any, Path]) -> None:
    report, _ = run
    for task, other in (("up", "down"), ("down", "up")):
        assert score(report, task, task) == 1.0
        for method in ("base", other, "linear", "nla"):
            assert score(report, method, task) < 1.0, (method, task)
        assert score(report, OWN_LORA, task) == 1.0


def test_methods_give_different_outputs(run: tuple[Any, Path]) -> None:
    _, output = run
    rows = [json.loads(line) for line in (output / "samples_up.jsonl").read_text("utf-8").splitlines()]
    said = {name: [row["resps"] for row in rows if row["method"] == name] for name in ("base", "up", "down", "linear")}
    assert len({json.dumps(resps) for resps in said.values()}) == 4


def test_what_is_written_is_what_is_reported(run: tuple[Any, Path]) -> None:
    report, output = run
    assert json.loads((output / "results.json").read_text(encoding="utf-8")) == json.loads(json.dumps(report))
    assert {path.name for path in output.iterdir()} == {"results.json", "samples_up.jsonl", "samples_down.jsonl"}
    assert [c["second"] for c in report["comparisons"]] == ["base", OWN_LORA, "up", "down", "linear"]


def test_the_table_goes_to_stdout_as_markdown_where_nobody_watches(
    run: tuple[Any, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    report, _ = run
    report.show()
    shown = capsys.readouterr().out
    assert shown.startswith("| exact_match (%) | base | own LoRA | up | down | linear | nla |\n")
    assert "nla − base: " in shown


def test_masking_all_but_one_lora_is_that_lora(world: dict[str, Any], tmp_path: Path) -> None:
    report = run_evaluate(recipe(world, tmp_path, modes=["nla"], mask=["down"]))
    assert list(report["methods"]) == ["nla without down"]
    assert score(report, "nla without down", "up") == 1.0
    assert score(report, "nla without down", "down") < 1.0


def test_only_names_the_experts_that_stay(world: dict[str, Any], tmp_path: Path) -> None:
    report = run_evaluate(recipe(world, tmp_path, modes=["nla"], only=["down"]))
    assert score(report, "nla only down", "down") == 1.0


def test_weights_reach_the_mixture(world: dict[str, Any], tmp_path: Path) -> None:
    loras = [{"name": n, "source": s, "weight": float(n == "up")} for n, s in world["loras"].items()]
    report = run_evaluate(recipe(world, tmp_path, modes=["linear"], loras=loras))
    assert score(report, "linear", "up") == 1.0


def test_an_unknown_name_to_mask_stops_before_scoring(world: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        run_evaluate(recipe(world, tmp_path, modes=["nla"], mask=["left"]))
    assert str(caught.value) == "left: no such LoRA in this composition. Known: up, down."
    assert list(tmp_path.iterdir()) == []


def test_modes_without_loras_are_explained(world: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        run_evaluate(recipe(world, tmp_path, loras=[], modes=["linear"]))
    assert str(caught.value) == "--modes: 'linear' needs LoRAs, but none are named. Write --loras a=PATH,b=PATH."


def test_without_loras_the_base_alone_is_scored(world: dict[str, Any], tmp_path: Path) -> None:
    report = run_evaluate(recipe(world, tmp_path, loras=[]))
    assert list(report["methods"]) == ["base"]
    assert report["comparisons"] == []


def test_a_run_interrupted_between_methods_keeps_what_was_finished(world: dict[str, Any], tmp_path: Path) -> None:
    def interrupt(label: str, done: int, total: int) -> None:
        if label == "up":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_evaluate(recipe(world, tmp_path), progress=interrupt)
    kept = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert list(kept["methods"]) == ["base"]


def test_the_same_run_twice_gives_the_same_file(run: tuple[Any, Path], world: dict[str, Any], tmp_path: Path) -> None:
    report = run_evaluate(recipe(world, tmp_path))
    first, _ = run
    assert {**report, "config": None} == {**first, "config": None}


def test_a_bench_takes_metrics_and_room_from_the_suite_unless_told() -> None:
    own = make_bench(EvalConfig())
    assert own.suite[0] == "builtin"
    assert set(own.metrics.values()) == {("exact_match",)}
    told = make_bench(EvalConfig.model_validate({"metrics": ["bleu", "rougeL"], "max_new_tokens": 5}))
    assert set(told.metrics.values()) == {("bleu", "rougeL")}
    assert set(told.max_new_tokens.values()) == {5}


def test_a_mistyped_metric_stops_before_the_base_is_loaded(world: dict[str, Any], tmp_path: Path) -> None:
    evaluation = {"metrics": ["exact_mach"]}
    with pytest.raises(UsageError) as caught:
        run_evaluate(recipe(world, tmp_path, eval=evaluation, base={"id": str(tmp_path / "gone")}))
    assert str(caught.value) == "metrics: no metric is called 'exact_mach'. Did you mean 'exact_match'?"


def test_the_model_is_left_as_it_was(world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def load(*args: Any) -> Any:
        made.append(load_backbone(*args))
        return made[-1]

    monkeypatch.setattr("molecli.text.evaluate.load_backbone", load)
    run_evaluate(recipe(world, tmp_path))
    fresh = load_backbone(BaseConfig(id=world["base"]), "cpu").model.state_dict()
    left = made[0].model.state_dict()
    assert list(left) == list(fresh)
    assert all(torch.equal(left[name], fresh[name]) for name in fresh)
    assert not any(module._forward_hooks for module in made[0].model.modules())


@pytest.mark.parametrize(
    ("field", "value"), [("image", {"steps": 3}), ("judge", {}), ("concepts", {"a": {"prompt": "a cat"}})]
)
def test_what_only_a_diffusion_base_reads_is_refused(
    world: dict[str, Any], tmp_path: Path, field: str, value: Any
) -> None:
    with pytest.raises(UsageError) as caught:
        run_evaluate(recipe(world, tmp_path, **{field: value}))
    what = "it is only for diffusion pipelines, and the base is a language model"
    assert str(caught.value) == f"{field}: {what}. Leave it out."
