"""docs/compatibility.md: the results of the cells as tables, and the tables read again.

Contents: Results, columns, columns_of, modes_of, render, parse, shared_words, GROUPS, PAGE.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import diffusers
import transformers

from tests.conformance.architectures import ARCHITECTURES
from tests.conformance.cells import EXACT, Cell
from tests.conformance.models import Kind
from tests.conformance.pipelines import MODES as PIPELINE_MODES
from tests.conformance.pipelines import PIPELINE_WAYS, ROWS
from tests.conformance.subject import FIXED, GATED, MODES
from tests.conformance.ways import WAYS

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
# (architecture or pipeline, way) -> the cell of each mode, or that of the base under "base".
Results = Mapping[tuple[str, str], Mapping[str, Cell]]
GROUPS: dict[str, Sequence[str]] = {"Fixed weights": tuple(FIXED), "Gates": tuple(GATED)}
_KINDS: Mapping[Kind, str] = {
    "decoder": "Decoders",
    "experts": "Mixtures of experts",
    "recurrent": "Recurrent layers and hybrids",
    "encoder-decoder": "Encoder-decoders",
    "multimodal": "Language models in multimodal ones",
}
_SUPPORTED, _REFUSED, _BASE = "✓", "✗", "–"
_INTRODUCTION = """# Compatibility

<!-- Written by `python -m tools.compatibility`. Do not edit: run it again. -->

The language models of transformers {version} on which LoRAs can be composed, and how these may be called. Every cell
was computed, on a tiny random model of the architecture, in every mode of the part of the page that it is in:

- {supported} is exact: against PEFT's own result `1e-5` of the largest logit in float32; against one row alone without
  cache and padding (for what was generated: teacher forcing) `1e-4`. Masks and leaving restore the base bit for bit.
- {refused} is refused by an error before anything is computed; the number is that of its words, below the tables.
- {base} is nothing that the base does without LoRAs: transformers raises, or its own result is another one.

There is no other state: a cell that is neither makes the command fail. `tests/conformance` says what each column calls.
"""
_PIPELINES = """## Pipelines

The pipelines of diffusers {version} that draw with a UNet, tiny and random, in the modes {modes}. The results are those
of diffusers' own LoRAs (`load_lora_weights`, `set_adapters`), or those of the same call made in another way, to `1e-5`
of the largest value in float32. {base} is what the pipeline, or diffusers' own LoRAs in it, cannot do themselves. The
names of the rows are those of `tests/helpers/pipeline_shapes.py`.
"""
_ABOUT = {
    "Fixed weights": "Sums and merges, here `linear` and `cat`. Every merge ends as one LoRA, as `cat` does.",
    "Gates": "Mode `gated` with the pools {pools}. Fresh gates do not move; these are random and far from even.",
}


def columns(modes: Sequence[str] = tuple(MODES)) -> dict[str, str]:
    """way -> the head of its column, of the ways that are tried in any of these modes; first that of exactness."""
    tried = {name: way.head for name, way in WAYS.items() if set(way.modes) & set(modes)}
    return {EXACT: "as PEFT", **tried}


def columns_of(row: str) -> dict[str, str]:
    """way -> the head of its column, in the table of this row."""
    return {name: way.head for name, way in PIPELINE_WAYS.items()} if row in ROWS else columns()


def modes_of(way: str) -> tuple[str, ...]:
    """The modes that a way is tried in."""
    if way in PIPELINE_WAYS:
        return tuple(PIPELINE_WAYS[way].modes)
    return tuple(WAYS[way].modes if way in WAYS else MODES)


def shared_words(words: str) -> str:
    """A refusal's words without what differs between architectures: paths, names of modules, and numbers."""
    words = re.sub(r"\S*/\S+", "…", words)
    words = re.sub(r"'?\b\w+(\.\w+){2,}\b'?", "…", words)
    return re.sub(r"\b\d+\b", "n", words)


def _refusals(cells: Mapping[str, Cell], modes: Sequence[str]) -> list[tuple[str, str]]:
    """The refusals of a cell over these modes: (words, the modes that are refused so)."""
    refused: dict[str, list[str]] = {}
    for mode in modes:
        if mode in cells and cells[mode].state == "refused":
            refused.setdefault(shared_words(cells[mode].words), []).append(mode)
    return [(words, ", ".join(found)) for words, found in refused.items()]


