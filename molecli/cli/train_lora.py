"""`mole train-lora`."""

from __future__ import annotations

from molecli.cli.options import (
    BASE,
    DATA,
    DRY_RUN,
    OUTPUT,
    RECIPE,
    RESUME,
    SEED_AND_DEVICE,
    TRAIN,
    Flag,
    Request,
    recipe_command,
)
from molecli.cli.runs import recipe_file, show_plan, started
from molecli.cli.single import single
from molecli.files.recipe import TrainLoraRecipe

FLAGS = (
    *BASE,
    Flag("--rank", "adapter.rank"),
    Flag("--alpha", "adapter.alpha"),
    Flag("--dropout", "adapter.dropout"),
    Flag("--targets", "adapter.targets"),
    Flag("--rslora", "adapter.rslora"),
    *DATA,
    *TRAIN,
    *SEED_AND_DEVICE,
    *OUTPUT,
    RESUME,
    DRY_RUN,
)


@recipe_command("train-lora", target=RECIPE, flags=FLAGS)
def train_lora(request: Request) -> None:
    """Train one LoRA on a frozen base.

    Writes a folder that PEFT loads, with recipe.yaml, train_log.jsonl and report.json beside the adapter.
    """
    file = recipe_file(request)
    recipe = request.recipe(file)
    assert isinstance(recipe, TrainLoraRecipe)
    if request.switches["dry_run"]:
        show_plan(recipe, request, file=file)
        return
    with started(recipe, request, file=file) as ready:
        from molecli.engine.train_lora import run_train_lora

        report = run_train_lora(ready, resume=request.resume, progress=request.console.progress)
    request.console.result(report, lambda: print(ready.output))


app = single(train_lora)
