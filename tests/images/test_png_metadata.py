"""A drawn picture's file: what it says of itself, and how viewers that know A1111's line read it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from molecli import __version__
from molecli.errors import RunError
from molecli.images.png_metadata import PictureFacts, write_png

FACTS = PictureFacts(
    prompt="a teapot, in a field: 'ünïcode ✓'",
    negative_prompt="blurry",
    seed=7,
    method="switch",
    steps=20,
    guidance=7.5,
    scheduler="euler",
    base="builtin:tiny-sd",
    loras={"teapot": 1.0, "field": 0.8},
    settings={"tau": 5},
    dtype="bfloat16",
)
# A1111's own reader of its last line.
PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def written(folder: Path, facts: PictureFacts = FACTS) -> dict[str, str]:
    with Image.open(write_png(folder / "a.png", Image.new("RGB", (16, 24), "red"), facts)) as picture:
        assert picture.convert("RGB").getpixel((3, 3)) == (255, 0, 0)
        return dict(picture.text)  # type: ignore[attr-defined]


def test_every_fact_is_a_text_entry(tmp_path: Path) -> None:
    entries = written(tmp_path)
    assert entries.pop("parameters")
    assert entries == {
        "prompt": FACTS.prompt,
        "negative_prompt": "blurry",
        "seed": "7",
        "method": "switch",
        "method_settings": '{"tau": 5}',
        "loras": "teapot: 1, field: 0.8",
        "steps": "20",
        "guidance": "7.5",
        "scheduler": "euler",
        "base": "builtin:tiny-sd",
        "dtype": "bfloat16",
        "mole_version": __version__,
    }


def test_the_parameters_entry_reads_back_as_a1111_reads_it(tmp_path: Path) -> None:
    *prompt, last = written(tmp_path)["parameters"].split("\n")
    assert prompt == [FACTS.prompt, "Negative prompt: blurry"]
    pairs = {key: json.loads(value) if value.startswith('"') else value for key, value in PAIR.findall(last)}
    assert pairs == {
        "Steps": "20",
        "Sampler": "euler",
        "CFG scale": "7.5",
        "Seed": "7",
        "Size": "16x24",
        "Model": "builtin:tiny-sd",
        "Method": "switch",
        "LoRAs": "teapot: 1, field: 0.8",
        "Version": f"mole {__version__}",
    }


def test_without_loras_and_negative_prompt_the_line_leaves_them_out(tmp_path: Path) -> None:
    bare = PictureFacts("x", 0, "base", 5, 1.0, "ddim", "org/base")
    text = written(tmp_path, bare)["parameters"]
    size = "Size: 16x24, Model: org/base, Method: base"
    assert text == f"x\nSteps: 5, Sampler: ddim, CFG scale: 1, Seed: 0, {size}, Version: mole {__version__}"


def test_a_prompt_that_is_no_utf8_is_written_all_the_same(tmp_path: Path) -> None:
    assert written(tmp_path, PictureFacts("a\udcff b", 0, "base", 5, 1.0, "ddim", "b"))["prompt"] == "a? b"


def test_a_folder_that_cannot_be_written_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot be written"):
        write_png(tmp_path / "file" / "a.png", Image.new("RGB", (8, 8)), FACTS)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
