"""`mole recipe ls | cp | validate`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from molecli.catalog import builtin as catalog
from molecli.config import load_recipe


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One shipped recipe, text/demo."""
    file = tmp_path / "shipped" / "demo.yaml"
    file.parent.mkdir()
    file.write_text("# Gates for a demo\ncommand: compose\nloras: [a=x, b=y]\ntrain: {steps: 7}\n")
    monkeypatch.setattr(catalog, "recipes", lambda: {"text/demo": file})
    return file


def test_ls_lists_name_and_first_comment(mole: Callable[..., Any], shipped: Path) -> None:
    assert mole("recipe", "ls") == (0, "text/demo  Gates for a demo\n", "")
    document = json.loads(mole("recipe", "ls", "--json").out)
    assert document == [{"name": "text/demo", "summary": "Gates for a demo"}]


def test_cp_keeps_comments_and_refuses_to_replace(mole: Callable[..., Any], shipped: Path, tmp_path: Path) -> None:
    target = tmp_path / "mine.yaml"
    assert mole("recipe", "cp", "text/demo", target) == (0, f"{target}\n", "")
    assert target.read_text() == shipped.read_text()
    assert mole("recipe", "cp", "text/demo", target) == (
        2,
        "",
        f"mole: {target}: the file exists. Choose another name, or write --overwrite.\n",
    )
    assert mole("recipe", "cp", "text/demo", target, "--overwrite").code == 0
    assert mole("recipe", "cp", "text/demo", "-").out == shipped.read_text()


def test_validate_prints_every_value(mole: Callable[..., Any], shipped: Path) -> None:
    ran = mole("recipe", "validate", "text/demo", "--set", "train.lr=0.5")
    tree = yaml.safe_load(ran.out)
    assert ran.code == 0
    assert (tree["train"]["steps"], tree["train"]["lr"], tree["mode"]) == (7, 0.5, "gated")
    assert json.loads(mole("recipe", "validate", "text/demo", "--json").out)["train"]["steps"] == 7


def test_validate_names_file_key_and_the_nearest_known_key(mole: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("command: compose\nloras: [a=x, b=y]\ntrain: {stepz: 7}\n")
    ran = mole("recipe", "validate", file)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == f"mole: {file}: unknown key 'train.stepz'. Did you mean 'train.steps'?\n"


def test_validate_needs_no_torch(shipped: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys\nfrom molecli.cli.app import run\n"
        f"code = run(['recipe', 'validate', {str(shipped)!r}])\nsys.exit(code or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0


@pytest.mark.parametrize("name", list(catalog.recipes()))
def test_every_shipped_recipe_is_valid_and_says_what_it_is(name: str) -> None:
    load_recipe(name)
    assert catalog.recipes()[name].read_text().startswith("# ")
