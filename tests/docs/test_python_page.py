"""docs/python.md: its code runs and prints what it says, and it has every public name and the true signature."""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import molecli
from molecli.cli.app import run
from molecli.config import GateConfig, MethodConfig
from molecli.mixture.branching import Branching
from molecli.mixture.mixture import Mixture

PAGE = Path(__file__).parents[2] / "docs" / "python.md"
TEXT = PAGE.read_text("utf-8")


def blocks(language: str) -> list[str]:
    """The page's code blocks in that language, with empty lines before each, so that a traceback has its line."""
    found = re.finditer(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    return ["\n" * TEXT[: match.start(1)].count("\n") + match.group(1) for match in found]


def said(block: str) -> Iterator[str]:
    """What the block says that it prints: the comment after each print."""
    return (match.group(1) for match in re.finditer(r"^ *print\(.*\)  # (.*)$", block, re.MULTILINE))


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the page's code runs, with the composition that the page names."""
    monkeypatch.chdir(tmp_path)
    command = "compose --loras a,b --steps 60 --no-evaluate --quiet --device cpu --output runs/two"
    assert run(command.split()) == 0
    return tmp_path


def test_every_block_runs_and_prints_what_it_says(workplace: Path) -> None:
    names: dict[str, object] = {}
    for block in blocks("python"):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block, str(PAGE), "exec"), names)
        assert printed.getvalue().splitlines() == list(said(block)), block
        assert block.count("print(") == len(list(said(block)))
    assert {path.name for path in workplace.glob("*.png")} == {"sum.png", "switch.png", "cactus.png", "weighted.png"}


def test_every_public_name_has_a_heading() -> None:
    headings = re.findall(r"^## `(\w+)`$", TEXT, re.MULTILINE)
    assert set(molecli.__all__) <= set(headings)
    assert set(headings) - set(molecli.__all__) == {Mixture.__name__}


def test_the_signature_of_attach_is_the_real_one() -> None:
    (shown,) = (block for block in blocks("text") if block.lstrip().startswith("def attach("))
    function = ast.parse(shown.rstrip() + ": ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    parameters = list(inspect.signature(molecli.attach).parameters.values())
    arguments = function.args
    assert [a.arg for a in arguments.args] == [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [a.arg for a in arguments.kwonlyargs] == [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    defaults = [ast.literal_eval(default) for default in arguments.kw_defaults if default is not None]
    assert defaults == [p.default for p in parameters if p.kind is p.KEYWORD_ONLY]


@pytest.mark.parametrize("parameter", list(inspect.signature(molecli.attach).parameters))
def test_every_argument_of_attach_has_a_row(parameter: str) -> None:
    assert f"\n| `{parameter}` |" in TEXT


def test_every_member_in_the_table_is_there() -> None:
    table = TEXT[TEXT.index("| member | does |") :].split("\n\n")[0]
    cells = [row.split("|")[1] for row in table.splitlines()[2:]]
    members = [name for cell in cells for name in re.findall(r"`(\w+)", cell)]
    assert {"names", "mask", "only", "gates", "prepare"} <= set(members)
    missing = {name for name in members if not hasattr(Mixture, name)}
    assert missing == {"prepare", "reads_prompt"}
    assert all(hasattr(Branching, name) for name in missing)


def test_the_options_that_it_names_are_fields() -> None:
    row = next(line for line in TEXT.splitlines() if line.startswith("| `method` |"))
    options = re.findall(r"`(\w+)`", row[row.index("(") : row.index(")")])
    assert options
    assert set(options) <= set(MethodConfig.model_fields)
    assert "granularity" in GateConfig.model_fields
