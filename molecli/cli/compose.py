"""`mole compose`."""

from __future__ import annotations

from molecli.cli.options import (
    BASE,
    DATA,
    DRY_RUN,
    GATE,
    LORAS,
    OUTPUT,
    RECIPE,
    RESUME,
    SEED_AND_DEVICE,
    TRAIN,
    Flag,
    Request,
    Switch,
    recipe_command,
)
from molecli.cli.runs import recipe_file, show_plan, started
from molecli.cli.single import single
from molecli.files.recipe import ComposeRecipe

FLAGS = (
    *LORAS,
    *BASE,
    Flag("--mode", "mode"),
    Flag("--only", "only", metavar="NAME"),
    Flag("--preset", "preset"),
    *GATE,
    *DATA,
    *TRAIN,
    Flag("--balance", "train.balance"),
    Switch("--no-evaluate", "compose only; score nothing afterwards"),
    Flag("--eval-limit", "evaluate.data.limit"),
    Flag("--allow-partial", "allow_partial"),
    *SEED_AND_DEVICE,
    *OUTPUT,
    RESUME,
    DRY_RUN,
)


@recipe_command("compose", target=RECIPE, flags=FLAGS)
def compose(request: Request) -> None:
    """Compose trained LoRAs, by learned gates or a fixed mixture.

    With neither --base nor --loras the embedded ones are used. Writes composition.safetensors, recipe.yaml,
    report.json and, where something was trained, train_log.jsonl.
    """
    file = recipe_file(request)
    recipe = request.recipe(file, sets=("evaluate=null",) if request.switches["no_evaluate"] else ())
    assert isinstance(recipe, ComposeRecipe)
    if request.switches["dry_run"]:
        show_plan(recipe, request, file=file)
        return
    with started(recipe, request, file=file) as ready:
        from molecli.engine.compose import run_compose

        report = run_compose(ready, resume=request.resume, progress=request.console.progress)
    request.console.result(report, report.show)


app = single(compose)
