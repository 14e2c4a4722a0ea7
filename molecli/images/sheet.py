"""Contact sheets: methods as columns, prompts as rows, every column and row labelled.

SheetRow       one row: its label, and a picture for each column (or none, if drawing failed)
sheets         the pages, each small enough for a viewer        wrapped   a text in lines of a limited width
write_sheets   the pages as sheet.png, sheet-2.png, ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from molecli.files.atomic import write_bytes

SHEET_FILE = "sheet.png"
# Limits of a shown picture's longer side: 64 pixels are too few to see, and 1024 too many side by side.
LEAST_SIDE, MOST_SIDE = 192, 384
LABEL_WIDTH, GAP, FONT_SIZE, LINE_HEIGHT = 220, 8, 16, 21
# Pillow treats a file of more than 89 million pixels as an attack; viewers fail even earlier.
MOST_PIXELS = 40_000_000
INK, PAPER, BLANK = (30, 30, 30), (255, 255, 255), (225, 225, 225)
_MISSING = "not drawn"


@dataclass(frozen=True)
class SheetRow:
    """A row's label (the prompt), a note below it (the seed), and the picture files in the order of the columns."""

    label: str
    note: str
    pictures: tuple[Path | None, ...]


def sheets(columns: Sequence[str], rows: Sequence[SheetRow]) -> list[Image.Image]:
    """The pages, each with the columns' names at the top; equal labels of neighbouring rows are written once."""
    side = _shown_size([_size(file) for row in rows for file in row.pictures if file is not None])
    width = LABEL_WIDTH + len(columns) * (side[0] + GAP) + GAP
    per_page = max(1, MOST_PIXELS // (width * (side[1] + GAP)) - 1)
    return [_page(columns, rows[start : start + per_page], side) for start in range(0, len(rows), per_page)]


def write_sheets(
    folder: str | Path, columns: Sequence[str], rows: Sequence[SheetRow], *, name: str = SHEET_FILE
) -> list[Path]:
    """The written files: `name` for the first page, then with -2, -3, ... after its stem. Raises: RunError."""
    paths = []
    for number, page in enumerate(sheets(columns, rows), start=1):
        stem = Path(name).stem + (f"-{number}" if number > 1 else "")
        stream = BytesIO()
        page.save(stream, format="PNG")
        paths.append(write_bytes(Path(folder) / f"{stem}.png", stream.getvalue()))
    return paths


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: int, lines: int) -> list[str]:
    """`text` in at most `lines` lines of at most `width` pixels; a longer text is cut and ends in an ellipsis."""
    found: list[str] = [""]
    for word in text.split():
        for piece in _pieces(word, font, width):
            longer = f"{found[-1]} {piece}".strip()
            if found[-1] and font.getlength(longer) > width:
                found.append(piece)
            else:
                found[-1] = longer
    if len(found) <= lines:
        return found
    last = found[lines - 1]
    while last and font.getlength(last + "…") > width:
        last = last[:-1]
    return [*found[: lines - 1], last.rstrip() + "…"]


def _pieces(word: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """A word in pieces that fit the width: paths and trigger words can be wider than a label."""
    pieces = [""]
    for letter in word:
        if pieces[-1] and font.getlength(pieces[-1] + letter) > width:
            pieces.append("")
        pieces[-1] += letter
    return pieces


def _size(file: Path) -> tuple[int, int]:
    with Image.open(file) as picture:
        return picture.size


def _shown_size(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """(width, height) of every cell: the size of the largest picture, scaled to the limits."""
    width, height = (max((size[axis] for size in sizes), default=LEAST_SIDE) for axis in (0, 1))
    longer = max(width, height)
    scale = min(max(longer, LEAST_SIDE), MOST_SIDE) / longer
    return max(1, round(width * scale)), max(1, round(height * scale))


def _page(columns: Sequence[str], rows: Sequence[SheetRow], side: tuple[int, int]) -> Image.Image:
    heads = [wrapped(name, _font(bold=True), side[0], 3) for name in columns]
    top = GAP + LINE_HEIGHT * max(map(len, heads), default=0) + GAP
    width = LABEL_WIDTH + len(columns) * (side[0] + GAP) + GAP
    page = Image.new("RGB", (width, top + len(rows) * (side[1] + GAP)), PAPER)
    draw = ImageDraw.Draw(page)
    lefts = [LABEL_WIDTH + GAP + i * (side[0] + GAP) for i in range(len(columns))]
    for left, lines in zip(lefts, heads, strict=True):
        _write_lines(draw, (left, top - GAP - LINE_HEIGHT * len(lines)), lines, bold=True)
    for number, row in enumerate(rows):
        y = top + number * (side[1] + GAP)
        repeated = number > 0 and rows[number - 1].label == row.label
        room = max(1, side[1] // LINE_HEIGHT - 1)
        label = [] if repeated else wrapped(row.label, _font(), LABEL_WIDTH - 2 * GAP, room)
        _write_lines(draw, (GAP, y), label)
        _write_lines(draw, (GAP, y + LINE_HEIGHT * len(label)), [row.note], ink=(120, 120, 120))
        for left, file in zip(lefts, row.pictures, strict=True):
            _paste(page, file, (left, y), side)
    return page


def _paste(page: Image.Image, file: Path | None, corner: tuple[int, int], side: tuple[int, int]) -> None:
    if file is None:
        draw = ImageDraw.Draw(page)
        draw.rectangle([corner, (corner[0] + side[0] - 1, corner[1] + side[1] - 1)], fill=BLANK)
        _write_lines(draw, (corner[0] + GAP, corner[1] + GAP), wrapped(_MISSING, _font(), side[0] - 2 * GAP, 2))
        return
    with Image.open(file) as picture:
        shown = picture.convert("RGB")
    scale = min(side[0] / shown.size[0], side[1] / shown.size[1])
    size = (max(1, round(shown.size[0] * scale)), max(1, round(shown.size[1] * scale)))
    page.paste(shown if size == shown.size else shown.resize(size, Image.Resampling.LANCZOS), corner)


def _write_lines(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    lines: Sequence[str],
    *,
    bold: bool = False,
    ink: tuple[int, int, int] = INK,
) -> None:
    for number, line in enumerate(lines):
        draw.text((corner[0], corner[1] + number * LINE_HEIGHT), line, font=_font(bold=bold), fill=ink)


@cache
def _font(*, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans from matplotlib: it has accents and signs that Pillow's own font lacks."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), FONT_SIZE)
