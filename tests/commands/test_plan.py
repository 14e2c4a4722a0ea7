"""Plans: what a run would do, without weights, and equal to what it then does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from molecli.commands import plan as planning
from molecli.commands.plan import make_plan, plan_lines
from molecli.config import ComposeRecipe, Recipe, load_recipe
from molecli.errors import MismatchError, RunError, UsageError
from molecli.mixture.attach import attach
from molecli.suites import load_suite
from molecli.training.adapter import adapted, trained_parameters


@pytest.fixture
def parts(
    tmp_path: Path,
    tiny_folder: Callable[..., Path],
    make_tiny: Callable[..., Any],
    make_peft_adapter: Callable[..., Path],
) -> dict[str, Any]:
    """Overrides of a compose recipe: a tiny Llama, two LoRAs that differ in rank and matrices, and data."""
    model = make_tiny("llama").model
    a = make_peft_adapter(model, tmp_path / "a", rank=4)
    b = make_peft_adapter(model, tmp_path / "b", rank=2, alpha=6.0, targets=["q_proj", "v_proj"], seed=1)
    rows = [json.dumps({"input": f"say {i}", "target": str(i)}) + "\n" for i in range(10)]
    (tmp_path / "say.jsonl").write_text("".join(rows))
    return {
        "base.id": str(tiny_folder("llama")),
        "loras": [f"a={a}", f"b={b}"],
        "data.suite": "jsonl",
        "data.files": {"say": str(tmp_path / "say.jsonl")},
        "train.steps": 5,
        "train.batch_size": 4,
        "train.micro_batch_size": 2,
    }


def _compose(parts: dict[str, Any], **more: Any) -> ComposeRecipe:
    recipe = load_recipe(None, "compose", {**parts, **more})
    assert isinstance(recipe, ComposeRecipe)
    return recipe


def test_no_weights_are_read(parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from molecli.bases import loading

    monkeypatch.setattr(loading, "_weights", lambda *_: pytest.fail("weights were read"))
    assert make_plan(_compose(parts)).parameters > 0


def test_the_plan_of_the_loras_is_what_their_files_say(parts: dict[str, Any]) -> None:
    plan = make_plan(_compose(parts))
    assert [(lora.name, lora.rank, lora.alpha, lora.matched) for lora in plan.loras] == [
        ("a", 4, 8.0, 14),
        ("b", 2, 6.0, 4),
    ]
    assert (plan.adaptable_matrices, plan.adapted_matrices) == (14, 14)


@pytest.mark.parametrize("granularity", ["network", "block", "layer", "matrix"])
@pytest.mark.parametrize("preset", [None, "paper"])
def test_sites_and_gate_parameters_are_those_of_the_mixture_that_is_built(
    parts: dict[str, Any], tiny_llama: Any, granularity: str, preset: str | None
) -> None:
    recipe = _compose(parts, **{"gate.granularity": granularity, "preset": preset})
    plan = make_plan(recipe)
    loras = {lora.name: lora.source for lora in recipe.loras}
    mixture = attach(tiny_llama.model, loras=loras, mode="gated", gate=recipe.gate)
    assert plan.sites == len(mixture.sites)
    assert plan.trained_parameters == sum(p.numel() for p in mixture.named_parameters().values())


def test_steps_examples_and_passes(parts: dict[str, Any]) -> None:
    plan = make_plan(_compose(parts))
    assert plan.steps == 5
    assert plan.examples == {"train": 10}
    assert plan.passes == {"train": 10}  # two micro batches a step


def test_a_fixed_mode_trains_nothing(parts: dict[str, Any]) -> None:
    plan = make_plan(_compose(parts, mode="linear"))
    assert (plan.trained_parameters, plan.steps, plan.sites, plan.passes) == (0, None, None, {})


def test_memory_counts_every_weight_of_the_base_and_every_factor_once(parts: dict[str, Any], tiny_llama: Any) -> None:
    memory = make_plan(_compose(parts, device="cpu")).memory
    assert memory["base"] == 4 * sum(p.numel() for p in tiny_llama.model.parameters())
    shapes = {name: m.weight.shape for name, m in tiny_llama.model.named_modules() if isinstance(m, torch.nn.Linear)}
    adapted_by_b = ("q_proj", "v_proj")
    expected = sum(4 * sum(shape) for name, shape in shapes.items() if name != "lm_head")
    expected += sum(2 * sum(shape) for name, shape in shapes.items() if name.endswith(adapted_by_b))
    assert memory["experts"] == 4 * expected
    assert memory["total"] == sum(size for part, size in memory.items() if part != "total")


def test_activations_do_not_grow_with_the_experts(parts: dict[str, Any]) -> None:
    one = make_plan(_compose({**parts, "loras": parts["loras"][:1]})).memory
    two = make_plan(_compose(parts)).memory
    assert one["activations"] == two["activations"]
    assert one["experts"] < two["experts"]


def test_the_plan_of_a_lora_is_the_lora_that_is_trained(parts: dict[str, Any]) -> None:
    from molecli.bases.loading import load_backbone

    keys = ("base.id", "data.suite", "data.files", "train.steps")
    recipe: Any = load_recipe(
        None, "train-lora", {**{k: parts[k] for k in keys}, "adapter.rank": 3, "adapter.targets": "q_proj,down_proj"}
    )
    plan = make_plan(recipe)
    with adapted(load_backbone(recipe.base, "cpu"), recipe.adapter, seed=0) as model:
        trained = sum(parameter.numel() for parameter in trained_parameters(model).values())
    assert (plan.adapted_matrices, plan.trained_parameters) == (4, trained)


def test_a_lora_for_another_base_fails_in_the_plan(parts: dict[str, Any], tiny_folder: Callable[..., Path]) -> None:
    with pytest.raises(MismatchError, match="made for another base"):
        make_plan(_compose({**parts, "base.id": str(tiny_folder("gpt2"))}))


def test_a_data_file_that_is_missing_fails_in_the_plan(parts: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.jsonl"):
        make_plan(_compose({**parts, "data.files": {"none": str(tmp_path / "none.jsonl")}}))


def test_the_text_names_loras_mode_training_data_memory_and_output(parts: dict[str, Any]) -> None:
    lines = plan_lines(make_plan(_compose({**parts, "output": "runs/x"}, device="cpu")))
    heads = ["base", "matrices", "lora", "lora", "mode", "training", "train", "memory", "output"]
    assert [line.split()[0] for line in lines] == heads
    assert "lora      b: rank 2, alpha 6, 4 matrices" in lines
    assert "train     10 examples, 10 passes" in lines
    assert lines[-1] == "output    runs/x"
    assert lines[-2].startswith("memory    about ")


def test_a_document_is_json(parts: dict[str, Any]) -> None:
    document = json.loads(json.dumps(make_plan(_compose(parts)).document()))
    assert document["recipe"]["train"]["steps"] == 5


def test_a_sample_has_no_plan() -> None:
    recipe: Recipe = load_recipe(None, "sample")
    with pytest.raises(UsageError) as caught:
        make_plan(recipe)
    assert str(caught.value) == "mole sample: it has no dry run. Leave out --dry-run."


def test_sizes_read_well() -> None:
    assert [planning._size(n) for n in (12, 3 * 1024, 5 * 1024**2, 2.5 * 1024**3)] == [
        "12 B",
        "3 KiB",
        "5 MiB",
        "2.5 GiB",
    ]


def evaluation(parts: dict[str, Any], **more: Any) -> Recipe:
    return load_recipe(None, "evaluate", {"base.id": parts["base.id"], "loras": parts["loras"], **more})


def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("the hub was asked"))
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("the web was asked"))


@pytest.mark.parametrize(
    ("suite", "tasks", "first"),
    [
        ("bbh", 27, "lukaemon/bbh/boolean_expressions, test"),
        ("nli", 10, "nyu-mll/glue/rte, validation"),
        ("instruction_induction", 22, "https://raw.githubusercontent.com/"),
        ("translation", 6, "wmt/wmt14/fr-en, test"),
        ("struct2text", 4, "GEM/gem/common_gen, validation"),
        ("cbqa", 4, "allenai/ai2_arc/ARC-Challenge, test"),
    ],
)
def test_a_plan_says_what_the_hub_would_be_asked_and_asks_nothing(
    parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch, suite: str, tasks: int, first: str
) -> None:
    no_hub(monkeypatch)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    plan = make_plan(evaluation(parts, **{"eval.data.suite": suite, "eval.data.limit": 2}))
    assert plan.examples == {"evaluate": 2 * tasks}
    lines = plan_lines(plan)
    assert f"online    {tasks} tasks would be fetched; --data-dir reads files instead" in lines
    assert any(line.split(": ", 1)[-1].startswith(first) for line in lines)
    assert any(line.startswith(f"evaluate  at most {2 * tasks} examples, ") for line in lines)
    assert len(json.loads(json.dumps(plan.document()))["sources"]["evaluate"]["online"]) == tasks


def test_a_plan_without_a_limit_counts_nothing_that_it_would_have_to_fetch(
    parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    no_hub(monkeypatch)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    plan = make_plan(evaluation(parts, **{"eval.data.suite": "cbqa", "eval.data.tasks": "arc_easy"}))
    assert (plan.examples, plan.passes) == ({}, {})
    assert "online    1 task would be fetched; HF_HUB_OFFLINE is set: write --data-dir" in plan_lines(plan)


@pytest.mark.parametrize(
    ("suite", "there", "missing", "count"),
    [
        ("bbh", "navigate.jsonl", "snarks.jsonl", 26),
        ("nli", "rte_dev.jsonl", "anli_r1_dev.jsonl", 11),
        ("instruction_induction", "test/sum.jsonl", "test/diff.jsonl", 21),
        ("translation", "test/wmt14_en-fr.jsonl", "test/wmt16_ro-en.jsonl", 5),
        ("struct2text", "test/e2e_nlg.jsonl", "test/dart.jsonl", 3),
        ("cbqa", "test/trivia_qa.jsonl", "test/arc_easy.jsonl", 3),
    ],
)
def test_a_plan_names_every_file_that_is_missing(
    parts: dict[str, Any], tmp_path: Path, suite: str, there: str, missing: str, count: int
) -> None:
    rows = [
        {"input": f"q {i}", "output": "a", "target": "a", "premise": f"p {i}", "hypothesis": "h", "label": "entailment"}
        for i in range(20)
    ]
    path = tmp_path / "data" / there
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"eval.data.suite": suite, "eval.data.data_dir": str(tmp_path / "data"), "eval.data.limit": 2}
    plan = make_plan(evaluation(parts, **settings))
    assert plan.examples == {"evaluate": 2}
    lines = plan_lines(plan)
    task = Path(there).stem.removesuffix("_dev")
    assert f"files     1 of {count + 1} tasks are there: {task}" in lines
    absent = [line for line in lines if line.startswith("missing   ")]
    assert len(absent) == count
    assert f"missing   {Path(missing).stem.removesuffix('_dev')}: no file {tmp_path}/data/{missing}" in absent


def test_a_plan_for_tasks_whose_files_are_missing_fails_as_the_run_would(parts: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for tasks, message in {
        "snarks": f"{tmp_path}/data/snarks.jsonl: no such file, and the task 'snarks' needs it. Check --data-dir.",
        "snarks,navigate": f"{tmp_path}/data: these files of the tasks 'snarks', 'navigate' are "
        "missing: snarks.jsonl, navigate.jsonl. Check --data-dir.",
        None: f"{tmp_path}/data: there is no task of the suite 'bbh'; these files are missing: "
        f"{', '.join(f'{task}.jsonl' for task in load_suite('bbh').known())}. Check --data-dir.",
    }.items():
        settings = {"eval.data.suite": "bbh", "eval.data.data_dir": str(tmp_path / "data"), "eval.data.tasks": tasks}
        with pytest.raises(UsageError) as caught:
            make_plan(evaluation(parts, **settings))
        assert str(caught.value) == message


def test_an_evaluations_passes_are_those_of_every_method_that_would_run(parts: dict[str, Any]) -> None:
    plan = make_plan(evaluation(parts, **{"eval.data.tasks": "french", "eval.batch_size": 16}))
    # The base, two LoRAs alone, linear and nla, on 64 examples.
    assert plan.passes == {"evaluate": 5 * 4}
    masked = evaluation(parts, mask=[["french"], []], **{"eval.data.tasks": "french", "eval.batch_size": 16})
    assert make_plan(masked).passes == {"evaluate": (3 + 2 * 2) * 4}
    alone = make_plan(evaluation(parts, modes="base", **{"eval.data.tasks": "french", "eval.batch_size": 16}))
    assert alone.passes == {"evaluate": 4}


def test_results_are_not_given_up_for_examples_that_cannot_be_fetched(
    parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise ConnectionError("gone")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(RunError, match="could not be loaded from the hub"):
        make_plan(evaluation(parts, **{"eval.data.suite": "bbh"}), fetch=True)
