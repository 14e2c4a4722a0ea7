"""LoRAHub's search: it finds weights that lower the loss, the same again, and goes on after a kill."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pair import Pair, make_pair
from torch import Tensor

from molecli.bases.loading import load_backbone
from molecli.commands.compose import run_compose
from molecli.commands.plan import make_plan
from molecli.errors import RunError, UsageError
from molecli.files.composition import load_composition
from molecli.files.train_log import read_log
from molecli.mixture.attach import attach


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[..., Path]) -> Pair:
    return make_pair(tiny_folder("llama"), tmp_path_factory.mktemp("search"))


def lorahub(pair: Pair, output: Path, **method: Any) -> Any:
    return pair.recipe(output, mode="lorahub", method={"evaluations": 25, "examples": 6, **method})


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(6, 14)[None]).logits


@pytest.mark.parametrize("on", ["factors", "updates"])
def test_it_lowers_the_loss_within_its_bounds(pair: Pair, tmp_path: Path, on: str) -> None:
    # Of the examples that only `up` knows.
    recipe = lorahub(pair, tmp_path / "hub", on=on)
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"tasks": ("up",)})})
    report = run_compose(recipe)
    log = read_log(tmp_path / "hub")
    assert report["steps"] == len(log) == 25
    assert log[0]["weight/up"] == log[0]["weight/down"] == 0.0  # it begins at the base
    weights = dict(zip(("up", "down"), load_composition(tmp_path / "hub").tensors["weights"].tolist(), strict=True))
    assert abs(weights["up"]) > abs(weights["down"])
    assert all(abs(record[f"weight/{name}"]) <= 1.5 for record in log for name in weights)
    assert min(record["loss"] for record in log) < 0.7 * log[0]["loss"]
    record = log[3]
    assert record["objective"] == pytest.approx(
        record["loss"] + 0.05 * (abs(record["weight/up"]) + abs(record["weight/down"])) / 2
    )


def test_loaded_it_is_what_was_found(pair: Pair, tmp_path: Path) -> None:
    run_compose(lorahub(pair, tmp_path / "hub", evaluations=8))
    backbone = load_backbone(pair.recipe(tmp_path).base, "cpu")
    found = load_composition(tmp_path / "hub").tensors["weights"].tolist()
    with attach(backbone.model, composition=tmp_path / "hub") as mixture:
        once = logits(backbone.model)
        assert mixture.weights == pytest.approx(found)  # type: ignore[attr-defined]
        mixture.mask("down")
        alone = logits(backbone.model)
    with attach(backbone.model, loras={"up": pair.loras["up"]}, mode="linear", weights={"up": found[0] ** 2}):
        assert torch.allclose(logits(backbone.model), alone, atol=1e-4)
    with attach(backbone.model, composition=tmp_path / "hub"):
        assert torch.equal(logits(backbone.model), once)


def test_a_killed_search_goes_on_to_the_same_weights(pair: Pair, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_compose(lorahub(pair, whole, evaluations=9))
    cut.mkdir()
    lines = (whole / "train_log.jsonl").read_text().splitlines()
    (cut / "train_log.jsonl").write_text("\n".join(lines[:5]) + "\n" + lines[5][:20])
    run_compose(lorahub(pair, cut, evaluations=9), resume=True)
    assert (cut / "train_log.jsonl").read_text() == (whole / "train_log.jsonl").read_text()
    first, second = (load_composition(folder).tensors for folder in (whole, cut))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_another_search_is_not_gone_on_with(pair: Pair, tmp_path: Path) -> None:
    run_compose(lorahub(pair, tmp_path / "hub", evaluations=6))
    (tmp_path / "hub" / "report.json").unlink()
    with pytest.raises(UsageError, match="the log there is of another search"):
        run_compose(lorahub(pair, tmp_path / "hub", evaluations=6, bound=0.3), resume=True)


def test_without_nevergrad_it_says_what_to_install(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nevergrad", None)
    with pytest.raises(RunError, match="pip install nevergrad"):
        run_compose(lorahub(pair, tmp_path / "hub"))


def test_the_plan_counts_its_passes(pair: Pair, tmp_path: Path) -> None:
    plan = make_plan(lorahub(pair, tmp_path / "hub"))
    assert plan.steps == 25
    assert plan.examples["train"] == 6
    assert plan.passes["train"] == 25 * 2
    assert json.dumps(plan.passes)


@pytest.mark.parametrize("mode", ["soup", "gated"])
def test_soup_is_gates_that_read_nothing(pair: Pair, tmp_path: Path, mode: str) -> None:
    report = run_compose(pair.recipe(tmp_path / mode, mode=mode))
    tensors = load_composition(tmp_path / mode).tensors
    assert any(key.endswith("/logits") for key in tensors) == (mode == "soup")
    assert report["trained_parameters"] > 0
