"""Pictures in files: every way to store one gives the same RGB, and what cannot be used is refused with a remedy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from molecli.errors import MismatchError, UsageError
from molecli.files.pictures import pictures_in, read_picture


@pytest.fixture
def red_left(tmp_path: Path) -> Image.Image:
    """A picture 32 wide and 24 high whose left half is red and right half blue."""
    image = Image.new("RGB", (32, 24), "blue")
    image.paste("red", (0, 0, 16, 24))
    return image


def test_a_folder_s_pictures_come_by_name_and_nothing_else_does(tmp_path: Path, red_left: Image.Image) -> None:
    for name in ("b.png", "a.JPG", ".hidden.png"):
        red_left.save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("x")
    assert [file.name for file in pictures_in(tmp_path)] == ["a.JPG", "b.png"]


def test_transparency_lies_over_white(tmp_path: Path, red_left: Image.Image) -> None:
    see_through = red_left.convert("RGBA")
    see_through.putalpha(0)
    see_through.save(tmp_path / "rgba.png")
    see_through.quantize(4).save(tmp_path / "palette.png", transparency=0)
    for name in ("rgba.png", "palette.png"):
        image = read_picture(tmp_path / name)
        assert (image.mode, image.getpixel((3, 3))) == ("RGB", (255, 255, 255))


def test_a_picture_is_turned_as_the_camera_says(tmp_path: Path, red_left: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees, clockwise
    red_left.save(tmp_path / "turned.png", exif=exif)
    image = read_picture(tmp_path / "turned.png")
    assert image.size == (24, 32)
    assert image.getpixel((12, 3)) == (255, 0, 0)


def test_sixteen_bits_of_grey_keep_their_shades(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    Image.fromarray(ramp).save(tmp_path / "grey.png")
    shades = np.asarray(read_picture(tmp_path / "grey.png"))[..., 0]
    assert (shades.min(), shades.max(), len(np.unique(shades))) == (0, 255, 256)


def test_no_folder_and_a_folder_without_pictures(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        pictures_in(tmp_path / "none")
    assert str(caught.value) == f"{tmp_path / 'none'}: no such folder of pictures. Check the path."
    with pytest.raises(UsageError) as caught:
        pictures_in(tmp_path)
    message = f"{tmp_path}: it has no pictures. Put some there (png, jpg, jpeg, webp, bmp, gif, tif, tiff)."
    assert str(caught.value) == message


def test_cmyk_is_refused_and_not_guessed(tmp_path: Path, red_left: Image.Image) -> None:
    file = tmp_path / "print.jpg"
    red_left.convert("CMYK").save(file)
    with pytest.raises(UsageError) as caught:
        read_picture(file)
    assert str(caught.value) == (
        f"{file}: its colours are stored in CMYK. Convert it to RGB with its colour profile, in any picture editor."
    )


def test_a_cut_file_is_damaged(tmp_path: Path, red_left: Image.Image) -> None:
    file = tmp_path / "cut.png"
    red_left.save(file)
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(MismatchError, match=rf"{file}: it is damaged \(.+\)\. Replace or remove it\."):
        read_picture(file)
    file.write_text("not a picture")
    with pytest.raises(MismatchError) as caught:
        read_picture(file)
    assert str(caught.value) == f"{file}: it is damaged, or not a picture. Remove it from the folder."


def test_a_tiny_picture_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "dot.png"
    Image.new("RGB", (40, 3)).save(file)
    with pytest.raises(UsageError) as caught:
        read_picture(file)
    assert str(caught.value) == f"{file}: 40x3 pixels are too few: each side must have 16. Give a larger picture."


def test_a_picture_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        read_picture(tmp_path / "none.png")
    assert str(caught.value) == f"{tmp_path / 'none.png'}: no such picture. Check the path."


def test_a_picture_of_too_many_pixels_is_refused(
    tmp_path: Path, red_left: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    red_left.save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(UsageError, match="too large to be read safely"):
        read_picture(tmp_path / "huge.png")
