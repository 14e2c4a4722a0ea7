"""Shifts of a pipeline's singular values: trained on pictures, convolutions included, and composed with LoRAs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from molecli.adapters import LoraSpec, read_expert
from molecli.bases.loading import load_backbone
from molecli.bases.weights import BaseWeights
from molecli.commands.plan import make_plan
from molecli.commands.train_lora import run_train_lora
from molecli.config import TrainLoraRecipe, load_recipe
from molecli.files.concepts import read_concept
from molecli.mixture.attach import attach

PROMPT = "a photo of sks"


@pytest.fixture
def make_recipe(tmp_path: Path, pipeline_folder: Callable[..., Path]) -> Callable[..., TrainLoraRecipe]:
    """`make_recipe(kind, pictures={...}, train={...})`: a few steps on a tiny pipeline."""
    folder = tmp_path / "dog"
    folder.mkdir()
    for i in range(3):
        pixels = np.full((24, 24, 3), 40, np.uint8)
        pixels[4 * i : 4 * i + 12, 6:18] = (220, 180, 20)
        Image.fromarray(pixels).save(folder / f"{i}.png")

    def make(kind: str = "sd", **sections: Any) -> TrainLoraRecipe:
        flags: dict[str, Any] = {
            "base": {"id": str(pipeline_folder(kind)), "dtype": sections.pop("dtype", "float32")},
            "adapter": {"method": "svdiff", **sections.pop("adapter", {})},
            "pictures": {"instance_dir": str(folder), "instance_prompt": PROMPT, **sections.pop("pictures", {})},
            "train": {"steps": 3, "lr": 0.05, "checkpoint_every": 2, **sections.pop("train", {})},
            "output": str(tmp_path / "run"),
            "device": "cpu",
            **sections,
        }
        recipe = load_recipe(None, "train-lora", flags)
        assert isinstance(recipe, TrainLoraRecipe)
        return recipe

    return make


def picture_of(pipe: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 3, "generator": generator, "output_type": "pt", "height": 16, "width": 16}
    return pipe(PROMPT, **options).images


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_training_lowers_the_error_and_the_pictures_are_those_of_changed_weights(kind: str, make_recipe: Any) -> None:
    recipe = make_recipe(kind, train={"steps": 30}, pictures={"text_encoder": True})
    report = run_train_lora(recipe)
    assert report["denoising"]["lora"] < 0.9 * report["denoising"]["base"]
    assert report["method"] == "svdiff"
    assert set(report["components"]) >= {"unet", "text_encoder"}
    assert json.loads(Path(recipe.output, "report.json").read_text()) == report
    backbone: Any = load_backbone(recipe.base, "cpu")
    before, weights = picture_of(backbone.pipe), BaseWeights(backbone.model)
    expert = read_expert(LoraSpec("dog", recipe.output), backbone.matrices(), base=weights)
    assert {len(backbone.matrices()[name]) for name in expert.matrices} == {2, 4}
    with attach(backbone.pipe, loras={"dog": recipe.output}):
        attached = picture_of(backbone.pipe)
    with attach(backbone.pipe, loras={"dog": recipe.output}, mode="svdiff"):
        shifted = picture_of(backbone.pipe)
    with torch.no_grad():
        for name, factor in expert.factors.items():
            weight = backbone.model.get_submodule(name).weight
            weight.add_(factor.delta().view_as(weight))
    wanted = picture_of(backbone.pipe)
    assert (before - wanted).abs().max() > 1e-3
    torch.testing.assert_close(attached, wanted, rtol=0, atol=1e-4)
    torch.testing.assert_close(shifted, wanted, rtol=0, atol=1e-4)


def test_every_matrix_of_the_unet_is_shifted_by_default_at_the_papers_rate(make_recipe: Any) -> None:
    recipe = make_recipe(train={"lr": None, "steps": 2})
    assert (recipe.train.lr, recipe.adapter.targets) == (1e-3, "all-linear,conv")
    plan, report = make_plan(recipe), run_train_lora(recipe)
    backbone: Any = load_backbone(recipe.base, "cpu")
    assert report["matrices"] == sum(name.startswith("unet.") for name in backbone.matrices())
    assert (plan.adapted_matrices, plan.trained_parameters) == (report["matrices"], report["parameters"])
    concept = read_concept(recipe.output)
    assert concept is not None
    assert concept.trigger == "sks"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_and_checkpointed_activations(dtype: str, make_recipe: Any) -> None:
    recipe = make_recipe(dtype=dtype, pictures={"gradient_checkpointing": True}, adapter={"targets": "attention"})
    report = run_train_lora(recipe)
    assert report["steps"] == 3
    backbone: Any = load_backbone(recipe.base, "cpu")
    expert = read_expert(LoraSpec("dog", recipe.output), backbone.matrices(), base=BaseWeights(backbone.model))
    assert all(factor.delta().abs().max() > 0 for factor in expert.factors.values())


def test_checkpointed_activations_train_the_same_shifts(make_recipe: Any) -> None:
    files = []
    for on in (False, True):
        recipe = make_recipe(pictures={"gradient_checkpointing": on}, output=f"{make_recipe().output}-{on}")
        run_train_lora(recipe)
        backbone: Any = load_backbone(recipe.base, "cpu")
        files.append(read_expert(LoraSpec("x", recipe.output), backbone.matrices(), base=BaseWeights(backbone.model)))
    for name, factor in files[0].factors.items():
        torch.testing.assert_close(files[1].factors[name].delta(), factor.delta(), rtol=0, atol=1e-4)
