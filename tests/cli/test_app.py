"""The program itself: help, exit codes, messages, streams."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from molecli import __version__
from molecli.cli import app, console
from molecli.config import TrainConfig
from molecli.config.recipes import Mode
from molecli.errors import MismatchError, RunError, UsageError

STEPS = TrainConfig.model_fields["steps"].default


def _program(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "molecli", *arguments], capture_output=True, text=True, timeout=120, **options
    )


def test_help_imports_neither_torch_nor_a_recipe_model() -> None:
    code = (
        "import sys\nfrom molecli.cli.app import run\nrun(['--help'])\n"
        "heavy = {'torch', 'transformers', 'peft', 'numpy', 'pydantic_core'} & set(sys.modules)\n"
        "print(sorted(heavy), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    allowed = {"pydantic_core"} if _typer_needs_pydantic() else set()
    assert set(json.loads(done.stderr.replace("'", '"'))) <= allowed
    assert "compose" in done.stdout


def _typer_needs_pydantic() -> bool:
    code = "import typer, sys; print('pydantic_core' in sys.modules)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "True"


@pytest.mark.parametrize("command", list(app.COMMANDS))
def test_the_help_of_every_command_needs_no_torch(command: str) -> None:
    code = (
        f"import sys\nfrom molecli.cli.app import run\nrun(['{command}', '--help'])\nsys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0


def test_help_answers_in_half_a_second() -> None:
    def seconds() -> float:
        start_s = time.perf_counter()
        assert _program("--help").returncode == 0
        return time.perf_counter() - start_s

    # The best of five: other processes on the machine are not this program's time.
    assert min(seconds() for _ in range(5)) < 0.5


@pytest.mark.parametrize("name", list(app.COMMANDS))
def test_the_list_of_commands_says_what_each_ones_own_help_says(name: str, mole: Callable[..., Any]) -> None:
    own = mole(name, "--help").out.split("\n\n")[1].strip()
    assert " ".join(own.split()) == app.COMMANDS[name][1]


def test_version(mole: Callable[..., Any]) -> None:
    assert mole("--version") == (0, f"mole {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compose", "--bogus"), "mole: No such option: --bogus. See `mole compose --help`.\n"),
        (("composse",), "mole: No such command 'composse'. See `mole --help`.\n"),
        (
            ("compose", "--steps", "many"),
            f"mole: command line: train.steps is 'many', not a whole number. Write for example train.steps: {STEPS}.\n",
        ),
        (
            ("compose", "--mode", "gatd"),
            f"mole: command line: mode is 'gatd', not one of {', '.join(get_args(Mode))}. Did you mean 'gated'?\n",
        ),
        (("compose", "no.yaml"), "mole: no.yaml: no such recipe. Known: none. `mole recipe ls` lists them.\n"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_code_2(
    arguments: tuple[str, ...], message: str, mole: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("molecli.catalog.builtin.recipes", dict)
    ran = mole(*arguments)
    assert (ran.code, ran.out) == (2, "")
    assert _without_guesses(ran.err) == message


def _without_guesses(message: str) -> str:
    # What an unknown option may have meant is Typer's guess, and differs between its releases.
    return re.sub(r" \(Possible options: [^)]*\)", "", message)


def test_no_arguments_show_the_help_on_stderr(mole: Callable[..., Any]) -> None:
    ran = mole()
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("Usage: mole")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UsageError("x.yaml", "unknown key 'a'", "Did you mean 'b'?"), 2, "x.yaml: unknown key 'a'. Did you mean 'b'?"),
        (MismatchError("lora a", "made for another base"), 3, "lora a: made for another base."),
        (RunError("loss", "not finite", "Lower --lr."), 1, "loss: not finite. Lower --lr."),
        (KeyboardInterrupt(), 130, "interrupted: what was finished is kept"),
        (
            MemoryError(),
            1,
            "memory ran out. Lower the batch size, write --dtype bfloat16, or free the device of other programs.",
        ),
        (
            ZeroDivisionError("division by zero"),
            1,
            "unexpected ZeroDivisionError: division by zero. Run again with --verbose for the traceback.",
        ),
    ],
)
def test_every_error_becomes_its_message_and_code_at_one_place(
    error: BaseException, code: int, message: str, mole: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> dict[str, Path]:
        raise error

    monkeypatch.setattr("molecli.catalog.builtin.recipes", fail)
    ran = mole("recipe", "ls")
    assert ran == (code, "", f"mole: {message}\n")


def test_verbose_shows_the_traceback(mole: Callable[..., Any], tmp_path: Path) -> None:
    ran = mole("compose", tmp_path / "none.yaml", "--verbose")
    assert ran.code == 2
    assert ran.err.startswith("Traceback")
    assert ran.err.splitlines()[-1].startswith(f"mole: {tmp_path}/none.yaml: no such recipe.")


def test_an_interrupt_ends_with_code_130_and_no_traceback() -> None:
    code = (
        "import os, signal, sys\n"
        "from molecli.catalog import builtin\n"
        "builtin.recipes = lambda: os.kill(os.getpid(), signal.SIGINT)\n"
        "from molecli.cli.app import run\nsys.exit(run(['recipe', 'ls']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "mole: interrupted: what was finished is kept\n"


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    writer = subprocess.Popen(
        [sys.executable, "-m", "molecli", "recipe", "ls", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert writer.stdout is not None
    writer.stdout.close()
    assert writer.stderr is not None
    error = writer.stderr.read().decode()
    writer.stderr.close()
    writer.wait(timeout=60)
    assert error == ""


def test_results_are_one_json_document_and_bars_stay_off_a_pipe(capfd: pytest.CaptureFixture[str]) -> None:
    talk = console.start(json=True)
    talk._started = -1e9
    talk.progress("train", 1, 2)
    talk.note("written")
    talk.result({"a": [1, float("0.5")]}, lambda: pytest.fail("not this"))
    out, err = capfd.readouterr()
    assert json.loads(out) == {"a": [1, 0.5]}
    assert err == "written\n"


def test_quiet_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    talk = console.start(quiet=True)
    talk.note("written")
    talk.detail("more")
    assert capfd.readouterr() == ("", "")


def test_a_warning_of_this_package_is_a_message_and_others_stay_what_they_are(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    others: list[tuple[Any, ...]] = []
    monkeypatch.setattr(warnings, "showwarning", lambda *arguments: others.append(arguments))
    monkeypatch.setattr(app, "run", lambda: 0)
    with pytest.raises(SystemExit):
        app.main()
    for said in (("cut", UserWarning, app.__file__, 1), ("old", DeprecationWarning, app.__file__, 1)):
        warnings.showwarning(*said)
    warnings.showwarning("theirs", UserWarning, "elsewhere.py", 1)
    assert capfd.readouterr().err == "mole: cut\n"
    assert [said[0] for said in others] == ["old", "theirs"]
