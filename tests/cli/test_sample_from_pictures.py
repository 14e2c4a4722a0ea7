"""`mole sample --init-image`: every mode draws from the given pictures, and says so in the PNG."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

MODES = "base,linear,switch,composite,loratorio"


@pytest.fixture
def line(picture_world: Any, tmp_path: Path) -> tuple[Any, ...]:
    for i, name in enumerate(("one", "two")):
        random = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.fromarray(random).save(tmp_path / "in" / f"{name}.png")
    mask = np.zeros((16, 16), dtype=np.uint8)
    mask[:, 8:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    base = ("--base", picture_world.base, "--loras", picture_world.named())
    return ("sample", picture_world.gated, *base, "--prompt", "a cat by the sea", "--denoise-steps", "4")


def pixels(path: Path) -> np.ndarray:
    return np.array(Image.open(path), dtype=int)


def test_every_mode_draws_from_every_picture(mole: Callable[..., Any], line: Any, tmp_path: Path) -> None:
    start = ("--init-image", tmp_path / "in", "--strength", "0.5", "--scheduler", "Euler a", "--clip-skip", "1")
    for out in ("first", "again"):
        ran = mole(*line, *start, "--modes", MODES, "--output", tmp_path / out)
        assert ran.code == 0, ran.err
    drawn = sorted(path.name for path in (tmp_path / "first").glob("0-*.png"))
    assert len(drawn) == 2 * 6
    for name in drawn:  # the same seed, the same picture
        assert (pixels(tmp_path / "first" / name) == pixels(tmp_path / "again" / name)).all()
    with Image.open(tmp_path / "first" / next(name for name in drawn if "one" in name and "linear" in name)) as image:
        told = dict(image.text)  # type: ignore[attr-defined]
    assert told["init_image"] == str(tmp_path / "in" / "one.png")
    assert (told["strength"], told["clip_skip"], told["scheduler"]) == ("0.5", "1", "euler_a")
    assert "Clip skip: 2, Denoising strength: 0.5" in told["parameters"]
    again = mole("sample", tmp_path / "first" / "recipe.yaml", "--output", tmp_path / "third")
    assert again.code == 0, again.err
    assert (pixels(tmp_path / "third" / drawn[0]) == pixels(tmp_path / "first" / drawn[0])).all()


def test_outside_the_mask_the_picture_stays(mole: Callable[..., Any], line: Any, tmp_path: Path) -> None:
    one = tmp_path / "in" / "one.png"
    masked = ("--init-image", one, "--mask-image", tmp_path / "mask.png", "--strength", "1")
    ran = mole(*line, *masked, "--modes", "linear,composite", "--output", tmp_path / "out")
    assert ran.code == 0, ran.err
    # The parts outside all come from the same latents, whatever the mode; the VAE mixes them only near the border.
    kept = [pixels(tmp_path / "out" / f"0-{mode}-0.png") for mode in ("linear", "composite", "gated")]
    spread = np.ptp(np.stack(kept), axis=0).mean(axis=(0, 2))
    assert spread[:2].mean() < spread[10:].mean() / 2


@pytest.mark.parametrize(
    ("more", "what"),
    [
        (("--mask-image", "mask.png"), "a mask needs a picture to draw in"),
        (("--strength", "0.5"), "it has an effect only with --init-image"),
        (("--init-image", "in", "--strength", "0"), "strength"),
        (("--init-image", "in", "--strength", "1.5"), "strength"),
        (("--init-image", "nowhere.png"), "no such picture or folder of pictures"),
        (("--scheduler", "eulr"), "Did you mean euler? Known: ddim, ddpm"),
        (("--clip-skip", "0"), "clip_skip"),
        (("--clip-skip", "9"), "the text encoder has"),
    ],
)
def test_what_does_not_fit_has_exit_code_2(
    more: tuple[str, ...], what: str, mole: Callable[..., Any], line: Any, tmp_path: Path
) -> None:
    more = tuple(str(tmp_path / text) if (tmp_path / text).exists() else text for text in more)
    ran = mole(*line, *more, "--output", tmp_path / "out")
    assert ran.code == 2
    assert what in ran.err
