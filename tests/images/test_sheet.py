"""Contact sheets: every picture in its place, at a size that can be seen, under its labels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from molecli.images import sheet
from molecli.images.sheet import BLANK, GAP, LABEL_WIDTH, PAPER, SheetRow, sheets, wrapped, write_sheets

COLOURS = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0)]


@pytest.fixture
def picture(tmp_path: Path) -> Callable[..., Path]:
    """`picture(colour, size)` -> a file of that one colour."""

    def make(colour: tuple[int, int, int], size: tuple[int, int] = (64, 64)) -> Path:
        file = tmp_path / f"{'-'.join(map(str, (*colour, *size)))}.png"
        Image.new("RGB", size, colour).save(file)
        return file

    return make


def tiles(page: Image.Image, columns: int, rows: int, side: tuple[int, int]) -> list[list[tuple[int, int, int]]]:
    """The colour in the middle of every cell."""
    top = page.height - rows * (side[1] + GAP)
    return [
        [
            page.getpixel(  # type: ignore[misc]
                (LABEL_WIDTH + GAP + c * (side[0] + GAP) + side[0] // 2, top + r * (side[1] + GAP) + side[1] // 2)
            )
            for c in range(columns)
        ]
        for r in range(rows)
    ]


def inked(page: Image.Image, left: int, top: int, right: int, bottom: int) -> bool:
    """Whether anything but paper is there."""
    return bool((np.asarray(page)[top:bottom, left:right] != PAPER).any())


def test_methods_are_columns_and_prompts_rows_and_small_pictures_are_enlarged(picture: Callable[..., Path]) -> None:
    files = [picture(colour) for colour in COLOURS]
    rows = [SheetRow("a teapot", "seed 0", tuple(files[:2])), SheetRow("a cactus", "seed 0", tuple(files[2:]))]
    (page,) = sheets(["base", "gated"], rows)
    assert tiles(page, 2, 2, (192, 192)) == [COLOURS[:2], COLOURS[2:]]
    assert page.width == LABEL_WIDTH + 2 * (192 + GAP) + GAP
    first_row = page.height - 2 * (192 + GAP)
    for left in (LABEL_WIDTH + GAP, LABEL_WIDTH + 2 * GAP + 192):
        assert inked(page, left, 0, left + 192, first_row), "no label over the column"
    for top in (first_row, first_row + 192 + GAP):
        assert inked(page, 0, top, LABEL_WIDTH, top + 60), "no label beside the row"


def test_a_label_is_not_repeated_for_the_next_seed_of_its_prompt(picture: Callable[..., Path]) -> None:
    file = picture(COLOURS[0])

    def ink_beside_second_row(second: str) -> int:
        (page,) = sheets(["base"], [SheetRow("one two three", "", (file,)), SheetRow(second, "", (file,))])
        return int((np.asarray(page)[page.height - 200 :, :LABEL_WIDTH] != PAPER).sum())

    assert ink_beside_second_row("one two three") == 0 < ink_beside_second_row("four")


def test_a_picture_that_was_not_drawn_leaves_a_grey_cell(picture: Callable[..., Path]) -> None:
    (page,) = sheets(["a", "b"], [SheetRow("x", "seed 0", (picture(COLOURS[0]), None))])
    assert tiles(page, 2, 1, (192, 192)) == [[COLOURS[0], BLANK]]


def test_large_pictures_are_reduced_and_keep_their_shape(picture: Callable[..., Path]) -> None:
    (page,) = sheets(["a"], [SheetRow("x", "seed 0", (picture(COLOURS[0], (1024, 512)),))])
    assert page.width == LABEL_WIDTH + 384 + 2 * GAP
    assert tiles(page, 1, 1, (384, 192)) == [[COLOURS[0]]]


def test_pictures_of_two_shapes_share_a_sheet(picture: Callable[..., Path]) -> None:
    row = SheetRow("x", "", (picture(COLOURS[0], (64, 32)), picture(COLOURS[1], (32, 64))))
    (page,) = sheets(["a", "b"], [row])
    top = page.height - 192 - GAP
    assert page.getpixel((LABEL_WIDTH + GAP + 96, top + 40)) == COLOURS[0]
    assert page.getpixel((LABEL_WIDTH + 2 * GAP + 192 + 40, top + 96)) == COLOURS[1]
    assert page.getpixel((LABEL_WIDTH + 2 * GAP + 192 + 150, top + 96)) == PAPER


def test_what_is_too_much_for_one_page_goes_on_the_next_under_the_same_heads(
    picture: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sheet, "MOST_PIXELS", 4 * 200 * 440)
    files = [picture(colour) for colour in COLOURS]
    paths = write_sheets(tmp_path / "out", ["base"], [SheetRow("x", "", (file,)) for file in files])
    assert [path.name for path in paths] == ["sheet.png", "sheet-2.png"]
    found = []
    for path in paths:
        with Image.open(path) as page:
            assert page.width * page.height <= 4 * 200 * 440
            rows = page.height // 200
            found += [row[0] for row in tiles(page.convert("RGB"), 1, rows, (192, 192))]
            assert inked(page.convert("RGB"), LABEL_WIDTH, 0, page.width, page.height - rows * 200)
    assert found == COLOURS


def test_labels_are_wrapped_and_end_in_an_ellipsis_where_room_ends() -> None:
    font = sheet._font()
    text = "one two three " * 20 + "x" * 200
    lines = wrapped(text, font, 100, 1000)
    assert " ".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(font.getlength(line) <= 100 for line in lines)
    short = wrapped(text, font, 100, 3)
    assert len(short) == 3
    assert short[-1].endswith("…")
    assert font.getlength(short[-1]) <= 100
