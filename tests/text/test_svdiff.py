"""`train-lora --method svdiff` and what is composed of it: only shifts train, and they are experts like any LoRA."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gates import close
from safetensors.torch import load_file
from torch import Tensor, nn

from molecli.adapters import LoraSpec
from molecli.bases.loading import load_backbone
from molecli.bases.weights import BaseWeights
from molecli.commands.compose import run_compose
from molecli.commands.plan import make_plan
from molecli.commands.train_lora import run_train_lora
from molecli.config import AdapterConfig, ComposeRecipe, MethodConfig, TrainLoraRecipe
from molecli.errors import MismatchError, UsageError
from molecli.files.composition import load_composition
from molecli.mixture.attach import attach, read_experts
from molecli.protocols import Example
from molecli.training.adapter import adapted, trained_parameters
from molecli.training.checkpoints import newest_step
from molecli.training.shifted import Shifted

KINDS = ("t5", "llama", "gpt2")
EXAMPLES = [Example("letters", f"say {letter}", letter.upper() * 2) for letter in "abcdefgh"]
Make = Callable[..., TrainLoraRecipe]


@pytest.fixture
def make_recipe(tmp_path: Path, tiny_folder: Callable[..., Path]) -> Make:
    """`make_recipe(kind, output=..., adapter={...}, train={...})`: a few steps on a tiny base."""
    lines = tmp_path / "letters.jsonl"
    lines.write_text("".join(json.dumps({"input": e.prompt, "target": e.target}) + "\n" for e in EXAMPLES))

    def make(kind: str = "llama", *, output: str = "run", **sections: Any) -> TrainLoraRecipe:
        train = {"steps": 4, "batch_size": 4, "lr": 0.05, "warmup_steps": 0, "checkpoint_every": 2}
        tree = {
            "base": {"id": str(tiny_folder(kind)), "dtype": sections.pop("dtype", "float32")},
            "adapter": {"method": "svdiff", **sections.pop("adapter", {})},
            "data": {"suite": "jsonl", "files": {"letters": str(lines)}, **sections.pop("data", {})},
            "train": train | sections.pop("train", {}),
            "output": str(tmp_path / output),
            "device": "cpu",
            **sections,
        }
        return TrainLoraRecipe.model_validate(tree)

    return make


def loss_of(backbone: Any) -> float:
    with torch.no_grad():
        total, count = backbone.token_loss(backbone.collate(EXAMPLES))
    return float(total / count)


def logits(model: Any) -> Tensor:
    ids = torch.randint(6, 200, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids).logits


def file_of(recipe: TrainLoraRecipe) -> bytes:
    return Path(recipe.output, "svdiff.safetensors").read_bytes()


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_loss_and_the_file_is_what_was_trained(kind: str, make_recipe: Make) -> None:
    recipe = make_recipe(kind, train={"steps": 30})
    told: list[str] = []
    report = run_train_lora(recipe, progress=lambda label, done, total: told.append(label))
    backbone: Any = load_backbone(recipe.base, "cpu")
    before, matrices = loss_of(backbone), backbone.matrices()
    with attach(backbone.model, loras={"x": recipe.output}):
        after = loss_of(backbone)
    assert after < 0.8 * before
    assert report["loss"]["last_tenth"] < 0.8 * report["loss"]["first"]
    assert (report["method"], report["matrices"]) == ("svdiff", len(matrices))
    assert report["parameters"] == sum(min(shape) for shape in matrices.values())
    assert json.loads(Path(recipe.output, "report.json").read_text()) == report
    assert {path.name for path in Path(recipe.output).iterdir()} == {
        "svdiff.safetensors", "report.json", "train_log.jsonl",
    }  # fmt: skip
    assert set(told) == {"singular values", "training"}
    assert newest_step(Path(recipe.output)) is None


def test_only_shifts_train_and_the_base_stays_as_it_was(make_recipe: Make) -> None:
    backbone: Any = load_backbone(make_recipe().base, "cpu")
    before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    with adapted(backbone, AdapterConfig(method="svdiff"), seed=0) as adapter:
        assert isinstance(adapter, Shifted)
        parameters = trained_parameters(adapter)
        assert set(parameters) == {f"{matrix}.delta" for matrix in backbone.matrices()}
        assert all(not parameter.any() for parameter in parameters.values())
        optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
        total, _ = backbone.token_loss(backbone.collate(EXAMPLES))
        total.backward()
        optimizer.step()
        assert all(parameter.any() for parameter in parameters.values())
    after = backbone.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())


def test_the_same_recipe_writes_the_same_bytes_resumed_too(make_recipe: Make) -> None:
    whole, again, cut, other = (
        make_recipe(output=name, seed=int(name == "other")) for name in ("w", "a", "c", "other")
    )
    for recipe in (whole, again, other):
        run_train_lora(recipe)

    def interrupt(label: str, done: int, total: int) -> None:
        if (label, done) == ("training", 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_train_lora(cut, progress=interrupt)
    assert newest_step(Path(cut.output)) == 3
    assert not Path(cut.output, "svdiff.safetensors").exists()
    run_train_lora(cut, resume=True)
    assert file_of(whole) == file_of(again) == file_of(cut)
    assert file_of(whole) != file_of(other)


def test_only_the_targets_are_shifted(make_recipe: Make) -> None:
    recipe = make_recipe(adapter={"targets": ["q_proj", "v_proj"]})
    run_train_lora(recipe)
    tensors = load_file(Path(recipe.output, "svdiff.safetensors"))
    assert set(tensors) == {f"svdiff/model.layers.{i}.self_attn.{m}_proj/delta" for i in (0, 1) for m in "qv"}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_held_out_examples_are_scored(make_recipe: Make) -> None:
    row = run_train_lora(make_recipe(data={"holdout": 0.25}, train={"steps": 20}))["held_out"]["letters"]
    assert row["base"] != row["lora"]


def test_a_base_in_half_precision_trains_too(make_recipe: Make) -> None:
    recipe = make_recipe(dtype="bfloat16", train={"steps": 20})
    report = run_train_lora(recipe)
    assert report["loss"]["last_tenth"] < report["loss"]["first"]
    half: Any = load_backbone(recipe.base, "cpu")
    read_experts(half.model, [LoraSpec("x", recipe.output)])
    exact: Any = load_backbone(recipe.base.model_copy(update={"dtype": "float32"}), "cpu")
    with pytest.raises(MismatchError, match=r"and these differ\. Load .* in the precision .*: --dtype bfloat16\."):
        read_experts(exact.model, [LoraSpec("x", recipe.output)])


def test_a_plan_knows_how_many_shifts_train(make_recipe: Make) -> None:
    recipe = make_recipe()
    plan = make_plan(recipe)
    report = run_train_lora(recipe)
    assert (plan.adapted_matrices, plan.trained_parameters) == (report["matrices"], report["parameters"])
    backbone: Any = load_backbone(recipe.base, "cpu")
    vectors = [BaseWeights(backbone.model).spectrum(m) for m in backbone.matrices()]
    assert plan.memory["experts"] == sum(4 * (own.U.numel() + own.Vt.numel()) for own in vectors)


@pytest.mark.parametrize(("key", "value"), [("dropout", 0.1), ("rslora", True)])
def test_what_only_a_lora_has_is_refused(key: str, value: Any) -> None:
    with pytest.raises(UsageError) as caught:
        AdapterConfig.model_validate({"method": "svdiff", key: value})
    what = f"adapter.{key}: it is a setting of LoRAs, and the method is svdiff. Leave it out."
    assert (caught.value.exit_code, str(caught.value)) == (2, what)


# -- composing ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[..., Path], make_peft_adapter: Callable[..., Path]
) -> tuple[str, dict[str, str]]:
    """A base, the SVDiff adapters a and b and the LoRA c on it, in files."""
    from transformers import AutoModelForCausalLM

    base, root = str(tiny_folder("llama")), tmp_path_factory.mktemp("svdiff")
    (root / "x.jsonl").write_text("".join(json.dumps({"input": e.prompt, "target": e.target}) + "\n" for e in EXAMPLES))
    for seed, (name, targets) in enumerate({"a": "all-linear", "b": "q_proj,down_proj"}.items()):
        tree = {
            "base": {"id": base, "dtype": "float32"},
            "adapter": {"method": "svdiff", "targets": targets},
            "data": {"suite": "jsonl", "files": {"x": str(root / "x.jsonl")}},
            "train": {"steps": 6, "batch_size": 4, "lr": 0.1, "warmup_steps": 0},
            "output": str(root / name),
            "seed": seed,
            "device": "cpu",
        }
        run_train_lora(TrainLoraRecipe.model_validate(tree))
    make_peft_adapter(AutoModelForCausalLM.from_pretrained(base), root / "c")
    return base, {name: str(root / name) for name in "abc"}


@pytest.fixture
def model(tiny_llama: Any) -> nn.Module:
    return tiny_llama.model


def by_hand(model: nn.Module, loras: dict[str, str], weights: dict[str, float], scale: float = 1.0) -> Tensor:
    """The logits of a copy whose singular values were shifted by what is in the files and by the LoRA's projection."""
    fresh = copy.deepcopy(model)
    for module in fresh.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    total: dict[str, Tensor] = {}
    for name in set(loras) & {"a", "b"}:
        for key, shift in load_file(Path(loras[name]) / "svdiff.safetensors").items():
            matrix = key.removeprefix("svdiff/").removesuffix("/delta")
            total[matrix] = total.get(matrix, 0.0) + scale * weights.get(name, 1.0) * shift.double()
    if "c" in loras:
        for matrix, factor in read_experts(model, [LoraSpec("c", loras["c"])])[0].factors.items():
            U, _, Vt = torch.linalg.svd(fresh.get_submodule(matrix).weight.double(), full_matrices=False)
            own = torch.diagonal(U.T @ factor.delta().double() @ Vt.T)
            total[matrix] = total.get(matrix, 0.0) + scale * weights.get("c", 1.0) * own
    for matrix, shift in total.items():
        layer: Any = fresh.get_submodule(matrix)
        U, S, Vt = torch.linalg.svd(layer.weight.double(), full_matrices=False)
        layer.weight.data = (U @ torch.diag(torch.relu(S + shift)) @ Vt).float()
    return logits(fresh)


