"""`arrow` and `xlora` as commands use them: composed, trained, saved, loaded, and scored beside the others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pair import Pair, examples, make_pair
from safetensors.torch import load_file
from torch import Tensor

from molecli.bases.loading import load_backbone
from molecli.commands.compose import run_compose
from molecli.commands.evaluate import run_evaluate
from molecli.commands.inspect_gates import run_inspect
from molecli.commands.plan import make_plan
from molecli.commands.sample import run_sample
from molecli.config import ComposeRecipe, EvaluateRecipe, GateConfig, InspectGatesRecipe, SampleRecipe
from molecli.errors import MismatchError, RunError, UsageError
from molecli.files.composition import load_composition, save_composition
from molecli.files.train_log import read_log
from molecli.mixture.attach import attach

MODES = ("arrow", "xlora")
RATES = {"steps": 40, "lr": 0.02, "checkpoint_every": 20}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[..., Path]) -> Pair:
    return make_pair(tiny_folder("llama"), tmp_path_factory.mktemp("peft"))


def recipe_of(pair: Pair, output: Path, mode: str, **changes: Any) -> ComposeRecipe:
    made = pair.recipe(output, mode=mode, **{"train": RATES, **changes})
    return made.model_copy(update={"gate": GateConfig()})


@pytest.fixture(scope="module")
def made(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A composition of each mode."""
    folder = tmp_path_factory.mktemp("made")
    for mode in MODES:
        run_compose(recipe_of(pair, folder / mode, mode, method={"temperature": 0.5}))
    return {mode: folder / mode for mode in MODES}


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


# -- composing ---------------------------------------------------------------------------------------------------------


def test_training_lowers_the_loss_below_any_fixed_mixture(pair: Pair, made: dict[str, Path]) -> None:
    log = read_log(made["xlora"])
    assert len(log) == 40
    # Each LoRA alone answers half of the prompts; only weights that follow the prompt answer all.
    assert sum(record["loss"] for record in log[-5:]) / 5 < 0.3 * log[0]["loss"]
    assert log[-1]["entropy"] < log[0]["entropy"]
    assert log[0]["gate/up"] + log[0]["gate/down"] == pytest.approx(1.0, abs=1e-5)
    backbone = load_backbone(pair.recipe("unused").base, "cpu")
    with attach(backbone.model, composition=made["xlora"]) as mixture:
        assert [text.strip() for text in backbone.generate(["abab", "0101"], max_new_tokens=3)] == ["x", "y"]
        letters, digits = mixture.gates()["network"]
        assert letters[0] > digits[0]


def test_what_is_written(pair: Pair, made: dict[str, Path]) -> None:
    kept = {"composition.safetensors", "recipe.yaml", "report.json"}
    for mode, more in (("arrow", set()), ("xlora", {"train_log.jsonl"})):
        assert {path.name for path in made[mode].iterdir()} == kept | more
        composition = load_composition(made[mode])
        assert (composition.mode, composition.level, composition.gate) == (mode, "site", None)
        assert composition.settings["method"]["temperature"] == 0.5
    assert load_file(made["arrow"] / "composition.safetensors")["weights"].tolist() == [1.0, 1.0]
    shapes = {name: list(t.shape) for name, t in load_composition(made["xlora"]).tensors.items()}
    assert shapes == {"classifier/layers.0.weight": [2, 32], "classifier/layers.0.bias": [2]}
    report = json.loads((made["xlora"] / "report.json").read_text())
    assert (report["trained_parameters"], report["steps"], report["sites"]) == (66, 40, 1)
    report = json.loads((made["arrow"] / "report.json").read_text())
    assert (report["trained_parameters"], report["steps"], report["sites"]) == (0, 0, 14)


