"""`mole export` on language models: PEFT makes of the file what the composition was, to rounding."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from composed import export_recipe, save_composed
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from molecli.bases.loading import load_backbone
from molecli.catalog.methods import METHODS
from molecli.commands import export as exporting
from molecli.commands.export import run_export
from molecli.config import BaseConfig
from molecli.errors import RunError, UsageError
from molecli.files.composition import Composition
from molecli.mixture.attach import attach
from molecli.mixture.constant import fixed_mixture
from molecli.protocols import Example

KINDS = ("t5", "bart", "llama", "gpt2")
ROWS = [("a b", "b a"), ("c d", "d c"), ("longer than these", "e"), ("f", "g h i")]
# Of T5, BART, Llama and GPT-2: some of the attention, and some of the feed-forward.
SOME = ["q", "wi_0", "q_proj", "fc1", "down_proj", "c_attn"]


class World:
    """A base of one kind, saved, two LoRAs of mixed ranks on other matrices, and four examples."""

    def __init__(self, kind: str, folder: Path, base: Path, tiny: Any, make: Callable[..., Path]) -> None:
        self.folder, self.base, self.model = folder, base, tiny.model
        present = {name.rpartition(".")[2] for name, _ in self.model.named_modules()}
        few = [name for name in SOME if name in present]
        wide = {few[0]: 7}  # its rank differs from matrix to matrix
        self.loras = {
            "a": make(self.model, folder / "a", seed=1, scale=0.1, rank=3, rank_pattern=wide),
            "b": make(self.model, folder / "b", seed=2, scale=0.1, rank=2, alpha=5, targets=few, use_rslora=True),
        }
        self.data = folder / "words.jsonl"
        self.data.write_text("".join(json.dumps({"input": i, "target": t}) + "\n" for i, t in ROWS))

    def composed(self, mode: str, name: str = "run", **sections: Any) -> Path:
        data = {"data.suite": "jsonl", "data.files": {"words": str(self.data)}}
        return save_composed(self.folder / name, self.base, self.model, self.loras, mode, **data, **sections)

    def backbone(self) -> Any:
        return load_backbone(BaseConfig(id=str(self.base)), "cpu")


@pytest.fixture
def world_of(
    tmp_path: Path, tiny_folder: Callable[..., Path], make_tiny: Any, make_peft_adapter: Callable[..., Path]
) -> Callable[[str], World]:
    return lambda kind: World(kind, tmp_path, tiny_folder(kind), make_tiny(kind), make_peft_adapter)


@pytest.fixture
def world(world_of: Callable[[str], World]) -> World:
    return world_of("t5")


@torch.no_grad()
def logits(backbone: Any, model: nn.Module | None = None) -> Tensor:
    batch = backbone.collate([Example("t", prompt, target) for prompt, target in ROWS])
    return (model or backbone.model)(**batch).logits


def by_peft(world: World, folder: Path) -> nn.Module:
    """The base with the export as PEFT loads it, in a way that uses nothing of the export's own code."""
    return peft.PeftModel.from_pretrained(copy.deepcopy(world.model), str(folder)).eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["linear", "nla"])