def render(results: Results) -> str:
    """The page, of the rows and columns in `results`. Raises: ValueError for a wrong cell, for which it has no sign."""
    wrong = [key for key, cells in results.items() if any(cell.state == "wrong" for cell in cells.values())]
    if wrong:
        raise ValueError(f"{len(wrong)} cells are wrong, such as {wrong[0]}")
    notes: dict[tuple[str, str], int] = {}
    signs = {"supported": _SUPPORTED, "refused": _REFUSED, "base": _BASE}
    parts = [_INTRODUCTION.format(version=_short(transformers.__version__), **signs)]
    for group, modes in GROUPS.items():
        parts.append(f"## {group}\n\n{_ABOUT[group].format(pools=', '.join(f'`{mode}`' for mode in GATED))}\n")
        for kind, title in _KINDS.items():
            rows = [name for name, row in ARCHITECTURES.items() if row.kind == kind and (name, EXACT) in results]
            parts.append(f"### {group}: {title[0].lower()}{title[1:]}\n\n{_table(results, rows, modes, notes)}\n")
    if drawn := [name for name in ROWS if (name, next(iter(PIPELINE_WAYS))) in results]:
        about = {"version": _short(diffusers.__version__), "modes": ", ".join(f"`{mode}`" for mode in PIPELINE_MODES)}
        table = _table(results, drawn, tuple(PIPELINE_MODES), notes, first="pipeline")
        parts.append(f"{_PIPELINES.format(**about, **signs)}\n{table}\n")
    parts.append("## Refusals\n\n" + "\n".join(_note(number, *note) for note, number in notes.items()))
    return "\n".join(parts).rstrip() + "\n"


def _short(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _note(number: int, words: str, modes: str) -> str:
    return f"{number}. In {modes}: {words}"


_NOTE = re.compile(r"^(\d+)\. In ([^:]+): (.*)$", re.M)


def _table(
    results: Results,
    rows: Sequence[str],
    modes: Sequence[str],
    notes: dict[tuple[str, str], int],
    first: str = "architecture",
) -> str:
    heads = columns_of(rows[0]) if rows[0] in ROWS else columns(modes)
    heads = {way: head for way, head in heads.items() if (rows[0], way) in results}
    lines = [[first, *heads.values()], ["---", *[":-:"] * len(heads)]]
    for name in rows:
        marks = []
        for way in heads:
            cells = results[name, way]
            refused = [notes.setdefault(note, len(notes) + 1) for note in _refusals(cells, modes)]
            done = any(mode in cells for mode in modes)
            marks.append(_REFUSED + ",".join(map(str, refused)) if refused else _SUPPORTED if done else _BASE)
        lines.append([f"`{name}`", *marks])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def parse(page: str) -> dict[tuple[str, str], dict[str, Cell]]:
    """The results that `render` made the page of, with the words as it shares them."""
    notes = {number: (modes.split(", "), words) for number, modes, words in _NOTE.findall(page)}
    heads = {head: way for row in (next(iter(ARCHITECTURES)), ROWS[0]) for way, head in columns_of(row).items()}
    found: dict[tuple[str, str], dict[str, Cell]] = {}
    modes: Sequence[str] = ()
    ways: list[str] = []
    for line in page.splitlines():
        modes = (GROUPS | {"Pipelines": tuple(PIPELINE_MODES)}).get(line.removeprefix("## "), modes)
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else [""]
        if cells[0] in ("architecture", "pipeline"):
            ways = [heads.get(head, head) for head in cells[1:]]
        elif cells[0].startswith("`"):
            for way, mark in zip(ways, cells[1:], strict=True):
                found.setdefault((cells[0].strip("`"), way), {}).update(_cells(way, mark, modes, notes))
    return found


def _cells(way: str, mark: str, modes: Sequence[str], notes: Mapping[str, tuple[list[str], str]]) -> dict[str, Cell]:
    """The cells behind a sign."""
    if mark == _BASE:
        return {"base": Cell("base")}
    cells = {mode: Cell("exact") for mode in modes if mode in modes_of(way)}
    for number in mark.strip(_SUPPORTED + _REFUSED).split(","):
        refused, words = notes.get(number, ([], ""))
        cells |= {mode: Cell("refused", words) for mode in refused}
    return cells
