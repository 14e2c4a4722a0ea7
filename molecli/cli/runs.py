"""Shared by the commands that write a folder: finding the recipe and the folder, the plan, the record."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from molecli.catalog import builtin
from molecli.cli.options import Request
from molecli.config import (
    ComposeRecipe,
    EvaluateRecipe,
    ExportRecipe,
    InspectGatesRecipe,
    Recipe,
    SampleRecipe,
    StudyRecipe,
    TrainLoraRecipe,
    dump_recipe,
    find_recipe,
)
from molecli.config.tree import read_yaml
from molecli.errors import UsageError
from molecli.files.atomic import write_text
from molecli.files.base_source import PROMPT_FLAGS
from molecli.files.output_folder import RECIPE_FILE, check, claim, default_folder

if TYPE_CHECKING:
    from molecli.commands.domain import Domain

R = TypeVar(
    "R",
    TrainLoraRecipe,
    ComposeRecipe,
    SampleRecipe,
    EvaluateRecipe,
    InspectGatesRecipe,
    ExportRecipe,
    StudyRecipe,
)


def recipe_file(request: Request) -> str | None:
    """The recipe that was named; with --resume and without a name, the recipe of the run to resume."""
    if request.targets:
        return request.targets[0]
    output = request.overrides.get("output")
    if request.resume and output and (Path(output) / RECIPE_FILE).is_file():
        return str(output)
    return None


def is_recipe(target: str) -> bool:
    """Whether a positional argument names a recipe: a .yaml file, or a shipped recipe."""
    return target.endswith((".yaml", ".yml")) or (target in builtin.recipes() and not Path(target).exists())


def base_of_composition(path: str, request: Request) -> dict[str, Any]:
    """The base of a composition as keys of a recipe; only how it writes prompts if a flag names another base.

    Flags such as --dtype then change how this base is loaded, and the defaults for its kind of base apply.
    """
    import yaml

    from molecli.files.composition import load_composition

    own = yaml.safe_load(load_composition(path).recipe)["base"]
    other = "base.id" in request.overrides
    return {f"base.{key}": value for key, value in own.items() if not other or key in PROMPT_FLAGS}


def base_of_recipe(file: str | None, request: Request) -> dict[str, Any]:
    """The base of a recipe's first composition, where the recipe names no base and flags change how it is used.

    Otherwise {}. Without this the flags would make up a base of their own.
    """
    changed = any(key.startswith("base.") for key in (*request.overrides, *request.sets))
    if file is None or not changed:
        return {}
    tree = read_yaml(find_recipe(file))
    several = tree.get("compositions")
    named = [tree.get("composition"), *(several if isinstance(several, list) else ())]
    found = next((path for path in named if isinstance(path, str)), None)
    return {} if found is None or "base" in tree else base_of_composition(found, request)


def show_plan(recipe: Recipe, request: Request, *, file: str | None = None, domain: Domain | None = None) -> None:
    """Prints what the run would do (--dry-run), or fails as the run would."""
    from molecli.commands.plan import make_plan, plan_lines

    folder = output_folder(recipe, request, file)
    check(folder, **_permissions(request))
    plan = make_plan(recipe.model_copy(update={"output": folder}), domain=domain)
    request.console.result(plan.document(), lambda: print("\n".join(plan_lines(plan))))


@contextmanager
def started(recipe: R, request: Request, *, file: str | None = None, domain: Domain | None = None) -> Iterator[R]:
    """The recipe, with its output folder checked and made, and recorded there; prints the folder at the end.

    `domain`: that of the base, if the command knows it already. A run that fails before it writes anything leaves no
    folder behind, so that the same command can be repeated.
    """
    folder = output_folder(recipe, request, file)
    ready = recipe.model_copy(update={"output": folder})
    record, existed = Path(folder) / RECIPE_FILE, Path(folder).exists()
    if is_main_process():
        _claim(ready, request, folder, domain)
        # A resumed run has its record, and the command compares the recipes. A study may have been extended.
        if not record.exists() or isinstance(ready, StudyRecipe):
            write_text(record, dump_recipe(ready))
    try:
        yield ready
    except BaseException as error:
        if is_main_process() and [path.name for path in Path(folder).iterdir()] == [RECIPE_FILE]:
            record.unlink()
            if not existed:
                Path(folder).rmdir()
        elif isinstance(error, KeyboardInterrupt) and "resume" in request.switches:
            request.console.note(f"{folder}: to continue, run the same command with --resume --output {folder}")
        raise
    request.console.note(f"Written: {folder}")


def _claim(recipe: Recipe, request: Request, folder: str, domain: Domain | None) -> None:
    permissions = _permissions(request)
    replaces = permissions["overwrite"] and not isinstance(recipe, SampleRecipe)
    if (replaces or isinstance(recipe, StudyRecipe)) and Path(folder).is_dir():
        # Before anything is removed: a recipe that cannot run must not cost the earlier results.
        _check_runs(recipe, domain)
    claim(folder, **permissions)


def _check_runs(recipe: Recipe, domain: Domain | None) -> None:
    """Checks what can be known before the run. Raises: UserError as the run would."""
    if isinstance(recipe, StudyRecipe):
        from molecli.study.run import jobs_of

        jobs_of(recipe)
    else:
        from molecli.commands.plan import make_plan

        make_plan(recipe, domain=domain, fetch=True)


def _permissions(request: Request) -> dict[str, bool]:
    """What the flags allow for a folder that is not empty."""
    return {
        "overwrite": bool(request.switches.get("overwrite")),
        "resume": request.resume,
        "resumable": "resume" in request.switches,
    }


def output_folder(recipe: Recipe, request: Request, file: str | None) -> str:
    """The folder to write: the given one, or a new one under runs/ if none is given or `file` is the record of a run.

    The record names the folder that its run has filled; repeating the run must not need another --output.
    """
    default = type(recipe).model_fields["output"].default
    given = default if recipe.output is None else str(recipe.output)
    repeated = file is not None and _same(_record(file), Path(given) / RECIPE_FILE) and not request.resume
    overwrite = bool(request.switches.get("overwrite"))
    if "output" in request.overrides or not (given == default or (repeated and not overwrite)):
        return given
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Each process would choose its own name, which depends on the time.
        raise UsageError("--output", "several processes need the same output folder", "Write --output DIR.")
    return default_folder(recipe.command)


def is_main_process() -> bool:
    """Whether this process is the one of `accelerate launch` that writes files."""
    return int(os.environ.get("RANK", "0")) == 0


def _record(file: str) -> Path:
    path = Path(file)
    return path / RECIPE_FILE if path.is_dir() else path


def _same(a: Path, b: Path) -> bool:
    return a.exists() and b.exists() and a.samefile(b)