def test_a_fixed_composition_is_the_same_in_peft(world_of: Callable[[str], World], kind: str, mode: str) -> None:
    world = world_of(kind)
    run = world.composed(mode, weights={"a": 0.7, "b": -0.4})
    report = run_export(export_recipe(run, world.folder / "out", verify=True))
    backbone = world.backbone()
    with attach(backbone.model, composition=run):
        expected = logits(backbone)
    base = logits(backbone)
    found = logits(backbone, by_peft(world, world.folder / "out"))
    assert (expected - base).abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (report["rank"]["smallest"], report["rank"]["largest"]) == (3, 9)
    assert report["error"]["worst"] == 0
    assert report["verification"]["delta"]["worst"] < 1e-6
    assert report["verification"]["output"] < 1e-5
    assert json.loads((world.folder / "out" / "report.json").read_text()) == dict(report)


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_gates_are_averaged_over_the_examples_and_the_loss_is_told(world_of: Callable[[str], World], kind: str) -> None:
    world = world_of(kind)
    run = world.composed("gated", **{"gate.granularity": "block", "gate.pool": "token"})
    report = run_export(export_recipe(run, world.folder / "out", verify=True, **{"calibration.batch_size": 3}))
    backbone = world.backbone()
    examples = [Example("words", *row) for row in ROWS]
    with attach(backbone.model, composition=run) as mixture, torch.no_grad():
        own, gates = [], []
        for example in examples:  # one by one: padding must count for nothing
            own.append(backbone.example_loss(backbone.collate([example]))[0].item())
            gates.append(mixture.gates())
    expected = {site: torch.cat([one[site] for one in gates]).mean(0) for site in gates[0]}
    assert report["averaged_over"] == 4
    for site, weights in report["weights"].items():
        assert weights == pytest.approx(expected[site].tolist(), abs=1e-5)
    assert max(torch.cat([one[site] for one in gates]).std(0).max() for site in gates[0]) > 0.01
    with fixed_mixture(mixture, expected, renormalize=False):
        fixed = logits(backbone)
    with torch.no_grad():
        bare = [backbone.example_loss(backbone.collate([example]))[0].item() for example in examples]
    adapted = by_peft(world, world.folder / "out")
    torch.testing.assert_close(logits(backbone, adapted), fixed, rtol=1e-4, atol=1e-4)
    backbone.model = adapted
    with torch.no_grad():
        theirs = [backbone.example_loss(backbone.collate([example]))[0].item() for example in examples]
    calibration = report["calibration"]
    assert calibration["inputs"] == 4
    assert calibration["loss"]["gated"] == pytest.approx(sum(own) / 4, rel=1e-4)
    assert calibration["loss"]["export"] == pytest.approx(sum(theirs) / 4, rel=1e-4)
    assert calibration["loss"]["base"] == pytest.approx(sum(bare) / 4, rel=1e-4)
    difference = calibration["loss_difference"]
    assert difference["difference"] == pytest.approx((sum(theirs) - sum(own)) / 4, abs=1e-4)
    assert difference["low"] <= difference["difference"] <= difference["high"]


def test_gates_without_an_input_need_no_examples(world: World) -> None:
    run = world.composed("gated", **{"gate.input": "none", "gate.granularity": "block"})
    world.data.unlink()
    report = run_export(export_recipe(run, world.folder / "out", verify=True))
    assert (report["averaged_over"], report["calibration"]) == (0, None)
    assert report["verification"]["output"] < 1e-5


def test_a_share_of_absent_experts_is_handed_on_in_the_file_too(world: World) -> None:
    run = world.composed("gated", **{"gate.absent": "renormalize"})
    report = run_export(export_recipe(run, world.folder / "out", verify=True))
    assert report["verification"]["delta"]["worst"] < 1e-6
    assert report["verification"]["output"] < 1e-5


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_a_rank_costs_what_the_report_says(world_of: Callable[[str], World], kind: str) -> None:
    world = world_of(kind)
    run = world.composed("linear")
    report = run_export(export_recipe(run, world.folder / "out", rank=2, verify=True))
    whole = run_export(export_recipe(run, world.folder / "whole"))
    assert (report["rank"]["smallest"], report["rank"]["largest"]) == (2, 2)
    a, b = (load_file(world.folder / name / "adapter_model.safetensors") for name in ("out", "whole"))
    for name, entry in report["error"]["by_matrix"].items():
        keys = [f"base_model.model.{name}.lora_{part}.weight" for part in "BA"]
        low, full = (tensors[keys[0]].double() @ tensors[keys[1]].double() for tensors in (a, b))
        assert entry["error"] == pytest.approx(float((low - full).norm() / full.norm()), abs=1e-5)
        assert report["verification"]["delta"]["by_matrix"][name] == pytest.approx(entry["error"], abs=1e-5)
    errors = [entry["error"] for entry in report["error"]["by_matrix"].values()]
    assert report["error"]["mean"] == pytest.approx(sum(errors) / len(errors))
    assert report["error"]["worst"] == max(errors) > 0.1
    assert whole["error"]["worst"] == 0


