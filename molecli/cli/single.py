"""Makes a Typer app of one command function; `mole` finds it by name."""

from __future__ import annotations

from collections.abc import Callable

import typer


def single(command: Callable[..., None]) -> typer.Typer:
    """An app with only this command."""
    app = typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.command()(command)
    return app
