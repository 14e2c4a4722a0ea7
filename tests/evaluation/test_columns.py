"""Compositions in an evaluation: checked before anything is scored, named after their folders, never mixed up."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from molecli.adapters import LoraSpec
from molecli.bases.loading import load_backbone
from molecli.commands.evaluate import run_evaluate
from molecli.config import BaseConfig, EvaluateRecipe, GateConfig
from molecli.errors import MismatchError, UsageError
from molecli.evaluation.columns import Column, distinct, folder_names
from molecli.files.composition import Composition, record_of, save_composition
from molecli.mixture.attach import read_experts
from molecli.mixture.build import build_mixture

PROMPTS = ["one two", "three", "four five six", "seven"]
ROOM = 6
GATE = GateConfig(granularity="layer", input="hidden")


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory,
    make_tiny: Callable[..., Any],
    tiny_folder: Callable[..., Path],
    make_peft_adapter: Callable[..., Path],
) -> dict[str, Any]:
    """A base, two LoRAs, two gated compositions of them, and what each composition says to the prompts."""
    folder = tmp_path_factory.mktemp("methods")
    base = BaseConfig(id=str(tiny_folder("t5")))
    specs = [
        LoraSpec(name, str(make_peft_adapter(make_tiny("t5").model, folder / name, seed=seed, scale=0.6)))
        for seed, name in enumerate(("up", "down"))
    ]
    backbone = load_backbone(base, "cpu")
    experts = read_experts(backbone.model, specs)
    paths, said = {}, {}
    for seed, name in enumerate(("first", "second")):
        mixture = build_mixture(backbone.model, experts, mode="gated", gate=GATE)
        torch.manual_seed(seed)
        for parameter in mixture.named_parameters().values():
            parameter.data = parameter.data + 2 * torch.randn(parameter.shape)
        composition = Composition(
            "gated", "site", base.id, backbone.fingerprint(), tuple(record_of(e) for e in experts),
            GATE.model_dump(mode="json"), {}, f"base: {{id: {base.id}}}\n", mixture.state_dict(),
        )  # fmt: skip
        save_composition(folder / "runs" / name, composition)
        paths[name] = str(folder / "runs" / name)
        with mixture:
            said[name] = backbone.generate(PROMPTS, max_new_tokens=ROOM)
    examples = folder / "talk.jsonl"
    lines = [json.dumps({"input": p, "target": o.strip()}) for p, o in zip(PROMPTS, said["second"], strict=True)]
    examples.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {"paths": paths, "said": said, "examples": str(examples), "specs": specs, "base": base}


def run(world: dict[str, Any], output: Path, names: tuple[str, ...], **changes: Any) -> Any:
    evaluation = {
        "data": {"suite": "jsonl", "files": [world["examples"]]},
        "max_new_tokens": ROOM,
        "bootstrap": 20,
        "baselines": changes.pop("baselines", False),
    }
    compositions = [world["paths"][name] for name in names]
    fields = {"compositions": compositions, "eval": evaluation, "output": str(output), "device": "cpu", **changes}
    return run_evaluate(EvaluateRecipe.model_validate(fields))


def outputs(output: Path, method: str) -> list[str]:
    rows = [json.loads(line) for line in (output / "samples_talk.jsonl").read_text("utf-8").splitlines()]
    return [row["resps"][0][0] for row in rows if row["method"] == method]


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The bases that an evaluation loads, as it does."""
    loads: list[Any] = []

    def load(*args: Any) -> Any:
        loads.append(args)
        return load_backbone(*args)

    monkeypatch.setattr("molecli.text.evaluate.load_backbone", load)
    return loads


def test_many_compositions_are_scored_on_one_load_each_with_its_own_gates(
    world: dict[str, Any], tmp_path: Path, loads: list[Any]
) -> None:
    report = run(world, tmp_path, ("first", "second"))
    assert len(loads) == 1
    assert list(report["methods"]) == ["first", "second"]
    assert outputs(tmp_path, "first") == world["said"]["first"]
    assert outputs(tmp_path, "second") == world["said"]["second"]
    assert world["said"]["first"] != world["said"]["second"]
    assert report["methods"]["second"]["talk"]["exact_match,none"] == 1.0
    assert [(c["first"], c["second"]) for c in report["comparisons"]] == [("second", "first")]


