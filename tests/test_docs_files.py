"""docs/files.md names the level of every mode, and every tensor of its compositions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from molecli.catalog.methods import METHODS, Method
from molecli.config import GateConfig, MethodConfig
from molecli.experts import Expert, LowRank
from molecli.mixture.build import build_mixture
from molecli.mixture.layout import adaptable_matrices, host_of

ROOT = Path(__file__).parents[1]
# Between them every tensor that gates have.
GATES = (
    GateConfig(granularity="block", input="hidden", head="low_rank"),
    GateConfig(granularity="block", input="experts"),
    GateConfig(granularity="block", input="none"),
)


def rows(*head: str) -> list[list[str]]:
    """The cells of the table in docs/files.md with this head, row by row."""
    lines = iter((ROOT / "docs" / "files.md").read_text("utf-8").splitlines())
    for line in lines:
        if cells(line) == list(head):
            next(lines)  # the rule under the head
            return [cells(row) for row in iter(lambda: next(lines), "")]
    raise AssertionError(head)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def test_every_mode_stands_beside_its_level() -> None:
    table = {quoted(level)[0]: quoted(modes) for level, _, modes in rows("`level`", "acts", "`mode`")}
    assert table == {
        level: [name for name, row in METHODS.items() if row.level == level]
        for level in dict.fromkeys(row.level for row in METHODS.values())
    }


def test_every_tensor_of_every_mode_stands_in_the_table(tiny_llama: Any, tiny_sd: Any) -> None:
    table = [(name, whose) for names, whose, _ in rows("tensor", "mode", "where") for name in quoted(names)]
    seen = set()
    for method, tensors in compositions(tiny_llama.model, host_of(tiny_sd)):
        for key in tensors:
            fitting = [row for row in table if pattern(row[0]).fullmatch(key) and belongs(method, row[1])]
            assert len(fitting) == 1, (method.name, key)
            seen.add((fitting[0], method.name))
    assert {row for row, _ in seen} == set(table)
    named = {(row, mode) for row in table for mode in quoted(row[1]) if mode in METHODS}
    assert named <= seen


def pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"<\w+>", ".+", re.escape(name)))


def belongs(method: Method, whose: str) -> bool:
    """Whether the row says that it is about this method."""
    return (
        method.name in quoted(whose)
        or (method.family == "merges" and "merges" in whose)
        or f"level `{method.level}`" in whose
    )


def compositions(language: Any, pipeline: Any) -> Iterator[tuple[Method, Mapping[str, Tensor]]]:
    """The tensors of every mode, on a model that it composes; those of `gated` by every kind of gate."""
    for method in METHODS.values():
        model = pipeline if method.level == "output" else language
        kinds = {name: ("character", "style")[i] for i, name in enumerate("ab")}
        config = MethodConfig(expression="a + b" if method.name == "pem" else None)
        for gate in GATES if method.name == "gated" else GATES[-1:]:
            mixture = build_mixture(
                model,
                experts(model),
                mode=method.name,
                gate=gate,
                only="a" if method.name == "single" else None,
                method=config,
                triggers=dict.fromkeys("ab", "a word"),
                kinds=kinds,
            )
            yield method, mixture.state_dict()


def experts(model: Any) -> list[Expert]:
    """Two LoRAs on the model's first matrices."""
    shapes = {name: shape for name, shape in list(adaptable_matrices(model).items())[:4] if len(shape) == 2}
    return [
        Expert(
            name, {m: LowRank(torch.randn(2, shape[1]), torch.randn(shape[0], 2), 1.0) for m, shape in shapes.items()}
        )
        for name in "ab"
    ]
