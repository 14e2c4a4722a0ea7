"""One command function as the Typer app that `mole` looks up by name."""

from __future__ import annotations

from collections.abc import Callable

import typer


def single(command: Callable[..., None]) -> typer.Typer:
    """An app that is just this command."""
    app = typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.command()(command)
    return app