def test_baselines_come_from_the_loras_that_the_composition_remembers(world: dict[str, Any], tmp_path: Path) -> None:
    report = run(world, tmp_path, ("second",), baselines=True)
    assert list(report["methods"]) == ["base", "up", "down", "linear", "nla", "second"]
    assert report["model_name"] == "second"
    assert len(report["comparisons"]) == 5


def test_a_masked_composition_is_the_lora_that_is_left(world: dict[str, Any], tmp_path: Path) -> None:
    report = run(world, tmp_path, ("first",), modes=["single"], mask=["down"])
    assert list(report["methods"]) == ["up", "down", "first without down"]
    assert outputs(tmp_path, "first without down") == outputs(tmp_path, "up")
    assert outputs(tmp_path, "first without down") != world["said"]["first"]


@pytest.mark.parametrize("mode", ["nla", "ties", "arrow"])
def test_several_masks_are_columns_of_one_run_each_as_in_a_run_of_its_own(
    world: dict[str, Any], tmp_path: Path, loads: list[Any], mode: str
) -> None:
    report = run(world, tmp_path / "all", ("first",), modes=["base", "single", mode], mask=[["down"], ["up"], []])
    names = [f"{name}{label}" for name in (mode, "first") for label in (" without down", " without up", "")]
    assert list(report["methods"]) == ["base", "up", "down", *names]
    assert len(loads) == 1
    for label, mask in ((" without down", ["down"]), (" without up", ["up"]), ("", [])):
        run(world, tmp_path / f"one{label}", ("first",), modes=[mode], mask=mask)
        for name in (mode, "first"):
            assert outputs(tmp_path / "all", name + label) == outputs(tmp_path / f"one{label}", name + label)
    assert len({json.dumps(outputs(tmp_path / "all", f"first{label}")) for label in (" without down", "")}) == 2


def test_every_mask_is_scored_with_every_only(world: dict[str, Any], tmp_path: Path) -> None:
    report = run(world, tmp_path, ("first",), mask=[["up"], []], only=[["down"], []])
    assert list(report["methods"]) == ["first only down without up", "first without up", "first only down", "first"]
    assert outputs(tmp_path, "first only down") == outputs(tmp_path, "first without up")
    assert outputs(tmp_path, "first") == world["said"]["first"]


def test_a_wrong_name_in_any_mask_stops_before_scoring(world: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        run(world, tmp_path, ("first",), mask=[["down"], ["left"]])
    assert str(caught.value) == "left: no such LoRA in this composition. Known: up, down."
    assert list(tmp_path.iterdir()) == []


def test_a_composition_of_another_base_stops_before_anything_is_scored(
    world: dict[str, Any], tmp_path: Path, tiny_folder: Callable[..., Path]
) -> None:
    with pytest.raises(MismatchError) as caught:
        run(world, tmp_path, ("first",), baselines=True, base={"id": str(tiny_folder("t5", seed=5))})
    assert caught.value.exit_code == 3
    assert list(tmp_path.iterdir()) == []


def test_loras_in_another_order_are_refused(world: dict[str, Any], tmp_path: Path) -> None:
    loras = [{"name": spec.name, "source": spec.source} for spec in reversed(world["specs"])]
    with pytest.raises(MismatchError):
        run(world, tmp_path, ("first",), loras=loras)


def test_compositions_are_called_after_their_folders_unless_two_would_share_a_name() -> None:
    paths = ["runs/ab/composition.safetensors", "runs/cd", "old/cd"]
    assert folder_names(paths) == {"ab": paths[0], "runs/cd": "runs/cd", "old/cd": "old/cd"}


def test_a_lora_called_base_does_not_hide_the_base() -> None:
    methods = [Column("base", nullcontext()), Column("base", nullcontext(), single=True)]
    assert list(distinct(methods)) == ["base", "base (2)"]