@pytest.mark.parametrize("mode", MODES)
def test_loaded_it_is_the_same_to_the_last_bit(pair: Pair, made: dict[str, Path], mode: str, tmp_path: Path) -> None:
    found = []
    for folder in (made[mode], tmp_path / "again"):
        backbone = load_backbone(pair.recipe("unused").base, "cpu")
        batch = backbone.collate(examples())
        base = logits(backbone.model, batch)
        with attach(backbone.model, composition=made[mode]) as mixture:
            found.append(logits(backbone.model, batch))
            mixture.mask("up", "down")
            assert torch.equal(logits(backbone.model, batch), base)
            mixture.only("down")
            alone = logits(backbone.model, batch)
        assert torch.equal(logits(backbone.model, batch), base)
        with attach(backbone.model, loras={"down": pair.loras["down"]}):
            assert torch.allclose(logits(backbone.model, batch), alone, atol=1e-4)
        if folder == made[mode]:
            save_composition(tmp_path / "again", load_composition(folder))
    assert torch.equal(*found)


def test_seeds_are_runs_of_their_own_and_repeat(pair: Pair, tmp_path: Path) -> None:
    folders = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.rand(3)  # what happened before in this process must not show
        run_compose(recipe_of(pair, tmp_path / name, "xlora", seed=seed, train={"steps": 2}))
        folders[name] = load_file(tmp_path / name / "composition.safetensors")
    first, second, other = folders.values()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert not any(torch.equal(tensor, other[name]) for name, tensor in first.items())


