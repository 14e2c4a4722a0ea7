"""`mole inspect-gates`."""

from __future__ import annotations

from typing import Any

from molecli.cli.options import BASE, IMAGE, LORAS, MASK, SAVE, SEED_AND_DEVICE, Flag, Request, Switch, recipe_command
from molecli.cli.runs import base_of_composition, is_recipe, started
from molecli.cli.single import single
from molecli.errors import UsageError
from molecli.files.recipe import EvaluateRecipe

EXAMPLES_PER_TASK, PICTURES_PER_PROMPT = 64, 1

FLAGS = (
    *BASE,
    *LORAS,
    Flag("--suite", "eval.data.suite", "without one, the data that the composition was scored on", default=""),
    Flag("--data-dir", "eval.data.data_dir", metavar="DIR"),
    Flag("--files", "eval.data.files", "with commas between; implies --suite jsonl", metavar="FILES"),
    Flag("--tasks", "eval.data.tasks", metavar="TASKS"),
    Flag("--split", "eval.data.split"),
    Flag("--holdout", "eval.data.holdout"),
    Flag("--limit", "eval.data.limit", default=str(EXAMPLES_PER_TASK)),
    Switch(
        "--prompt",
        "a diffusion base: a prompt to draw; may be repeated; without one, the prompts of the concepts",
        kind=list[str],
        metavar="TEXT",
    ),
    Flag("--images", "eval.images", default=str(PICTURES_PER_PROMPT)),
    *IMAGE,
    Flag("--batch-size", "eval.batch_size"),
    *MASK,
    Switch("--csv", "print CSV on stdout: task or denoising step, site, expert, weight"),
    Switch("--png", "also draw the heatmap of sites by experts or denoising steps into FILE", kind=str, metavar="FILE"),
    *SEED_AND_DEVICE,
    *SAVE,
)
TARGET = ("COMPOSITION", "The folder of a composition, or its .safetensors.")


@recipe_command("inspect-gates", target=TARGET, flags=FLAGS, model="evaluate")
def inspect_gates(request: Request) -> None:
    """Show what the gates of a composition do.

    Prints the mean weight of each expert by site and by task, the gates' entropy and dead experts; on a diffusion base
    by prompt and by denoising step. With --output also writes gates.json, gates.csv, gates.png (sites by experts, or by
    denoising steps) and entropy.png (over training).
    """
    if not request.targets:
        raise UsageError("mole inspect-gates", "no composition is named", "Name the output folder of mole compose.")
    target = request.targets[0]
    file = target if is_recipe(target) else None
    more = {} if file else _own_data(target, request)
    if request.switches["prompt"]:
        more["prompts"] = list(request.switches["prompt"])
    recipe = request.recipe(file, more=more)
    assert isinstance(recipe, EvaluateRecipe)
    if len(recipe.compositions) != 1:
        raise UsageError(target, f"it names {len(recipe.compositions)} compositions, not one", "Name the composition.")
    if "output" not in request.overrides:
        _inspect(recipe, request, save=False)
        return
    with started(recipe, request, file=file) as ready:
        _inspect(ready, request, save=True)


def _inspect(recipe: EvaluateRecipe, request: Request, *, save: bool) -> None:
    from molecli.engine.inspect import run_inspect

    report = run_inspect(recipe, progress=request.console.progress, note=request.console.note, save=save)
    if request.switches["png"]:
        report.draw(request.switches["png"])
    text = report.csv() if request.switches["csv"] else "\n".join(report.lines()) + "\n"
    request.console.result(report.document(), lambda: print(text, end=""))


def _own_data(path: str, request: Request) -> dict[str, Any]:
    """The composition, and as the data to look at what its own recipe scored, unless a suite is named."""
    import yaml

    from molecli.backbones.sources import find_base
    from molecli.engine.sample import base_of
    from molecli.files.composition import load_composition
    from molecli.files.recipe import BaseConfig

    composition = load_composition(path)
    named = request.overrides.get("base.id")
    if (
        composition.level == "site"
        and find_base(base_of(BaseConfig(id=named) if named else None, composition)).pipeline
    ):
        return {"compositions": [path], "eval.images": PICTURES_PER_PROMPT, **base_of_composition(path, request)}
    more: dict[str, Any] = {"compositions": [path], "eval.data.limit": EXAMPLES_PER_TASK}
    more |= base_of_composition(path, request)
    if "eval.data.suite" not in request.overrides:
        own = yaml.safe_load(composition.recipe)
        scored = (own.get("evaluate") or {}).get("data")
        # What the gates learned from, whole: its held-out part is no more than a part.
        data = scored or {**own["data"], "holdout": 0.0}
        more |= {f"eval.data.{key}": value for key, value in data.items() if key != "limit"}
    return more


app = single(inspect_gates)
