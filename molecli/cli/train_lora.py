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
from molecli.config import PicturesConfig, TrainLoraRecipe
from molecli.errors import UsageError

# `pictures` is an optional section, and the help shows no defaults of those by itself.
_DEFAULTS = {name: field.default for name, field in PicturesConfig.model_fields.items()}
PICTURES = (
    Flag("--instance-dir", "pictures.instance_dir", metavar="DIR"),
    Flag("--instance-prompt", "pictures.instance_prompt", metavar="TEXT"),
    Flag("--class-prompt", "pictures.class_prompt", metavar="TEXT"),
    Flag("--class-dir", "pictures.class_dir", metavar="DIR"),
    Flag("--class-pictures", "pictures.class_pictures", default=str(_DEFAULTS["class_pictures"])),
    Flag("--prior-weight", "pictures.prior_weight", default=str(_DEFAULTS["prior_weight"])),
    Flag("--resolution", "pictures.resolution"),
    Flag("--crop", "pictures.crop", default=_DEFAULTS["crop"]),
    Flag("--flip", "pictures.flip"),
    Flag("--prompt-dropout", "pictures.prompt_dropout", default=str(_DEFAULTS["prompt_dropout"])),
    Flag("--text-encoder", "pictures.text_encoder"),
    Flag("--clip-skip", "pictures.clip_skip"),
    Flag("--gradient-checkpointing", "pictures.gradient_checkpointing"),
    Flag("--kind", "pictures.kind", default=_DEFAULTS["kind"]),
    Flag("--trigger", "pictures.trigger", metavar="TEXT"),
)
# Settings of LoRAs only.
LORA = (
    Flag("--rank", "adapter.rank"),
    Flag("--alpha", "adapter.alpha"),
    Flag("--dropout", "adapter.dropout"),
    Flag("--rslora", "adapter.rslora"),
)
FLAGS = (
    *BASE,
    Flag("--method", "adapter.method"),
    Flag("--targets", "adapter.targets"),
    *LORA,
    *PICTURES,
    *DATA,
    *TRAIN,
    *SEED_AND_DEVICE,
    *OUTPUT,
    RESUME,
    DRY_RUN,
)


@recipe_command("train-lora", target=RECIPE, flags=FLAGS)
def train_lora(request: Request) -> None:
    """Train one LoRA on a frozen base: on the tasks of a suite, or on a few pictures of one subject.

    Writes a folder that PEFT can load (for a diffusion base, diffusers), with recipe.yaml, train_log.jsonl and
    report.json next to the adapter; for pictures also concept.json. With --method svdiff the adapter is
    svdiff.safetensors: --loras accepts it like a LoRA, but only on the base that it was trained on.
    """
    file = recipe_file(request)
    recipe = request.recipe(file)
    assert isinstance(recipe, TrainLoraRecipe)
    _check_flags(request, recipe)
    from molecli.commands.train_lora import domain_to_train, run_train_lora

    domain = domain_to_train(recipe)
    if request.switches["dry_run"]:
        show_plan(recipe, request, file=file, domain=domain)
        return
    with started(recipe, request, file=file, domain=domain) as ready:
        console = request.console
        report = run_train_lora(
            ready, domain=domain, resume=request.resume, progress=console.progress, note=console.note
        )
    request.console.result(report, lambda: print(ready.output))


def _check_flags(request: Request, recipe: TrainLoraRecipe) -> None:
    """Refuses flags without effect, even with their default values: data flags together with pictures, and LoRA flags
    with another method. Raises: UsageError."""
    lora = next((flag for flag in LORA if flag.key in request.overrides), None)
    if recipe.adapter.method != "lora" and lora is not None:
        raise UsageError(
            lora.name, f"it is a setting of LoRAs, and the method is {recipe.adapter.method}", "Leave it out."
        )
    named = next((flag for flag in DATA if flag.key in request.overrides), None)
    if recipe.pictures is not None and named is not None:
        what = "a suite's tasks train a language model, and pictures a diffusion pipeline"
        raise UsageError(named.name, what, "Leave it out, or leave out --instance-dir.")


app = single(train_lora)