@pytest.mark.parametrize(
    ("names", "weights", "scale"),
    [("a", {}, 1.0), ("ab", {}, 1.0), ("abc", {"a": 0.6, "b": -1.2, "c": 2.0}, 1.0), ("abc", {"a": 3.0}, 2.5)],
)
def test_mode_svdiff_adds_shifts_inside_one_relu(
    names: str, weights: dict[str, float], scale: float, world: Any, model: nn.Module
) -> None:
    base, loras = logits(model), {name: world[1][name] for name in names}
    wanted = by_hand(model, loras, weights, scale)
    with attach(model, loras=loras, mode="svdiff", weights=weights, method=MethodConfig(scale=scale)):
        found = logits(model)
    assert close(found, wanted, 1e-4)
    assert not close(found, base, 1e-2)
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize(
    ("mode", "method"),
    [("linear", {}), ("cat", {}), ("ties", {"density": 1.0}), ("svdiff", {})],
)
def test_one_adapter_composed_is_itself(mode: str, method: dict[str, float], world: Any, model: nn.Module) -> None:
    loras = {"a": world[1]["a"]}
    with attach(model, loras=loras, mode=mode, method=MethodConfig(**method)):
        assert close(logits(model), by_hand(model, loras, {}), 1e-4)


def test_masks_add_the_others_anew(world: Any, model: nn.Module) -> None:
    with attach(model, loras=world[1], mode="svdiff") as mixture:
        mixture.mask("c")
        assert close(logits(model), by_hand(model, {n: world[1][n] for n in "ab"}, {}), 1e-4)
        mixture.only("b")
        assert close(logits(model), by_hand(model, {"b": world[1]["b"]}, {}), 1e-4)


