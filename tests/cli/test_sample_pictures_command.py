"""`mole sample` on a tiny diffusion pipeline: columns, masks, what a PNG says, and a picture that cannot be drawn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from molecli.bases.diffusion import Diffusion

PROMPTS = ("--prompt", "a cat", "--prompt", "a hat by the sea")
MODES = "linear,nla,switch,composite,loratorio"


@pytest.fixture
def line(picture_world: Any) -> tuple[Any, ...]:
    """A command line that draws two prompts from two seeds each."""
    base = ("--base", picture_world.base, "--loras", picture_world.named())
    return (*base, *PROMPTS, "--images", "2", "--denoise-steps", "3")


def pixels(folder: Path, method: str) -> list[np.ndarray]:
    return [np.array(Image.open(path)) for path in sorted(folder.glob(f"*-{method}-*.png"))]


def test_several_modes_and_a_composition_stand_side_by_side(
    mole: Callable[..., Any], line: tuple[Any, ...], picture_world: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    tau = ("--set", "method.tau=2")
    ran = mole("sample", picture_world.gated, *line, *tau, "--modes", MODES, "--output", out, "--json")
    assert ran.code == 0, ran.err
    assert len(list(out.glob("[01]-*.png"))) == 2 * 2 * 6
    assert (out / "sheet.png").is_file()
    methods = {json.loads(row)["method"] for row in (out / "samples.jsonl").read_text().splitlines()}
    assert methods == {*MODES.split(","), "gated"}
    with Image.open(out / "0-switch-0.png") as picture:
        told = dict(picture.text)  # type: ignore[attr-defined]
    assert json.loads(told["method_settings"])["tau"] == 2
    assert (told["prompt"], told["seed"], told["dtype"]) == ("a cat", "0", "float32")
    with Image.open(out / "0-linear-0.png") as picture:
        assert "tau" not in json.loads(picture.text["method_settings"])  # type: ignore[attr-defined]


def test_with_every_lora_masked_each_method_draws_the_base(
    mole: Callable[..., Any], line: tuple[Any, ...], picture_world: Any, tmp_path: Path
) -> None:
    out, some = tmp_path / "all", tmp_path / "some"
    masked = ("--mask", "cat,hat,sea")
    assert mole("sample", picture_world.gated, *line, "--modes", f"base,{MODES}", *masked, "--output", out).code == 0
    base = pixels(out, "base")
    assert len(base) == 4
    for method in (*MODES.split(","), "gated"):
        assert all(np.array_equal(mine, bare) for mine, bare in zip(pixels(out, method), base, strict=True)), method
    assert mole("sample", picture_world.gated, *line, "--modes", "linear", "--only", "cat", "--output", some).code == 0
    for method in ("linear", "gated"):
        assert not any(np.array_equal(mine, bare) for mine, bare in zip(pixels(some, method), base, strict=True))


def test_a_picture_that_cannot_be_drawn_leaves_the_others(
    mole: Callable[..., Any], line: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = Diffusion.generate

    def clumsy(self: Diffusion, prompts: Any, **settings: Any) -> Any:
        if "a cat" in prompts:
            raise RuntimeError("the brush broke")
        return generate(self, prompts, **settings)

    monkeypatch.setattr(Diffusion, "generate", clumsy)
    out = tmp_path / "out"
    ran = mole("sample", *line, "--modes", "linear,switch", "--output", out)
    assert ran.code == 1
    assert "4 of 8 pictures could not be drawn" in ran.err
    assert "the brush broke" in ran.err
    assert "The others are kept." in ran.err
    assert len(list(out.glob("1-*.png"))) == 4
    assert not list(out.glob("0-*.png"))
    assert (out / "sheet.png").is_file()
    assert len((out / "samples.jsonl").read_text().splitlines()) == 4