@pytest.mark.parametrize("method", [{}, {"xlora_depth": 2, "xlora_size": 6}])
def test_a_cut_run_goes_on_to_the_same_bits(
    pair: Pair, tmp_path: Path, method: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from molecli.training import loop

    recipe = recipe_of(pair, tmp_path / "whole", "xlora", method=method, train={"steps": 6, "checkpoint_every": 3})
    run_compose(recipe)
    cut = recipe.model_copy(update={"output": str(tmp_path / "cut")})
    step = loop._Loop.step

    def until_four(self: Any, number: int) -> None:
        if number == 4:
            raise KeyboardInterrupt
        step(self, number)

    with monkeypatch.context() as patched:
        patched.setattr(loop._Loop, "step", until_four)
        with pytest.raises(KeyboardInterrupt):
            run_compose(cut)
    run_compose(cut, resume=True)
    first, second = (load_file(tmp_path / name / "composition.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_one_lora_leaves_a_classifier_nothing_to_learn(pair: Pair, tmp_path: Path) -> None:
    recipe = recipe_of(pair, tmp_path / "one", "xlora")
    with pytest.raises(RunError, match="no gradient reaches classifier"):
        run_compose(recipe.model_copy(update={"loras": recipe.loras[:1]}))


def test_the_weights_of_arrow_are_kept(pair: Pair, tmp_path: Path) -> None:
    recipe = recipe_of(pair, tmp_path / "run", "arrow", method={"scale": 0.5})
    loras = (recipe.loras[0].model_copy(update={"weight": 3.0}), recipe.loras[1])
    run_compose(recipe.model_copy(update={"loras": loras}))
    assert load_composition(tmp_path / "run").tensors["weights"].tolist() == [1.5, 0.5]
    backbone = load_backbone(recipe.base, "cpu")
    batch = backbone.collate(examples())
    with attach(backbone.model, composition=tmp_path / "run"):
        found = logits(backbone.model, batch)
    scaled = {"up": 1.5, "down": 0.5}
    with attach(backbone.model, loras=pair.loras, mode="arrow", weights=scaled):
        assert torch.equal(logits(backbone.model, batch), found)


# -- beside the others -------------------------------------------------------------------------------------------------


def test_they_stand_in_one_table(pair: Pair, made: dict[str, Path], tmp_path: Path) -> None:
    recipe = {
        "base": {"id": pair.base},
        "loras": pair.loras,
        "compositions": [str(made["xlora"])],
        "modes": ["base", "single", "arrow", "linear"],
        "eval": {"data": {"suite": "jsonl", "files": pair.files}, "max_new_tokens": 3, "bootstrap": 20},
        "output": str(tmp_path),
        "device": "cpu",
    }
    report = run_evaluate(EvaluateRecipe.model_validate(recipe))
    assert [*report.table.columns] == ["base", "own LoRA", "up", "down", "arrow", "linear", "xlora"]
    average = dict(zip(report.table.columns, report.table.rows[-1].scores, strict=True))
    assert average["xlora"] == 100.0
    report = run_evaluate(EvaluateRecipe.model_validate({**recipe, "only": ["up"], "output": str(tmp_path / "up")}))
    average = dict(zip(report.table.columns, report.table.rows[-1].scores, strict=True))
    assert average["arrow only up"] == average["xlora only up"] == average["up"]


def test_the_run_scores_and_draws_what_it_made(pair: Pair, tmp_path: Path) -> None:
    scored = {"data": {"suite": "jsonl", "files": pair.files}, "max_new_tokens": 3, "bootstrap": 20}
    for mode in MODES:
        report = run_compose(recipe_of(pair, tmp_path / mode, mode, evaluate=scored, train={"steps": 2}))
        assert report.evaluation is not None
        assert report.evaluation.table.columns[-1] == mode
        drawn = (tmp_path / mode / "gates.png").exists()
        assert drawn == (mode == "xlora")


def test_samples_come_from_them(pair: Pair, made: dict[str, Path]) -> None:
    recipe = SampleRecipe(composition=str(made["xlora"]), prompts=("abab", "0101"), max_new_tokens=3, device="cpu")
    assert [sample.text.strip() for sample in run_sample(recipe)] == ["x", "y"]


def test_only_what_keeps_its_weights_is_looked_at(pair: Pair, made: dict[str, Path]) -> None:
    looked = {"data": {"suite": "jsonl", "files": pair.files, "split": "train"}, "device": "cpu"}
    recipe = InspectGatesRecipe.model_validate({**looked, "composition": str(made["xlora"])})
    report = run_inspect(recipe)
    assert report.sites == ("network",)
    assert report.by_expert("up")[0] > report.by_expert("down")[0]
    assert [step for step, _ in report.course] == list(range(1, 41))
    with pytest.raises(UsageError) as refused:
        run_inspect(recipe.model_copy(update={"composition": str(made["arrow"])}))
    assert str(refused.value) == (f"{made['arrow']}: a composition of mode arrow has no gates. Name one of mode gated.")


def test_the_plan_counts_both_passes(pair: Pair, tmp_path: Path) -> None:
    plan = make_plan(recipe_of(pair, tmp_path, "xlora", method={"layerwise_scalings": True}))
    assert (plan.sites, plan.trained_parameters, plan.steps) == (14, 33 * 2 * 14, 40)
    assert plan.passes["train"] == 2 * 40
    assert plan.examples["train"] == 8
    plan = make_plan(recipe_of(pair, tmp_path, "arrow"))
    assert (plan.sites, plan.trained_parameters, plan.steps, plan.passes) == (14, 0, None, {})


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_settings_of_gates_are_not_ignored(pair: Pair, tmp_path: Path, mode: str) -> None:
    with pytest.raises(UsageError) as refused:
        run_compose(pair.recipe(tmp_path, mode=mode))
    assert str(refused.value) == (f"gate: mode {mode} has no gates; PEFT routes as `method` says. Leave it out.")


def test_python_says_who_learns_weights(pair: Pair) -> None:
    model = load_backbone(pair.recipe("unused").base, "cpu").model
    with pytest.raises(UsageError, match="the gates learn the weights in mode 'xlora'"):
        attach(model, loras=pair.loras, mode="xlora", weights={"up": 2.0})
    with pytest.raises(UsageError, match="gate= has an effect only in mode 'gated'"):
        attach(model, loras=pair.loras, mode="arrow", gate=GateConfig())


def test_a_classifier_of_another_shape_is_refused(pair: Pair, made: dict[str, Path], tmp_path: Path) -> None:
    composition = load_composition(made["xlora"])
    composition.tensors["classifier/layers.0.bias"] = torch.zeros(3)
    save_composition(tmp_path / "bent", composition)
    model = load_backbone(pair.recipe("unused").base, "cpu").model
    with pytest.raises(MismatchError, match=r"classifier/layers.0.bias: the gate tensor has shape \(3,\)"):
        attach(model, composition=tmp_path / "bent")
