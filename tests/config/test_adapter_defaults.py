"""Defaults that hang on the adapter's method: they lie below what the recipe says, and a LoRA's stay as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from molecli.catalog.builtin import BUILTIN_IMAGE_BASE
from molecli.config import load_recipe

PICTURES = {"pictures.instance_dir": "dog", "pictures.instance_prompt": "sks dog"}


@pytest.mark.parametrize(
    ("flags", "lr", "targets"),
    [
        ({}, 5e-2, "all-linear"),
        ({"base.id": "org/model"}, 1e-3, "all-linear"),
        (PICTURES, 5e-2, "all-linear,conv"),
        ({**PICTURES, "base.id": BUILTIN_IMAGE_BASE}, 5e-2, "all-linear,conv"),
        ({**PICTURES, "base.id": "org/pipeline"}, 1e-3, "all-linear,conv"),
        ({"train.lr": 0.3, "adapter.targets": "q_proj"}, 0.3, "q_proj"),
    ],
)
def test_shifts_have_their_own_rate_and_targets(flags: dict[str, Any], lr: float, targets: str) -> None:
    recipe: Any = load_recipe(None, "train-lora", {"adapter.method": "svdiff", **flags})
    assert (recipe.train.lr, recipe.adapter.targets) == (lr, targets)


def test_a_lora_has_what_it_had() -> None:
    for flags in ({}, {"adapter.method": "lora"}):
        recipe: Any = load_recipe(None, "train-lora", flags)
        assert (recipe.adapter.method, recipe.train.lr, recipe.adapter.targets) == ("lora", 1e-3, "all-linear")


def test_a_file_may_say_the_method(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("command: train-lora\nbase: org/model\nadapter: {method: svdiff}\ntrain: {steps: 7}\n")
    recipe: Any = load_recipe(file)
    assert (recipe.adapter.method, recipe.train.lr, recipe.train.steps) == ("svdiff", 1e-3, 7)
