"""Recipes: defaults < preset < file < flags < --set, and back to YAML."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from molecli.catalog import builtin as catalog
from molecli.catalog.builtin import BUILTIN_IMAGE_BASE
from molecli.config import (
    PRESETS,
    RECIPES,
    ComposeRecipe,
    EvaluateRecipe,
    LoraConfig,
    LoraTrainConfig,
    SampleRecipe,
    StudyRecipe,
    TrainConfig,
    TrainLoraRecipe,
    dump_recipe,
    find_recipe,
    load_recipe,
)
from molecli.config.sections import Section
from molecli.errors import UsageError

LORAS = {"loras": "x=org/a,y=org/b@0.5"}
STUDIES = Path(__file__).parents[2] / "benchmarks" / "studies"


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def compose(**overrides: Any) -> ComposeRecipe:
    recipe = load_recipe(None, "compose", {**LORAS, **overrides})
    assert isinstance(recipe, ComposeRecipe)
    return recipe


def test_each_layer_lies_over_the_one_before(tmp_path: Path) -> None:
    file = write(tmp_path, "train: {steps: 10, batch_size: 4, lr: 1e-2}\nseed: 7\nloras: {x: org/a}\n")
    flags = {"train.batch_size": 5, "train": {"lr": 2e-2}, "seed": None, "preset": "paper"}
    recipe = load_recipe(file, "compose", flags, ["train.lr=3e-2", "gate.top_k=1"])
    assert isinstance(recipe, ComposeRecipe)
    train = recipe.train
    assert (train.lr, train.batch_size, train.steps, train.balance, train.grad_clip) == (3e-2, 5, 10, 0.5, 1.0)
    assert (recipe.seed, recipe.gate.top_k, recipe.gate.input) == (7, 1, "experts")


def test_the_defaults_of_training() -> None:
    common = {
        "micro_batch_size": None,
        "steps": 300,
        "batch_size": 16,
        "schedule": "cosine",
        "warmup_steps": 20,
        "weight_decay": 0.0,
        "grad_clip": 1.0,
        "checkpoint_every": 100,
        "log_every": 10,
    }
    assert TrainConfig().model_dump() == {**common, "lr": 2e-2, "balance": 0.01}
    assert LoraTrainConfig().model_dump() == {**common, "lr": 1e-3, "balance": 0.0}


def test_the_paper_preset_lies_below_explicit_values() -> None:
    paper = compose(preset="paper")
    gate, train = paper.gate, paper.train
    assert (gate.input, gate.normalize, gate.pool, gate.head) == ("experts", "unit", "auto", "full")
    assert (train.lr, train.steps, train.batch_size, train.balance) == (1e-5, 800, 12, 0.5)
    assert train.schedule == "constant"
    assert compose(preset="paper", gate={"input": "hidden"}).gate.input == "hidden"


def test_the_few_shot_preset_is_the_column_that_was_measured() -> None:
    study = load_recipe(STUDIES / "unseen.yaml")
    assert isinstance(study, StudyRecipe)
    column = study.methods["gated by matrix and token"]
    measured = compose(gate=column.gate, train=column.train)
    preset = compose(preset="few-shot", train={"checkpoint_every": column.train["checkpoint_every"]})
    assert preset.model_dump(exclude={"preset"}) == measured.model_dump(exclude={"preset"})


def test_a_preset_of_language_models_is_refused_on_a_diffusion_base() -> None:
    with pytest.raises(UsageError, match=r"few-shot is not for a diffusion base\. Leave it out, or write paper\."):
        load_recipe(None, "compose", {**LORAS, "base": {"id": BUILTIN_IMAGE_BASE}, "preset": "few-shot"})


@pytest.mark.parametrize("command", PRESETS)
def test_every_preset_is_valid_and_changes_something(command: str) -> None:
    for preset in PRESETS[command]:
        plain = load_recipe(None, command, LORAS)
        assert load_recipe(None, command, {**LORAS, "preset": preset}).model_dump() != plain.model_dump()


def test_the_short_forms_are_spelled_out(tmp_path: Path) -> None:
    text = "base: org/base\nloras: [org/a, y=org/b@0.5, {name: z, source: org/c}]\n"
    text += "data: {suite: jsonl, files: a/t.jsonl}\n"
    recipe = load_recipe(write(tmp_path, text), "compose", {}, ["base.dtype=float32"])
    assert isinstance(recipe, ComposeRecipe)
    assert (recipe.base.id, recipe.base.dtype) == ("org/base", "float32")
    assert recipe.loras == (
        LoraConfig(name="a", source="org/a"),
        LoraConfig(name="y", source="org/b", weight=0.5),
        LoraConfig(name="z", source="org/c"),
    )
    assert recipe.data.files == {"t": "a/t.jsonl"}


def test_one_lora_of_several_is_changed_by_name() -> None:
    recipe = load_recipe(None, "compose", LORAS, ["loras.x.weight=0.25", "loras.y=org/c", "loras.z.source=org/d"])
    assert isinstance(recipe, ComposeRecipe)
    assert recipe.loras == (
        LoraConfig(name="x", source="org/a", weight=0.25),
        LoraConfig(name="y", source="org/c", weight=0.5),
        LoraConfig(name="z", source="org/d"),
    )
    alone = load_recipe(None, "compose", {"base": "org/base"}, ["loras.x.source=org/a"])
    assert isinstance(alone, ComposeRecipe)
    assert alone.loras == (LoraConfig(name="x", source="org/a"),)


def test_names_may_be_written_with_commas() -> None:
    recipe = load_recipe(None, "sample", {**LORAS, "mask": "b, c"}, ["only=[a]"])
    assert isinstance(recipe, SampleRecipe)
    assert (recipe.mask, recipe.only) == (("b", "c"), ("a",))


def test_the_test_split_of_the_data_is_scored() -> None:
    data = {"suite": "nli", "data_dir": "data", "tasks": "rte,cb", "limit": 5, "holdout": 0.1}
    recipe = compose(data=data, evaluate={"metrics": "accuracy", "data": {"limit": 9}})
    assert recipe.evaluate is not None
    scored = recipe.evaluate.data
    assert (scored.suite, scored.data_dir, scored.tasks) == ("nli", "data", ("rte", "cb"))
    assert (scored.split, scored.limit, scored.holdout) == ("test", 9, 0.0)


def test_suites_may_be_joined() -> None:
    recipe = compose(data={"suite": "nli+instruction_induction"})
    assert recipe.evaluate is not None
    assert recipe.evaluate.data.suite == "nli+instruction_induction"
    assert compose(data={"suite": "nli+jsonl", "files": "train.jsonl"}).evaluate is None


def test_ones_own_file_is_not_scored_on_itself() -> None:
    data = {"suite": "jsonl", "files": "train.jsonl"}
    assert compose(data=data).evaluate is None
    scored = compose(data=data, evaluate={"data": {"files": "test.jsonl"}}).evaluate
    assert scored is not None
    assert (scored.data.suite, scored.data.files) == ("jsonl", {"test": "test.jsonl"})


def test_scoring_can_be_left_out() -> None:
    recipe = load_recipe(None, "compose", LORAS, ["evaluate=null"])
    assert isinstance(recipe, ComposeRecipe)
    assert recipe.evaluate is None


def test_the_builtin_loras_come_with_the_builtin_base(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("alphabet", "number"):
        folder = tmp_path / "builtin" / "loras" / name
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text("{}")
    monkeypatch.setattr(catalog, "package_folder", lambda: tmp_path)
    recipe = load_recipe(None, "compose")
    assert isinstance(recipe, ComposeRecipe)
    assert [lora.name for lora in recipe.loras] == ["alphabet", "number"]
    assert [lora.name for lora in ComposeRecipe().loras] == ["alphabet", "number"]


RECIPE_VALUES: dict[str, dict[str, Any]] = {
    "train-lora": {"data": {"suite": "jsonl", "files": {"t": "t.jsonl"}}, "adapter": {"targets": ["q", "v"]}},
    "compose": {**LORAS, "preset": "paper", "train": {"lr": 1e-7}, "data": {"suite": "bbh"}},
    "sample": {"composition": "runs/ab", "prompts": ["héllo: 1", "- x\n# y"], "mask": ["a"]},
    "evaluate": {"compositions": ["runs/ab"], **LORAS, "modes": ["base", "linear"]},
    "inspect-gates": {"composition": "runs/ab", "prompts": ["a cat"], "data": {"tasks": "a,b"}},
    "export": {"composition": "runs/ab", "rank": 8, "calibration": {"examples": "x.jsonl,y.jsonl", "limit": 3}},
    "study": {"methods": {"nla": {}, "ours": {"mode": "gated", "gate": {"top_k": 2}}}, "seeds": [0, 1]},
}


@pytest.mark.parametrize("command", RECIPES)
def test_a_written_recipe_repeats_the_run(command: str, tmp_path: Path) -> None:
    recipe = load_recipe(None, command, RECIPE_VALUES[command])
    again = load_recipe(write(tmp_path, dump_recipe(recipe)))
    assert again == recipe
    assert type(again) is RECIPES[command]
    assert dump_recipe(again) == dump_recipe(recipe)


def test_a_run_is_repeated_from_its_folder(tmp_path: Path) -> None:
    write(tmp_path, dump_recipe(compose()))
    assert load_recipe(tmp_path, "compose") == compose()


def test_a_recipe_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        compose().seed = 3  # type: ignore[misc]


@pytest.mark.parametrize("model", [TrainLoraRecipe, ComposeRecipe, SampleRecipe, EvaluateRecipe])
def test_every_field_has_its_help_beside_it(model: type[Section]) -> None:
    def without_help(section: type[Section]) -> list[str]:
        missing = [name for name, field in section.model_fields.items() if not field.description]
        for field in section.model_fields.values():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                missing += without_help(field.annotation)
        return missing

    assert without_help(model) == ["command"]


@pytest.mark.parametrize("name", catalog.recipes())
def test_every_shipped_recipe_is_valid(name: str) -> None:
    assert find_recipe(name) == catalog.recipes()[name]
    load_recipe(name)


def test_reading_recipes_needs_no_torch() -> None:
    code = "import sys, molecli.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
