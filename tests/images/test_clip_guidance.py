"""The guidance scale is the base's own where nothing is said of it, on every way to a picture; its PNG says which."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from molecli.bases.loading import load_backbone
from molecli.catalog.builtin import BUILTIN_IMAGE_BASE
from molecli.commands.compose import run_compose
from molecli.commands.sample import run_sample
from molecli.config import BaseConfig, load_recipe
from molecli.images.class_pictures import draw_missing

PROMPT = "a cat"
BASES = pytest.mark.parametrize(("base", "scale", "others"), [("embedded", 2.5, 7.5), ("folder", 7.5, 2.5)])


@pytest.fixture
def id_of(pipeline_folder: Callable[..., Path]) -> Callable[[str], str]:
    """The id of the embedded base, or the folder of another."""
    return lambda base: BUILTIN_IMAGE_BASE if base == "embedded" else str(pipeline_folder("sd"))


def sampled(folder: Path, **changes: Any) -> Image.Image:
    """The one picture of a recipe, its facts in `text`."""
    keys = {"prompts": [PROMPT], "image.steps": 3, "device": "cpu", "output": str(folder), **changes}
    (picture,) = run_sample(load_recipe(None, "sample", keys)).pictures  # type: ignore[arg-type]
    return read(Path(picture.path))


def read(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        picture.load()
    return picture


def scales(picture: Any) -> tuple[str, bool]:
    """What the PNG says of guidance, and whether viewers are told the same."""
    said = picture.text["guidance"]
    return said, f"CFG scale: {said}," in picture.text["parameters"]


@BASES
def test_a_base_draws_at_its_own_scale(base: str, scale: float, others: float, id_of: Any, tmp_path: Path) -> None:
    name = id_of(base)
    picture = sampled(tmp_path, **{"base.id": name})
    assert scales(picture) == (f"{scale:g}", True)
    backbone: Any = load_backbone(BaseConfig(id=name), "cpu")

    def drawn(**told: float) -> np.ndarray:
        return np.asarray(backbone.generate([PROMPT], seeds=[0], steps=3, **told)[0])

    assert backbone.guidance == scale
    assert np.array_equal(np.asarray(picture), drawn())
    assert np.array_equal(np.asarray(picture), drawn(guidance=scale))
    assert not np.array_equal(np.asarray(picture), drawn(guidance=others))


@BASES
def test_what_is_said_goes_before(base: str, scale: float, others: float, id_of: Any, tmp_path: Path) -> None:
    told = sampled(tmp_path, **{"base.id": id_of(base), "image.guidance": others})
    assert scales(told) == (f"{others:g}", True)


@BASES
def test_class_pictures_too(base: str, scale: float, others: float, id_of: Any, tmp_path: Path) -> None:
    pictures = {"instance_dir": "x", "class_prompt": PROMPT, "class_pictures": 1, "class_dir": str(tmp_path)}
    recipe: Any = load_recipe(None, "train-lora", {"base.id": id_of(base), "pictures": pictures})
    backbone: Any = load_backbone(recipe.base, "cpu")
    alone: Any = SimpleNamespace(process_index=0, num_processes=1, wait_for_everyone=lambda: None)
    draw_missing(recipe, backbone, alone)
    picture = read(tmp_path / "00000.png")
    assert scales(picture) == (f"{scale:g}", True)
    (again,) = backbone.generate([PROMPT], seeds=[0], steps=25, guidance=scale)
    assert np.array_equal(np.asarray(picture), np.asarray(again))


def test_a_composition_is_drawn_at_its_bases_scale(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    keys = {"base.id": BUILTIN_IMAGE_BASE, "loras": ["octopus", "cactus"], "mode": "linear", "preview": []}
    run_compose(load_recipe(None, "compose", {**keys, "device": "cpu", "output": run}))  # type: ignore[arg-type]
    assert scales(sampled(tmp_path / "drawn", composition=run)) == ("2.5", True)
