"""`mole evaluate`."""

from __future__ import annotations

from typing import Any

from molecli.cli.options import (
    BASE,
    DRY_RUN,
    LORAS,
    MASK,
    OUTPUT,
    SEED_AND_DEVICE,
    Flag,
    Request,
    recipe_command,
)
from molecli.cli.runs import is_recipe, show_plan, started
from molecli.cli.single import single
from molecli.errors import UsageError
from molecli.files.recipe import EvaluateRecipe

FLAGS = (
    *BASE,
    *LORAS,
    Flag("--modes", "modes", metavar="MODES"),
    Flag("--suite", "eval.data.suite"),
    Flag("--data-dir", "eval.data.data_dir", metavar="DIR"),
    Flag("--files", "eval.data.files", "with commas between; implies --suite jsonl", metavar="FILES"),
    Flag("--tasks", "eval.data.tasks", metavar="TASKS"),
    Flag("--split", "eval.data.split"),
    Flag("--holdout", "eval.data.holdout"),
    Flag("--limit", "eval.data.limit"),
    Flag("--metrics", "eval.metrics", metavar="METRICS"),
    Flag("--batch-size", "eval.batch_size"),
    Flag("--max-new-tokens", "eval.max_new_tokens"),
    Flag("--bootstrap", "eval.bootstrap"),
    *MASK,
    *SEED_AND_DEVICE,
    *OUTPUT,
    DRY_RUN,
)
TARGET = ("RECIPE | COMPOSITION", "One recipe (.yaml), or compositions: their folders or .safetensors files.")


@recipe_command("evaluate", target=TARGET, many=True, flags=FLAGS)
def evaluate(request: Request) -> None:
    """Score compositions on a suite of tasks, on one load of the base.

    Writes results.json and samples_<task>.jsonl.
    """
    file, more = _file_and_compositions(request.targets)
    recipe = request.recipe(file, more=more)
    assert isinstance(recipe, EvaluateRecipe)
    if request.switches["dry_run"]:
        show_plan(recipe, request, file=file)
        return
    with started(recipe, request, file=file) as ready:
        from molecli.engine.evaluate import run_evaluate

        report = run_evaluate(ready, progress=request.console.progress)
    request.console.result(report, report.show)


def _file_and_compositions(targets: tuple[str, ...]) -> tuple[str | None, dict[str, Any]]:
    """The recipe that was named, or what puts the named compositions into one."""
    recipes = [target for target in targets if is_recipe(target)]
    if not recipes:
        return None, {"compositions": list(targets)} if targets else {}
    if len(targets) > 1:
        raise UsageError(recipes[0], "a recipe stands alone", "Name one recipe, or only compositions.")
    return recipes[0], {}


app = single(evaluate)
