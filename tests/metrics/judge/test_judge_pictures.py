"""A judge sees pixels and nothing else."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import pytest
from PIL import Image
from standin import paint

from molecli.metrics.judge.pictures import UnreadablePicture, data_url


def decoded(url: str) -> tuple[bytes, Image.Image]:
    head, _, data = url.partition(",")
    assert head == "data:image/png;base64"
    file = base64.b64decode(data, validate=True)
    return file, Image.open(io.BytesIO(file))


def test_the_pixels_arrive_and_the_metadata_stays(tmp_path: Path) -> None:
    path = paint(tmp_path / "a.png", 7.5, 8, method="gated", prompt="a dog")
    assert b"gated" in path.read_bytes()
    file, picture = decoded(data_url(path))
    assert (picture.mode, picture.size, picture.getpixel((1, 1))) == ("RGB", (4, 4), (75, 80, 0))
    assert (picture.format, picture.info) == ("PNG", {})
    assert b"gated" not in file


def test_what_is_transparent_is_white(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert decoded(data_url(tmp_path / "a.png"))[1].getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "I;16"])
def test_every_kind_of_picture_goes_out_as_rgb(mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.new(mode, (3, 2)).save(path)
    assert decoded(data_url(path))[1].mode == "RGB"


def test_a_picture_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UnreadablePicture) as caught:
        data_url(tmp_path / "a.png")
    assert str(caught.value) == f"{tmp_path / 'a.png'} does not exist"


@pytest.mark.parametrize("cut", [0, 30, 45])
def test_a_picture_that_is_damaged(cut: int, tmp_path: Path) -> None:
    path = paint(tmp_path / "a.png", 1, 2)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UnreadablePicture) as caught:
        data_url(path)
    assert str(caught.value) == f"{path} is not a readable picture"
