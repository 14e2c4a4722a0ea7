"""`train-lora`: the folder it writes is one PEFT loads, and the base is left as it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from molecli.adapters import LoraSpec, read_expert
from molecli.bases.loading import load_backbone
from molecli.bases.weights import BaseWeights
from molecli.commands.plan import make_plan
from molecli.commands.train_lora import run_train_lora
from molecli.config import AdapterConfig, TrainLoraRecipe, dump_recipe
from molecli.errors import RunError, UsageError
from molecli.protocols import Example, Matrices
from molecli.training.adapter import adapted, target_matrices, trained_parameters
from molecli.training.checkpoints import newest_step

KINDS = ("t5", "llama", "gpt2")
EXAMPLES = [Example("letters", f"say {letter}", letter.upper() * 2) for letter in "abcdefgh"]


@pytest.fixture
def lines(tmp_path: Path) -> str:
    path = tmp_path / "letters.jsonl"
    path.write_text("".join(json.dumps({"input": e.prompt, "target": e.target}) + "\n" for e in EXAMPLES))
    return str(path)


@pytest.fixture
def make_recipe(tmp_path: Path, tiny_folder: Callable[..., Path], lines: str) -> Callable[..., TrainLoraRecipe]:
    """`make_recipe(kind, output=..., adapter={...}, train={...}, data={...})`: a few steps on a tiny base."""

    def make(kind: str = "llama", *, output: str = "run", **sections: Any) -> TrainLoraRecipe:
        train = {"steps": 4, "batch_size": 4, "lr": 0.01, "warmup_steps": 0, "checkpoint_every": 2}
        return TrainLoraRecipe(
            base={"id": str(tiny_folder(kind)), "dtype": sections.pop("dtype", "float32")},
            data={"suite": "jsonl", "files": {"letters": lines}, **sections.pop("data", {})},
            train=train | sections.pop("train", {}),
            output=str(tmp_path / output),
            device="cpu",
            **sections,
        )

    return make


def loss_of(backbone: Any) -> float:
    with torch.no_grad():
        total, count = backbone.token_loss(backbone.collate(EXAMPLES))
    return float(total / count)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_the_result_and_it_lowers_the_loss(kind: str, make_recipe: Callable[..., TrainLoraRecipe]) -> None:
    recipe = make_recipe(kind, train={"steps": 30, "lr": 0.02})
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # GPT-2's transposed layers must not make PEFT warn either.
        report = run_train_lora(recipe)
    backbone = load_backbone(recipe.base, "cpu")
    assert backbone.family == ("seq2seq" if kind == "t5" else "causal")
    before, matrices = loss_of(backbone), set(backbone.matrices())
    model = PeftModel.from_pretrained(backbone.model, recipe.output)
    assert set(model.targeted_module_names) == matrices
    assert loss_of(backbone) < 0.8 * before
    assert report["matrices"] == len(matrices)
    assert report["loss"]["last_tenth"] < report["loss"]["first"]
    assert json.loads(Path(recipe.output, "report.json").read_text()) == report
    assert newest_step(Path(recipe.output)) is None


@pytest.mark.parametrize("kind", [*KINDS, "bart"])
def test_all_linear_means_every_matrix_but_the_output_head(kind: str, make_recipe: Any) -> None:
    backbone = load_backbone(make_recipe(kind).base, "cpu")
    with adapted(backbone, AdapterConfig(), seed=0) as model:
        targeted = set(model.targeted_module_names)
    assert targeted == set(backbone.matrices())
    assert not any("lm_head" in name for name in targeted)


def test_the_base_is_bit_identical_after_training(make_recipe: Any) -> None:
    backbone = load_backbone(make_recipe().base, "cpu")
    before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    with adapted(backbone, AdapterConfig(rank=2), seed=0) as model:
        for parameter in trained_parameters(model).values():
            parameter.data.fill_(1.0)
    after = backbone.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not hasattr(backbone.model, "peft_config")


def test_the_lora_trains_in_float32_on_a_bfloat16_base(make_recipe: Any) -> None:
    recipe = make_recipe(dtype="bfloat16")
    run_train_lora(recipe)
    tensors = load_file(Path(recipe.output, "adapter_model.safetensors"))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert any(tensor.abs().max() > 0 for name, tensor in tensors.items() if "lora_B" in name)


def test_the_same_recipe_writes_the_same_bytes_and_another_seed_does_not(make_recipe: Any) -> None:
    folders = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        recipe = make_recipe(output=name, seed=seed, adapter={"dropout": 0.1, "rslora": True})
        run_train_lora(recipe)
        files = ("adapter_model.safetensors", "adapter_config.json")
        folders[name] = [Path(recipe.output, file).read_bytes() for file in files]
    assert folders["a"] == folders["b"]
    assert folders["a"][0] != folders["c"][0]
    assert folders["a"][1] == folders["c"][1]


def test_the_config_says_what_was_trained(make_recipe: Any) -> None:
    recipe = make_recipe(adapter={"rank": 3, "alpha": 6, "rslora": True, "targets": ["q_proj", "v_proj"]})
    run_train_lora(recipe)
    config = json.loads(Path(recipe.output, "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"], config["task_type"]) == (3, 6, True, "CAUSAL_LM")
    assert config["base_model_name_or_path"] == recipe.base.id
    assert all(name.endswith(("q_proj", "v_proj")) for name in config["target_modules"])


def test_dropout_is_active_in_training_and_off_in_the_result(make_recipe: Any) -> None:
    plain = run_train_lora(make_recipe(output="plain"))
    dropped = run_train_lora(make_recipe(output="dropped", adapter={"dropout": 0.5}))
    assert plain["loss"]["last_tenth"] != dropped["loss"]["last_tenth"]


def test_held_out_examples_are_scored_and_not_trained_on(make_recipe: Any) -> None:
    report = run_train_lora(make_recipe(data={"holdout": 0.25}, train={"steps": 20}))
    assert report["examples"] == {"letters": 6}
    row = report["held_out"]["letters"]
    assert row["base"] != row["lora"]


def test_an_interrupted_run_resumes_to_the_same_bytes(make_recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = make_recipe(output="whole"), make_recipe(output="cut")
    run_train_lora(whole)

    def interrupt(label: str, done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_train_lora(cut, progress=interrupt)
    assert newest_step(Path(cut.output)) == 3
    assert not Path(cut.output, "adapter_config.json").exists()
    run_train_lora(cut, resume=True)
    weights = [Path(recipe.output, "adapter_model.safetensors").read_bytes() for recipe in (whole, cut)]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_two_processes_train_the_lora_that_one_trains(make_recipe: Any, tmp_path: Path) -> None:
    one, two = (make_recipe("t5", output=name, train={"lr": 1e-3}) for name in ("one", "two"))
    run_train_lora(one)
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(two))
    # torchrun, because `accelerate launch` starts several CPU processes only through MPI.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [*launch, "-m", "molecli", "train-lora", str(file), "--output", two.output]
    subprocess.run(command, env=env, check=True, timeout=120)
    tensors = [load_file(Path(recipe.output, "adapter_model.safetensors")) for recipe in (one, two)]
    # Adam makes a share of the learning rate of a rounding error where a gradient is nearly zero.
    torch.testing.assert_close(tensors[1], tensors[0], rtol=0, atol=2e-5)
    assert max(tensor.abs().max() for name, tensor in tensors[0].items() if "lora_B" in name) > 1e-3


def test_resuming_a_finished_run_changes_nothing_and_another_recipe_is_refused(make_recipe: Any) -> None:
    recipe = make_recipe()
    report = run_train_lora(recipe)
    stamp = Path(recipe.output, "adapter_model.safetensors").stat().st_mtime_ns
    assert run_train_lora(recipe, resume=True) == report
    assert Path(recipe.output, "adapter_model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(UsageError) as caught:
        run_train_lora(make_recipe(train={"steps": 9}), resume=True)
    assert str(caught.value) == (
        f"--resume {recipe.output}: the run there is finished, and it had another recipe. "
        "Choose another --output, or start again with --overwrite."
    )


def test_an_empty_training_file_is_refused_before_the_base_loads(
    make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    monkeypatch.setattr("molecli.text.train_lora.load_backbone", lambda *a: pytest.fail("loaded"))
    with pytest.raises(UsageError) as caught:
        run_train_lora(make_recipe(data={"files": {"empty": str(empty)}}))
    assert str(caught.value) == f'{empty}: holds no examples. Write one {{"input": ..., "target": ...}} per line.'


def test_a_diverging_run_ends_with_advice_and_no_adapter(make_recipe: Any) -> None:
    recipe = make_recipe(train={"lr": 1e30, "grad_clip": 0, "steps": 6})
    with pytest.raises(RunError, match=r"train step \d: the loss is nan\. Lower train\.lr \(now 1e\+30\)"):
        run_train_lora(recipe)
    assert not Path(recipe.output, "adapter_config.json").exists()


MATRICES = ["layer.0.q_proj", "layer.0.v_proj", "layer.1.q_proj", "layer.1.v_proj"]


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        ("all-linear", MATRICES),
        (("q_proj",), MATRICES[::2]),
        ("q_proj, v_proj", MATRICES),
        ("q_proj", MATRICES[::2]),
        (("layer.1.v_proj",), MATRICES[3:]),
        (r"layer\.0\..*", MATRICES[:2]),
    ],
)
def test_targets_are_names_endings_or_a_regex(targets: Any, found: list[str]) -> None:
    assert target_matrices(targets, MATRICES) == found


@pytest.mark.parametrize("targets", ["q_proj,lm_head", ("q_proj", "lm_head"), r".*q_proj|lm_head"])
def test_the_output_head_is_a_target_where_its_name_is_written(targets: Any) -> None:
    offered = Matrices(dict.fromkeys(MATRICES, (8, 8)), head={"lm_head": (96, 8)})
    assert target_matrices(targets, offered) == [*MATRICES[::2], "lm_head"]
    assert target_matrices("all-linear", offered) == MATRICES
    assert target_matrices(".*", offered) == MATRICES


def test_an_output_head_is_trained_planned_and_composed(make_recipe: Any) -> None:
    recipe = make_recipe(adapter={"targets": "q_proj,lm_head"})
    matrices = run_train_lora(recipe)["matrices"]
    backbone = load_backbone(recipe.base)
    expert = read_expert(LoraSpec("x", recipe.output), backbone.matrices(), base=BaseWeights(backbone.model))
    assert "lm_head" in expert.matrices
    assert matrices == len(expert.matrices) == make_plan(recipe).adapted_matrices
    with pytest.raises(UsageError, match="no matrix is called 'lm_head'"):
        make_plan(make_recipe(adapter={"method": "svdiff", "targets": "q_proj,lm_head"}, output="s"))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("q_prok",), "adapter.targets: no matrix is called 'q_prok'. Did you mean 'q_proj'?"),
        ("lm_head", "adapter.targets: no matrix is called 'lm_head'. Known: q_proj, v_proj."),
        (".*conv", "adapter.targets: the regex '.*conv' matches no matrix. Names end in q_proj, v_proj."),
    ],
)
def test_targets_that_name_no_matrix_are_refused(targets: Any, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        target_matrices(targets, MATRICES)
    assert str(caught.value) == message


def test_a_broken_regex_is_refused() -> None:
    with pytest.raises(UsageError, match=r"adapter\.targets: '\(q' is not a valid regex \("):
        target_matrices("(q", MATRICES)
