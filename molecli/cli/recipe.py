"""`mole recipe ls | cp | validate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from molecli.catalog import builtin
from molecli.cli import console
from molecli.config import dump_recipe, find_recipe, load_recipe
from molecli.errors import UsageError
from molecli.files.atomic import write_text

Json = Annotated[bool, typer.Option("--json", help="print one JSON document on stdout and nothing else there")]
RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A .yaml file, a run's folder or a shipped name.")]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="List, copy and check recipes.",
)


@app.command("ls")
def ls(json: Json = False) -> None:
    """List the recipes that ship with mole."""
    rows = {name: _summary(path) for name, path in builtin.recipes().items()}
    width = max(map(len, rows), default=0)
    document = [{"name": name, "summary": summary} for name, summary in rows.items()]
    console.start(json=json).result(
        document, lambda: print("\n".join(f"{name:{width}}  {summary}" for name, summary in rows.items()))
    )


@app.command("cp")
def cp(
    recipe: RecipeName,
    target: Annotated[str, typer.Argument(metavar="FILE", help="File or folder to write; - for stdout.")] = ".",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an existing file")] = False,
) -> None:
    """Copy a recipe with its comments, to edit it."""
    source = find_recipe(recipe)
    text = source.read_text(encoding="utf-8")
    if target == "-":
        print(text, end="")
        return
    file = Path(target) / source.name if Path(target).is_dir() else Path(target)
    if file.exists() and not overwrite:
        raise UsageError(str(file), "the file exists", "Choose another name, or write --overwrite.")
    write_text(file, text)
    print(file)


@app.command("validate")
def validate(
    recipe: RecipeName,
    sets: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override any key")] = None,
    json: Json = False,
) -> None:
    """Check a recipe without loading a model.

    Prints the recipe with all values, defaults included.
    """
    checked = load_recipe(recipe, sets=sets or ())
    console.start(json=json).result(checked.model_dump(mode="json"), lambda: print(dump_recipe(checked), end=""))


def _summary(path: Path) -> str:
    """The first comment line of a recipe."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ").strip().rstrip(":") if first.startswith("#") else ""
