"""Recipes for diffusion bases: what the shipped ones hold, the sides of pictures, the base that pictures are for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from molecli.catalog.builtin import BUILTIN_IMAGE_BASE
from molecli.config import ComposeRecipe, EvaluateRecipe, TrainLoraRecipe, dump_recipe, load_recipe
from molecli.errors import UsageError
from molecli.files.concepts import trigger_of


def test_the_paper_s_image_setting() -> None:
    recipe = load_recipe("image/mole-paper-sd21")
    assert isinstance(recipe, ComposeRecipe)
    train, image = recipe.train, recipe.image
    assert (train.steps, train.batch_size, train.balance, train.lr) == (400, 2, 0.5, 1e-5)
    assert (image.scheduler, image.steps, image.guidance, image.width, image.height) == ("ddpm", 50, 7.5, 512, 512)
    assert (recipe.gate.input, recipe.objective.denoise, recipe.objective.clip) == ("experts", 0.0, 1.0)
    assert [lora.name for lora in recipe.loras] == list(recipe.concepts)
    assert all(concept.trigger == trigger_of([concept.prompt]) for concept in recipe.concepts.values())


@pytest.mark.parametrize(("style", "steps", "guidance"), [("reality", 100, 7.0), ("anime", 200, 10.0)])
def test_the_multi_lora_setting(style: str, steps: int, guidance: float) -> None:
    recipe = load_recipe(f"image/multi-lora-{style}")
    assert isinstance(recipe, EvaluateRecipe)
    assert (recipe.method.scale, recipe.method.tau) == (0.8, 5)
    assert (recipe.image.scheduler, recipe.image.steps, recipe.image.guidance) == ("dpmsolver++", steps, guidance)
    assert len(recipe.loras) == 11
    assert recipe.modes == ("merge", "switch", "composite")


def test_the_dreambooth_recipe_preserves_the_class_at_512_pixels() -> None:
    recipe = load_recipe("image/dreambooth-sd15")
    assert isinstance(recipe, TrainLoraRecipe)
    assert recipe.pictures is not None
    assert (recipe.pictures.resolution, recipe.pictures.class_pictures) == (512, 200)
    assert recipe.adapter.targets == "attention"


def test_pictures_without_a_base_are_for_the_embedded_pipeline() -> None:
    recipe = load_recipe(None, "train-lora", {"pictures.instance_dir": "dog", "pictures.instance_prompt": "sks dog"})
    assert isinstance(recipe, TrainLoraRecipe)
    assert (recipe.base.id, recipe.adapter.targets) == (BUILTIN_IMAGE_BASE, "all-linear")
    elsewhere = load_recipe(None, "train-lora", {"base.id": "a/b", "pictures.instance_dir": "dog"})
    assert elsewhere.adapter.targets == "attention"  # type: ignore[union-attr]


@pytest.mark.parametrize("base", [BUILTIN_IMAGE_BASE, "a/b"])
@pytest.mark.parametrize("command", ["sample", "compose", "evaluate", "export"])
def test_guidance_is_left_to_the_base_and_kept_where_a_file_says_it(command: str, base: str, tmp_path: Path) -> None:
    flags = {"composition": "x"} if command == "export" else {"loras": ["a=x", "b=x"]}
    recipe: Any = load_recipe(None, command, {"base.id": base, "image.steps": 9, **flags})
    assert recipe.image.guidance is None
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(recipe))
    assert load_recipe(file) == recipe
    assert "guidance: null" in file.read_text()
    file.write_text(file.read_text().replace("guidance: null", "guidance: 4.0"))
    assert load_recipe(file).image.guidance == 4.0  # type: ignore[union-attr]


@pytest.mark.parametrize(("said", "what"), [("-1", "at least 0"), ("inf", "finite")])
def test_a_guidance_scale_that_means_nothing_is_refused(said: str, what: str) -> None:
    with pytest.raises(UsageError, match=f"image.guidance is '{said}'.*{what}"):
        load_recipe(None, "sample", {"base.id": BUILTIN_IMAGE_BASE, "image.guidance": said})


@pytest.mark.parametrize(
    ("command", "key"), [("train-lora", "pictures.resolution"), ("sample", "image.width"), ("compose", "image.height")]
)
def test_a_side_that_no_pipeline_takes_is_refused(command: str, key: str) -> None:
    flags = {"pictures.instance_dir": "dog"} if command == "train-lora" else {"loras": ["a=x"]}
    with pytest.raises(UsageError) as caught:
        load_recipe(None, command, {**flags, key: "500"})
    assert str(caught.value) == f"command line: {key} is '500', which is not a multiple of 8. Write 496 or 504."


def test_the_folder_of_pictures_must_be_named() -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe(None, "train-lora", {"pictures.instance_prompt": "sks dog"})
    assert str(caught.value) == "command line: the key 'pictures.instance_dir' is missing. Write it."