def test_gates_take_shifts_and_loras_together(world: Any, model: nn.Module) -> None:
    with attach(model, loras=world[1], mode="gated") as mixture:
        uniform = logits(model)
        mixture.only("a")
        assert close(logits(model), by_hand(model, {"a": world[1]["a"]}, {}), 1e-4)
    with attach(model, loras=world[1], mode="nla"):
        assert close(uniform, logits(model), 1e-4)


def compose(world: Any, output: Path, names: str = "abc", **more: Any) -> tuple[Any, list[str]]:
    """(report, notes) of a composition by mode svdiff."""
    base, loras = world
    tree = {
        "base": {"id": base, "dtype": "float32"},
        "loras": [f"{n}={loras[n]}" for n in names],
        "mode": "svdiff",
        "evaluate": None,
        "output": str(output),
        "device": "cpu",
        **more,
    }
    notes: list[str] = []
    return run_compose(ComposeRecipe.model_validate(tree), note=notes.append), notes


def test_saved_and_loaded_it_is_the_same_bit_by_bit(world: Any, model: nn.Module, tmp_path: Path) -> None:
    compose(world, tmp_path / "m", method={"scale": 1.5})
    with attach(model, loras=world[1], mode="svdiff", method=MethodConfig(scale=1.5)):
        wanted = logits(model)
    with attach(model, composition=tmp_path / "m"):
        assert torch.equal(logits(model), wanted)
    assert load_composition(tmp_path / "m").mode == "svdiff"


def test_the_report_says_what_is_no_shift(world: Any, tmp_path: Path) -> None:
    report, notes = compose(world, tmp_path / "m")
    lost = report["residuals"]
    assert list(lost) == ["a", "b", "c"]
    assert max(lost["a"], lost["b"]) < 1e-5
    assert 0.9 < lost["c"] < 1
    share = f"{lost['c']:.1%}"
    format, *told = notes
    assert format == "prompts: plain text"
    assert told == [f"c: {share} of its update is no shift of the base's singular values, and is left out"]
    assert json.loads((tmp_path / "m" / "report.json").read_text())["residuals"] == lost
    assert compose(world, tmp_path / "n", "ab")[1] == [format]


def test_a_rank_is_cut_at_its_cost(world: Any, tmp_path: Path) -> None:
    report, _ = compose(world, tmp_path / "m", "a", method={"rank": 4})
    assert 0 < report["truncation"]["mean"] < 1
    tensors = load_composition(tmp_path / "m").tensors
    assert {len(t) for key, t in tensors.items() if key.endswith("/A")} == {4}


def test_a_composition_of_shifts_knows_its_base(world: Any, make_tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="it shifts the singular values of"):
        attach(make_tiny("llama", seed=1).model, loras={"a": world[1]["a"]})
