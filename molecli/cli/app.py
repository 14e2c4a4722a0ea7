"""The `mole` program: its commands, and the place where errors become messages and exit codes.

A command's module is imported when the command is named, and torch when it runs, so that `mole --help` is fast.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from molecli import __version__
from molecli.cli import console
from molecli.errors import UserError

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

# name -> (module:Typer app, one line of help, which is also the first line of the command's own help)
COMMANDS = {
    "train-lora": (
        "molecli.cli.train_lora:app",
        "Train one LoRA on a frozen base: on the tasks of a suite, or on a few pictures of one subject.",
    ),
    "compose": ("molecli.cli.compose:app", "Compose trained LoRAs with learned gates or a fixed method."),
    "sample": ("molecli.cli.sample:app", "Complete or draw prompts with a composition, single LoRAs or the bare base."),
    "evaluate": ("molecli.cli.evaluate:app", "Score compositions on a suite of tasks or scenes."),
    "inspect-gates": ("molecli.cli.inspect_gates:app", "Show what the gates of a composition do."),
    "study": (
        "molecli.cli.study:app",
        "Compare methods: train LoRAs, compose them with each method, and score them all.",
    ),
    "export": (
        "molecli.cli.export:app",
        "Write a composition as one plain adapter that PEFT, diffusers or A1111/ComfyUI can load.",
    ),
    "recipe": ("molecli.cli.recipe:app", "List, copy and check recipes."),
}


class LazyCommands(TyperGroup):
    """A group that lists its commands without importing them."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command = typer.main.get_command(getattr(importlib.import_module(module), attribute))
        command.name = cmd_name
        return command

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help) for name, (_, help) in COMMANDS.items()])


app = typer.Typer(
    name="mole",
    cls=LazyCommands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"mole {__version__}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Compose trained LoRAs: learned gates and fixed mixtures on one frozen base."""


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line, prints its error message if there is one, and returns the exit code: 0, 1, 2, 3 or 130."""
    try:
        code = app(args=None if arguments is None else list(arguments), prog_name="mole", standalone_mode=False)
        sys.stdout.flush()
        # Typer turns an interrupt inside a command into code 130 without a message.
        return _report("interrupted: what was finished is kept", code) if code == EXIT_INTERRUPTED else code or 0
    except KeyboardInterrupt:
        return _report("interrupted: what was finished is kept", EXIT_INTERRUPTED)
    except UserError as error:
        return _report(str(error), error.exit_code)
    except BrokenPipeError:
        # The reader of the pipe has closed it (`mole ... | head`): no message.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # `mole` alone: its message is the help
            print(str(error), file=sys.stderr)
            return EXIT_USAGE
        if hasattr(error, "format_message"):  # Typer's own usage errors
            return _report(_usage_message(error), EXIT_USAGE)
        return _report(_unexpected_message(error), EXIT_FAILED)


def main() -> None:
    """The entry point of the `mole` program."""
    warnings.showwarning = _as_messages(warnings.showwarning)
    sys.exit(run())


def _as_messages(standard: Callable[..., None]) -> Callable[..., None]:
    """A showwarning that prints this package's own warnings as messages, without Python's line of code."""

    def show(message: Warning | str, category: type[Warning], filename: str, *more: Any, **named: Any) -> None:
        if issubclass(category, UserWarning) and Path(filename).is_relative_to(Path(__file__).parents[1]):
            print(f"mole: {message}", file=sys.stderr)
        else:
            standard(message, category, filename, *more, **named)

    return show


def _report(message: str, code: int) -> int:
    running = console.current()
    running.close()
    if running.verbose and sys.exc_info()[0] is not None:
        traceback.print_exc()
    print(f"mole: {message}", file=sys.stderr)
    return code


def _usage_message(error: Any) -> str:
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "mole"
    return f"{error.format_message().rstrip('.')}. See `{path} --help`."


def _unexpected_message(error: Exception) -> str:
    if type(error).__name__ in ("MemoryError", "OutOfMemoryError"):  # by name: torch need not be imported
        return "memory ran out. Lower the batch size, write --dtype bfloat16, or free the device of other programs."
    first = (str(error).strip() or "no message").splitlines()[0]
    hint = "" if console.current().verbose else " Run again with --verbose for the traceback."
    return f"unexpected {type(error).__name__}: {first.rstrip('.')}.{hint}"
