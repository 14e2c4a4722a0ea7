"""The pictures that `mole sample` begins with: which are read, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from refusals import refused

from molecli.config import SampleRecipe
from molecli.images.given_pictures import FROM_NOISE, given_pictures


def picture(path: Path, size: tuple[int, int] = (24, 16), colour: Any = "white") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def given(**fields: Any) -> Any:
    return given_pictures(SampleRecipe(**{name: str(v) if isinstance(v, Path) else v for name, v in fields.items()}))


def test_without_a_picture_there_is_noise() -> None:
    assert given() == [FROM_NOISE]


def test_one_picture_and_its_mask(tmp_path: Path) -> None:
    file, mask = picture(tmp_path / "a.png", colour="red"), picture(tmp_path / "m.png")
    (one,) = given(init_image=file, mask_image=mask, strength=0.5)
    assert (one.name, one.file, one.mask) == ("", str(file), str(mask))
    assert (one.start.picture.getpixel((0, 0)), one.start.mask.mode, one.start.strength) == ((255, 0, 0), "L", 0.5)


def test_folders_are_matched_by_name(tmp_path: Path) -> None:
    for name in ("b", "a"):
        picture(tmp_path / "in" / f"{name}.png")
        picture(tmp_path / "masks" / f"{name}.bmp")
    found = given(init_image=tmp_path / "in", mask_image=tmp_path / "masks")
    assert [(Path(one.file).stem, Path(one.mask).name) for one in found] == [("a", "a.bmp"), ("b", "b.bmp")]
    assert len({one.name for one in found}) == 2
    (tmp_path / "masks" / "b.bmp").unlink()
    refused(lambda: given(init_image=tmp_path / "in", mask_image=tmp_path / "masks"), 2, "it has no mask for b.png")
    one_for_all = given(init_image=tmp_path / "in", mask_image=tmp_path / "masks" / "a.bmp")
    assert {Path(one.mask).name for one in one_for_all} == {"a.bmp"}


def test_what_is_resized_is_said(tmp_path: Path) -> None:
    notes: list[str] = []
    file, mask = picture(tmp_path / "a.png", (25, 17)), picture(tmp_path / "m.png", (8, 8))
    recipe = SampleRecipe(init_image=str(file), mask_image=str(mask))
    given_pictures(recipe, note=notes.append)
    assert notes == [
        "a.png: the picture is resized from 25 x 17 to 24 x 16 pixels",
        "a.png: the mask is resized from 8 x 8 to 24 x 16 pixels",
    ]


@pytest.mark.parametrize(
    ("fields", "code", "what"),
    [
        ({"mask_image": "m.png"}, 2, "--mask-image: a mask needs a picture to draw in. Write --init-image FILE too."),
        ({"strength": 0.5}, 2, "--strength: it has an effect only with --init-image. Leave it out."),
        ({"init_image": "none.png"}, 2, "none.png: no such picture or folder of pictures"),
        ({"init_image": "empty"}, 2, "it has no pictures"),
        ({"init_image": "a.png", "mask_image": "black.png"}, 2, "it is black everywhere, so nothing would be drawn"),
        ({"init_image": "text.png"}, 3, "it is damaged, or not a picture"),
        ({"init_image": "a.png", "strength": 0.01}, 2, "of 25 steps none would be run"),
    ],
)
def test_what_does_not_fit_is_refused(
    fields: dict[str, Any], code: int, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    picture(Path("a.png"))
    picture(Path("black.png"), colour="black")
    Path("empty").mkdir()
    Path("text.png").write_text("no picture")
    refused(lambda: given(**fields), code, what)