def test_a_generous_rank_is_exact(world: World) -> None:
    report = run_export(export_recipe(world.composed("linear"), world.folder / "out", rank=64, verify=True))
    assert report["error"]["worst"] == 0
    assert report["verification"]["output"] < 1e-5


@pytest.mark.parametrize("mode", ["ties", "svd"])
def test_a_merged_composition_is_the_same_in_peft(world: World, mode: str) -> None:
    run = world.composed(mode)
    report = run_export(export_recipe(run, world.folder / "out", verify=True))
    backbone = world.backbone()
    with attach(backbone.model, composition=run):
        expected = logits(backbone)
    found = logits(backbone, by_peft(world, world.folder / "out"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert report["weights"] == {}


def test_a_masked_expert_is_not_in_the_file(world: World) -> None:
    run = world.composed("linear")
    run_export(export_recipe(run, world.folder / "out", mask="a", verify=True))
    backbone = world.backbone()
    with attach(backbone.model, loras={"b": str(world.loras["b"])}, mode="linear"):
        expected = logits(backbone)
    torch.testing.assert_close(logits(backbone, by_peft(world, world.folder / "out")), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_file_has_the_type_that_was_asked_for(world: World, dtype: str) -> None:
    report = run_export(export_recipe(world.composed("linear"), world.folder / "out", dtype=dtype, verify=True))
    tensors = load_file(world.folder / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}
    # Each factor is rounded once: 2^-9 or 2^-11 of its entries.
    bound = {"bfloat16": 1e-2, "float16": 2e-3}[dtype]
    assert 1e-5 < report["verification"]["delta"]["worst"] < bound
    assert report["verification"]["file"] < 1e-6
    assert any(line.startswith(f"error     none but the rounding to {dtype}") for line in report.lines)


def test_factors_that_overflow_half_precision_are_refused(world: World) -> None:
    run = world.composed("linear", weights={"a": 1e6})
    with pytest.raises(RunError, match=r"its factors do not fit in float16\. Write --dtype float32\."):
        run_export(export_recipe(run, world.folder / "out", dtype="float16"))
    assert not (world.folder / "out").exists()


def test_the_export_is_a_lora_again(world: World) -> None:
    run = world.composed("nla")
    run_export(export_recipe(run, world.folder / "out"))
    backbone = world.backbone()
    with attach(backbone.model, composition=run):
        expected = logits(backbone)
        texts = backbone.generate(["a b", "hello"], max_new_tokens=8)
    with attach(backbone.model, loras={"name": str(world.folder / "out")}, mode="linear"):
        torch.testing.assert_close(logits(backbone), expected, rtol=1e-4, atol=1e-4)
        assert backbone.generate(["a b", "hello"], max_new_tokens=8) == texts


def test_other_examples_take_the_place_of_the_compositions_own(world: World) -> None:
    run = world.composed("gated")
    world.data.unlink()
    other = world.folder / "other.jsonl"
    other.write_text('{"input": "x", "target": "y"}\n{"input": "z", "target": "zz"}\n')
    report = run_export(export_recipe(run, world.folder / "out", **{"calibration.examples": str(other)}))
    assert list(report["calibration"]["by_task"]) == ["other"]
    assert report["averaged_over"] == 2


def test_own_examples_that_are_gone_are_missed_before_the_base_is_loaded(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = world.composed("gated")
    world.data.unlink()
    monkeypatch.setattr(exporting, "load_backbone", lambda *_: pytest.fail("the base was loaded"))
    with pytest.raises(UsageError, match=r"the composition was learned from it\. Write --calibrate FILE\.jsonl"):
        run_export(export_recipe(run, world.folder / "out"))


def test_a_limit_holds_for_each_task(world: World) -> None:
    run = world.composed("gated")
    report = run_export(export_recipe(run, world.folder / "out", **{"calibration.limit": 2}))
    assert report["averaged_over"] == report["calibration"]["inputs"] == 2


def test_a_fixed_composition_is_measured_where_examples_are_given(world: World) -> None:
    run = world.composed("linear")
    report = run_export(export_recipe(run, world.folder / "out", rank=1, **{"calibration.examples": str(world.data)}))
    assert report["calibration"]["loss"].keys() == {"base", "linear", "export"}
    assert report["averaged_over"] == 0


def test_gates_that_peft_hosts_are_averaged_where_it_tells_them(world_of: Callable[[str], World]) -> None:
    world = world_of("llama")
    report = run_export(export_recipe(world.composed("xlora"), world.folder / "out", verify=True))
    assert report["averaged_over"] == 4
    assert report["calibration"]["loss"].keys() == {"base", "xlora", "export"}
    assert report["verification"]["output"] < 1e-5


@pytest.mark.filterwarnings("ignore:.*are the same LoRA")
def test_a_router_that_tells_no_weights_is_refused(world_of: Callable[[str], World]) -> None:
    world = world_of("llama")
    world.loras = dict.fromkeys("xy", world.loras["a"])  # Arrow wants the same matrices of all
    with pytest.raises(UsageError) as caught:
        run_export(export_recipe(world.composed("arrow"), world.folder / "out"))
    assert str(caught.value) == (
        "mole export: the composition routes its LoRAs inside another library, and has no weights to average. "
        "Compose them with --mode gated or linear, and export that."
    )
    assert not (world.folder / "out").exists()


@pytest.mark.parametrize("mode", [name for name, row in METHODS.items() if row.level == "output"])
def test_modes_over_the_denoising_steps_are_refused(mode: str, tmp_path: Path) -> None:
    composition = Composition(mode, "output", "base", "f", (), None, {}, "", {})
    with pytest.raises(
        UsageError, match=f"mode {mode} composes the UNet's outputs step by step, which a single adapter"
    ):
        exporting.prepare(export_recipe(tmp_path / "run", tmp_path / "out"), composition)


def test_a_file_that_says_another_thing_is_found_out(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    run, write = world.composed("linear"), exporting._write

    def tampered(folder: Path, make: Any) -> list[str]:
        names = write(folder, make)
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        key = next(name for name in tensors if "lora_B" in name)
        save_file({**tensors, key: 1.001 * tensors[key]}, file)
        return names

    monkeypatch.setattr(exporting, "_write", tampered)
    with pytest.raises(RunError, match=r"loads another update of '.+' \(relative difference 1\.0e-03\)\. The files"):
        run_export(export_recipe(run, world.folder / "out", verify=True))
    report = json.loads((world.folder / "out" / "report.json").read_text())
    assert report["verification"]["file"] == pytest.approx(1e-3, rel=1e-2)
    assert report["verification"]["output"] > 1e-6  # the adapter really was in the model that was asked


def test_a_matrix_that_the_library_leaves_out_is_named(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    run, write = world.composed("linear"), exporting._write

    def shortened(folder: Path, make: Any) -> list[str]:
        names = write(folder, make)
        config = json.loads((folder / "adapter_config.json").read_text())
        config["target_modules"] = config["target_modules"][1:]
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return names

    monkeypatch.setattr(exporting, "_write", shortened)
    with pytest.raises(RunError, match=r"leaves out 1 matrices, such as '.+'"):
        run_export(export_recipe(run, world.folder / "out", verify=True))


def test_verifying_leaves_the_base_as_it_was(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = world.backbone()
    before, names = logits(backbone), [name for name, _ in backbone.model.named_modules()]
    monkeypatch.setattr(exporting, "load_backbone", lambda *_: backbone)
    run_export(export_recipe(world.composed("linear"), world.folder / "out", verify=True))
    assert torch.equal(logits(backbone), before)
    assert [name for name, _ in backbone.model.named_modules()] == names


def test_it_is_verified_in_float32_whatever_the_base_was_used_in(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def load(base: Any, device: str) -> Any:
        seen.append(base.dtype)
        return load_backbone(base, device)

    monkeypatch.setattr(exporting, "load_backbone", load)
    recipe = {"base": {"id": str(world.base), "dtype": "bfloat16"}}
    run_export(export_recipe(world.composed("linear"), world.folder / "out", verify=True, **recipe))
    assert seen == ["float32"]
