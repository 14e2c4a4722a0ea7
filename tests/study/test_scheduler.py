"""Commands in processes of their own."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from molecli import __version__
from molecli.study.scheduler import prepare, run_mole

pytestmark = pytest.mark.slow  # what they are forked from imports everything first


def test_each_command_has_its_exit_code_and_its_log(tmp_path: Path) -> None:
    prepare()
    commands = {"version": ["--version"], "wrong": ["evaluate", "--suite", "nowhere"], "recipes": ["recipe", "ls"]}

    def run(name: str) -> int:
        return run_mole(commands[name], tmp_path / f"{name}.log", {**os.environ, "OMP_NUM_THREADS": "1"})

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(run, [*commands] * 3)) == [0, 2, 0] * 3
    said = {name: (tmp_path / f"{name}.log").read_text() for name in commands}
    assert said["version"] == f"mole {__version__}\n"
    assert said["wrong"].startswith("mole: ")
    assert "nowhere" in said["wrong"]
    assert "text/" in said["recipes"]


def test_a_command_sees_the_environment_that_it_is_given(tmp_path: Path) -> None:
    there = {key: value for key, value in os.environ.items() if key != "HOME"}
    code = run_mole(["evaluate", "--help"], tmp_path / "log", {**there, "COLUMNS": "60", "NO_COLOR": "1"})
    assert code == 0
    assert max(map(len, (tmp_path / "log").read_text().splitlines())) <= 60
