"""What the commands that write a folder share: which recipe, which folder, the plan, the record."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from molecli import catalog
from molecli.cli.options import Request
from molecli.errors import UsageError
from molecli.files.recipe import (
    ComposeRecipe,
    EvaluateRecipe,
    Recipe,
    SampleRecipe,
    TrainLoraRecipe,
    dump_recipe,
)

R = TypeVar("R", TrainLoraRecipe, ComposeRecipe, SampleRecipe, EvaluateRecipe)


def recipe_file(request: Request) -> str | None:
    """The recipe that was named; with --resume and none named, that of the run to resume."""
    if request.targets:
        return request.targets[0]
    output = request.overrides.get("output")
    if request.resume and output and (Path(output) / "recipe.yaml").is_file():
        return str(output)
    return None


def is_recipe(target: str) -> bool:
    """Whether a positional argument names a recipe: a .yaml file, or a shipped recipe."""
    return target.endswith((".yaml", ".yml")) or (target in catalog.recipes() and not Path(target).exists())


def show_plan(recipe: Recipe, request: Request) -> None:
    """Prints what the run would do (--dry-run)."""
    from molecli.engine.plan import make_plan, plan_lines

    plan = make_plan(recipe)
    request.console.result(plan.document(), lambda: print("\n".join(plan_lines(plan))))


@contextmanager
def started(recipe: R, request: Request, *, file: str | None = None) -> Iterator[R]:
    """The recipe with its output folder made, checked and recorded there; says afterwards where the run is."""
    from molecli.engine import output
    from molecli.files.atomic import write_text

    folder = output_folder(recipe, request, file)
    ready = recipe.model_copy(update={"output": folder})
    switches = {"overwrite": bool(request.switches.get("overwrite")), "resume": request.resume}
    if is_main_process():
        output.claim(folder, **switches, resumable="resume" in request.switches)
        write_text(Path(folder) / "recipe.yaml", dump_recipe(ready))
    try:
        yield ready
    except KeyboardInterrupt:
        if "resume" in request.switches:
            request.console.note(f"{folder}: interrupted. Write --resume to continue.")
        raise
    request.console.note(f"Written: {folder}")


def output_folder(recipe: Recipe, request: Request, file: str | None) -> str:
    """The folder to write: the one given, or a new one under runs/ where none was, or where `file` is a run's record.

    A run's own recipe.yaml names the folder that run filled, and repeating the run must not need a second flag.
    """
    from molecli.engine import output

    given = str(recipe.output)
    default = type(recipe).model_fields["output"].default
    repeated = file is not None and _same(_record(file), Path(given) / "recipe.yaml") and not request.resume
    overwrite = bool(request.switches.get("overwrite"))
    if "output" in request.overrides or not (given == default or (repeated and not overwrite)):
        return given
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Each process would name its own: the clock may tick between them.
        raise UsageError("--output", "several processes need one folder to write", "Write --output DIR.")
    return output.default_folder(recipe.command)


def is_main_process() -> bool:
    """Whether this process writes, among those that `accelerate launch` started."""
    return int(os.environ.get("RANK", "0")) == 0


def _record(file: str) -> Path:
    path = Path(file)
    return path / "recipe.yaml" if path.is_dir() else path


def _same(a: Path, b: Path) -> bool:
    return a.exists() and b.exists() and a.samefile(b)
