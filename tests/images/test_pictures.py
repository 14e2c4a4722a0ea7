"""Training pictures: their prompts, the rows that training goes through, and what a step sees of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from molecli.config import PicturesConfig
from molecli.errors import MismatchError, UsageError
from molecli.images.pictures import Album, instance_pictures, lessons
from molecli.protocols import Picture

SIDE = 16


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures: a square, a wide one and a tall one."""
    rng = np.random.default_rng(0)
    for name, shape in (("a.png", (16, 16, 3)), ("b.png", (16, 40, 3)), ("c.png", (64, 32, 3))):
        Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(tmp_path / name)
    return tmp_path


def config(folder: Path, prompt: str | None = "sks dog") -> PicturesConfig:
    return PicturesConfig(instance_dir=str(folder), instance_prompt=prompt)


def picture_of(file: Path) -> Picture:
    return Picture("dog", "sks dog", str(file))


def test_each_picture_has_its_own_prompt_or_the_instance_prompt(folder: Path) -> None:
    (folder / "prompts.json").write_text(json.dumps({"b.png": "sks dog in the snow"}))
    found = instance_pictures(config(folder), "dog")
    assert [picture.prompt for picture in found] == ["sks dog", "sks dog in the snow", "sks dog"]
    assert {picture.task for picture in found} == {"dog"}


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        (None, UsageError, "{folder}/a.png: there is no prompt for this picture. Write --instance-prompt"),
        ({"a.png": "x"}, UsageError, "{folder}/b.png: there is no prompt for this picture. Write --instance-prompt"),
        ({"d.png": "x"}, UsageError, "{folder}/prompts.json: there is no picture 'd.png' in its folder. Did you mean"),
        (["a.png"], MismatchError, "{folder}/prompts.json: it does not map pictures to prompts. Write {"),
        ({"a.png": ""}, MismatchError, "{folder}/prompts.json: it does not map pictures to prompts. Write {"),
    ],
)
def test_prompts_that_are_missing_or_wrong(folder: Path, prompts: Any, error: type[Exception], message: str) -> None:
    if prompts is not None:
        (folder / "prompts.json").write_text(json.dumps(prompts))
    with pytest.raises(error) as caught:
        instance_pictures(config(folder, None), "dog")
    assert str(caught.value).startswith(message.replace("{folder}", str(folder)))


def test_a_prompts_file_that_is_no_json(folder: Path) -> None:
    (folder / "prompts.json").write_text("{")
    with pytest.raises(MismatchError, match=r"prompts\.json: not valid JSON\. Write"):
        instance_pictures(config(folder), "dog")


def test_rows_pair_every_picture_of_either_kind(folder: Path) -> None:
    a, b, c = (picture_of(folder / name) for name in ("a.png", "b.png", "c.png"))
    rows = lessons([a, b], [c])
    assert [(row.picture, row.prior) for row in rows] == [(0, 2), (1, 2)]
    assert [(row.picture, row.prior) for row in lessons([a], [b, c])] == [(0, 1), (0, 2)]
    assert [(row.picture, row.prior) for row in lessons([a, b])] == [(0, None), (1, None)]


def test_a_row_s_target_tells_the_pictures_contents_and_not_their_place(folder: Path, tmp_path: Path) -> None:
    first = lessons([picture_of(folder / "a.png")])[0].target
    (tmp_path / "moved.png").write_bytes((folder / "a.png").read_bytes())
    assert lessons([picture_of(tmp_path / "moved.png")])[0].target == first
    assert lessons([picture_of(folder / "b.png")])[0].target != first
    assert lessons([picture_of(folder / "a.png")], [picture_of(folder / "b.png")])[0].target != first


def test_the_middle_square_at_the_resolution(folder: Path) -> None:
    album = Album([picture_of(folder / name) for name in ("a.png", "b.png", "c.png")], SIDE)
    pixels = album.pixels([0, 1, 2, 1])
    assert pixels.shape == (4, 3, SIDE, SIDE)
    wide = np.array(Image.open(folder / "b.png"))[:, 12:28]
    torch.testing.assert_close(pixels[1], torch.from_numpy(wide).permute(2, 0, 1).float() / 127.5 - 1)
    assert torch.equal(pixels[1], pixels[3])
    assert album.fixed


def _drawn(album: Album, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    return album.pixels([0] * 64)


def test_random_crops_follow_the_seed_and_reach_both_ends(folder: Path) -> None:
    album = Album([picture_of(folder / "b.png")], SIDE, crop="random")
    assert not album.fixed
    pixels = _drawn(album, 1)
    assert torch.equal(pixels, _drawn(album, 1))
    assert not torch.equal(pixels, _drawn(album, 2))
    whole = torch.from_numpy(np.array(Image.open(folder / "b.png"))).permute(2, 0, 1).float() / 127.5 - 1
    for left in (0, 40 - SIDE):
        assert any(torch.equal(crop, whole[:, :, left : left + SIDE]) for crop in pixels)


def test_half_of_the_pictures_are_mirrored(folder: Path) -> None:
    album = Album([picture_of(folder / "a.png")], SIDE, flip=True)
    assert not album.fixed
    plain = Album([picture_of(folder / "a.png")], SIDE).pixels([0])[0]
    mirrored = [torch.equal(picture, plain.flip(2)) for picture in _drawn(album, 0)]
    assert 16 < sum(mirrored) < 48
    straight = [torch.equal(picture, plain) for picture in _drawn(album, 0)]
    assert sum(mirrored) + sum(straight) == 64


def test_a_square_needs_no_random_crop(folder: Path) -> None:
    assert Album([picture_of(folder / "a.png")], SIDE, crop="random").fixed


def test_a_picture_much_smaller_than_the_resolution_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError) as caught:
        Album([picture_of(folder / "b.png")], 128)
    assert str(caught.value) == (
        f"{folder / 'b.png'}: 40x16 pixels are too few to train at 128. "
        "Give a picture with at least 32 pixels on each side, or lower --resolution."
    )


def test_a_folder_without_pictures(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="it has no pictures"):
        instance_pictures(config(tmp_path), "dog")
