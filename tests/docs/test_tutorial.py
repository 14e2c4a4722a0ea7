"""docs/tutorial.md: every command in it runs, prints what the page shows, and leaves what the page says."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image
from safetensors import safe_open

from molecli.cli.app import COMMANDS, app
from molecli.files.composition import load_composition

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "tutorial.md"
ONCE = Path(__file__).with_name("mole_once.py")
# What the page runs; what it only shows, since it needs a model from the hub or files of one's own; what is printed.
RUN, SHOWN, PRINTED = "bash", "console", "text"
END = "end of block"


@dataclass(frozen=True)
class Block:
    """A code block of the page, the section that it stands in, and the number of its first line."""

    part: str
    language: str
    text: str
    line: int


def blocks(part: str | None = None) -> list[Block]:
    """The page's code blocks in order, of one section or of all."""
    found, inside, section, start = [], [], "", 0
    language = None
    for number, line in enumerate(PAGE.read_text("utf-8").splitlines(), start=1):
        if language is None and line.startswith("```"):
            language, inside, start = line[3:], [], number + 1
        elif language is not None and line == "```":
            found.append(Block(section, language, "\n".join(inside), start))
            language = None
        elif language is not None:
            inside.append(line)
        elif line.startswith("## "):
            section = line[3:]
    return [block for block in found if part in (None, block.part)]


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Path]:
    """A folder with the programs `mole` and `python`; mole_once.py says how `mole` runs."""
    folder = tmp_path / "bin"
    folder.mkdir()
    with tempfile.TemporaryDirectory() as short:  # the path of a socket may not be long
        address = f"{short}/mole"
        write_program(folder / "python", [sys.executable])
        write_program(folder / "mole", [sys.executable, "-I", "-S", str(ONCE), address, "run"])
        command = [sys.executable, str(ONCE), address, "serve"]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(folder)
        ) as server:
            assert server.stdout is not None
            assert server.stdout.readline() == "ready\n"
            yield folder
    assert server.returncode == 0


def write_program(path: Path, command: Sequence[str]) -> None:
    path.write_text(f'#!/usr/bin/env bash\nexec {shlex.join(command)} "$@"\n')
    path.chmod(0o755)


def environment(programs: Path) -> dict[str, str]:
    """Offline, on the CPU, one thread, with these programs found first."""
    return {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
    }


def run_part(part: str, folder: Path, programs: Path) -> None:
    """Run the section's commands in `folder`, in one bash; what they print must be what the page shows below them."""
    folder.mkdir()
    chosen = blocks(part)
    commands = [block.text for block in chosen if block.language == RUN]
    script = "set -euo pipefail\n" + "".join(f"{command}\necho '{END}'\n" for command in commands)
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, env=environment(programs), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    printed = iter(done.stdout.split(f"{END}\n"))
    last = ""
    for block in chosen:
        if block.language == RUN:
            last = next(printed)
        elif block.language == PRINTED:
            check_printed(block, last)


def check_printed(block: Block, printed: str) -> None:
    """Every line of the block is among those printed, in this order, but for its numbers; "…" leaves lines out."""
    lines = iter([wording(line) for line in printed.splitlines()])
    for number, line in enumerate(block.text.splitlines(), start=block.line):
        # `in` moves the iterator on to the line that it finds.
        assert line == "…" or wording(line) in lines, f"{PAGE.name}:{number} is not in what is printed:\n{printed}"


def wording(line: str) -> str:
    """The line without numbers, bold type and what is in brackets, all of which may differ between machines."""
    line = re.sub(r"\([^)]*\)|\*\*", "", line)
    return " ".join(re.sub(r"[-+]?\d[\d,.]*(e-?\d+)?", "#", line).split())


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def keys(path: Path) -> list[str]:
    with safe_open(path, "pt") as file:
        return list(file.keys())


def test_the_text_part_runs_and_makes_what_it_says(tmp_path: Path, programs: Path) -> None:
    folder = tmp_path / "text"
    run_part("Text", folder, programs)

    composition = load_composition(folder / "runs" / "both")
    assert composition.mode == "gated"
    assert [expert.name for expert in composition.experts] == ["king", "queen"]
    assert load_composition(folder / "runs" / "ties").mode == "ties"

    average = json.loads((folder / "scores" / "both" / "results.json").read_text("utf-8"))["average"]
    assert list(average) == ["base", "own LoRA", "king", "queen", "linear", "nla", "both"]
    assert average["both"] > max(average["base"], average["linear"], average["nla"])
    scored = rows(folder / "scores" / "both" / "samples_king.jsonl")
    assert {row["method"] for row in scored} >= {"both", "king", "queen"}
    assert {"prompt", "target", "filtered_resps", "exact_match"} <= set(scored[0])

    assert (folder / "exported" / "both" / "adapter_config.json").is_file()
    assert all("lora_" in key for key in keys(folder / "exported" / "both" / "adapter_model.safetensors"))
    assert {path.name for path in (folder / "gates" / "both").iterdir()} >= {"gates.csv", "gates.json", "gates.png"}


def test_the_pictures_part_runs_and_makes_what_it_says(tmp_path: Path, programs: Path) -> None:
    folder = tmp_path / "pictures"
    run_part("Pictures", folder, programs)

    concept = json.loads((folder / "loras" / "target" / "concept.json").read_text("utf-8"))
    assert (concept["trigger"], Path(concept["pictures"])) == ("sks", folder / "photos" / "target")
    composition = load_composition(folder / "runs" / "picture")
    assert composition.mode == "gated"
    assert [expert.name for expert in composition.experts] == ["target", "stripes"]

    assert len(list((folder / "drawn" / "all").glob("*-gated-*.png"))) == 3
    for sheet in ("drawn/all", "drawn/masked", "scores/picture"):
        with Image.open(folder / sheet / "sheet.png") as picture:
            assert min(picture.size) > 64

    average = json.loads((folder / "scores" / "picture" / "results.json").read_text("utf-8"))["average"]
    assert list(average) == ["linear", "nla", "picture"]
    scored = rows(folder / "scores" / "picture" / "samples_scenes.jsonl")
    assert len(scored) == 2 * 3  # scenes, methods
    assert {"scene", "prompt", "loras", "seed", "picture", "text_alignment", "image_alignment"} <= set(scored[0])

    assert keys(folder / "exported" / "picture" / "pytorch_lora_weights.safetensors")


def commands_of(block: Block) -> list[list[str]]:
    """The command lines of the block that begin with `mole`, continuations joined, as arguments."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("mole ")]


SHOWN_COMMANDS = [command for block in blocks() if block.language == SHOWN for command in commands_of(block)]


@pytest.mark.parametrize("arguments", SHOWN_COMMANDS, ids=" ".join)
def test_what_cannot_run_offline_is_a_command_line_that_mole_takes(arguments: Sequence[str]) -> None:
    name, *rest = arguments
    assert name in COMMANDS
    program = typer.main.get_command(app)
    with program.make_context("mole", [name], resilient_parsing=True) as context:
        command = program.get_command(context, name)  # type: ignore[attr-defined]
        # Parses names and values of all flags, and calls nothing.
        assert command.make_context(name, rest, parent=context).params


def test_every_block_is_of_a_kind_that_is_checked() -> None:
    found = blocks()
    assert {block.language for block in found} == {RUN, SHOWN, PRINTED}
    assert {block.part for block in found} == {"Text", "Pictures"}
    assert all(commands_of(block) for block in found if block.language == SHOWN)
