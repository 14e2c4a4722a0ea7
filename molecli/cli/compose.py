"""`mole compose`."""

from __future__ import annotations

from molecli.catalog.methods import SUM
from molecli.cli.options import (
    BASE,
    DATA,
    DRY_RUN,
    GATE,
    IMAGE,
    LORAS,
    METHOD,
    OUTPUT,
    RECIPE,
    RESUME,
    SEED_AND_DEVICE,
    TRAIN,
    Flag,
    Request,
    Toggle,
    recipe_command,
)
from molecli.cli.runs import recipe_file, show_plan, started
from molecli.cli.single import single
from molecli.config import ComposeRecipe

# The loss of the gates on a diffusion base.
OBJECTIVE = (
    Flag("--denoise", "objective.denoise"),
    Flag("--collage", "objective.collage"),
    Flag("--clip", "objective.clip"),
    Flag("--clip-local", "objective.clip_local"),
    Flag("--clip-model", "objective.guide.model", metavar="NAME"),
    Flag("--clip-pretrained", "objective.guide.pretrained", metavar="TAG"),
    Flag("--gradient-checkpointing", "objective.gradient_checkpointing"),
)
FLAGS = (
    *LORAS,
    *BASE,
    Flag("--mode", "mode"),
    Flag("--only", "only", metavar="NAME"),
    *METHOD,
    Flag("--preset", "preset"),
    *GATE,
    *DATA,
    *OBJECTIVE,
    *TRAIN,
    Flag("--balance", "train.balance"),
    *IMAGE,
    Flag("--preview", "preview", metavar="MODES", default=SUM),
    Toggle("--no-preview", "images: do not draw the finished composition"),
    Toggle("--no-evaluate", "language models: do not score the composition"),
    Flag("--eval-limit", "evaluate.data.limit", "for the scores"),
    Flag("--allow-partial", "allow_partial"),
    *SEED_AND_DEVICE,
    *OUTPUT,
    RESUME,
    DRY_RUN,
)


@recipe_command("compose", target=RECIPE, flags=FLAGS)
def compose(request: Request) -> None:
    """Compose trained LoRAs with learned gates or a fixed method.

    Without --base and --loras the built-in ones are used. Writes composition.safetensors, recipe.yaml, report.json and,
    if something was trained, train_log.jsonl.

    On a diffusion base, gates learn from pictures of what each LoRA adds. The concept.json next to the LoRA names them,
    or `concepts:` in the recipe. preview/sheet.png shows pictures by the composition next to those of other methods.
    """
    file = recipe_file(request)
    off = {"no_evaluate": "evaluate=null", "no_preview": "preview=[]"}
    recipe = request.recipe(file, sets=[key for switch, key in off.items() if request.switches[switch]])
    assert isinstance(recipe, ComposeRecipe)
    from molecli.commands.compose import run_compose
    from molecli.commands.domain import domain_of

    domain = domain_of(recipe.base)
    if request.switches["dry_run"]:
        show_plan(recipe, request, file=file, domain=domain)
        return
    with started(recipe, request, file=file, domain=domain) as ready:
        console = request.console
        report = run_compose(ready, domain=domain, resume=request.resume, progress=console.progress, note=console.note)
    request.console.result(report, report.show)


app = single(compose)
