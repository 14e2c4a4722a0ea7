"""`mole inspect-gates`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from molecli.catalog.suites import OWN_TEXTS
from molecli.cli.options import BASE, IMAGE, LORAS, MASK, SAVE, SEED_AND_DEVICE, Flag, Request, Toggle, recipe_command
from molecli.cli.runs import base_of_composition, base_of_recipe, is_recipe, started
from molecli.cli.single import single
from molecli.config import BaseConfig, InspectGatesRecipe
from molecli.errors import UsageError

if TYPE_CHECKING:
    from molecli.commands.domain import Domain

FLAGS = (
    *BASE,
    *LORAS,
    Flag("--suite", "data.suite", "by default the data that the composition was scored on", default=""),
    Flag("--data-dir", "data.data_dir", metavar="DIR"),
    Flag("--files", "data.files", f"separated by commas; implies --suite {OWN_TEXTS}", metavar="FILES"),
    Flag("--tasks", "data.tasks", metavar="TASKS"),
    Flag("--split", "data.split"),
    Flag("--holdout", "data.holdout"),
    Flag("--limit", "data.limit"),
    Toggle(
        "--prompt",
        "images: a prompt to draw; may be repeated; by default the prompts of the concepts",
        kind=list[str],
        metavar="TEXT",
    ),
    Flag("--images", "images"),
    *IMAGE,
    Flag("--batch-size", "batch_size"),
    *MASK,
    Toggle("--csv", "print CSV on stdout: task or denoising step, site, expert, weight"),
    Toggle("--png", "also draw the heatmap of sites by experts or denoising steps to FILE", kind=str, metavar="FILE"),
    *SEED_AND_DEVICE,
    *SAVE,
)
TARGET = ("COMPOSITION", "A composition: a folder or a .safetensors file.")


@recipe_command("inspect-gates", target=TARGET, flags=FLAGS)
def inspect_gates(request: Request) -> None:
    """Show what the gates of a composition do.

    Prints the mean weight of each expert by site and by task (on a diffusion base by prompt and by denoising step), the
    entropy of the gates, and dead experts: those with less than a tenth of an equal share. With --output also writes
    gates.json, gates.csv, gates.png (sites by experts or by denoising steps) and entropy.png (entropy in training).
    """
    if not request.targets:
        raise UsageError("mole inspect-gates", "no composition is named", "Name the output folder of mole compose.")
    from molecli.commands.domain import domain_of
    from molecli.commands.inspect_gates import check_gates, defaults_for
    from molecli.files.composition import load_composition
    from molecli.mixture.attach import base_of

    target = request.targets[0]
    file = target if is_recipe(target) else None
    more: dict[str, Any] = {"prompts": list(request.switches["prompt"])} if request.switches["prompt"] else {}
    domain = None
    more |= base_of_recipe(file, request)
    if file is None:
        composition, named = load_composition(target), request.overrides.get("base.id")
        check_gates(target, composition)
        domain = domain_of(base_of(BaseConfig(id=named) if named else None, composition))
        more |= _unless_named(defaults_for(target, composition, domain), request)
        more |= base_of_composition(target, request)
    recipe = request.recipe(file, more=more)
    assert isinstance(recipe, InspectGatesRecipe)
    if recipe.composition is None:
        raise UsageError(target, "it names no composition", "Write composition: DIR.")
    if "output" not in request.overrides:
        _inspect(recipe, request, domain, save=False)
        return
    with started(recipe, request, file=file, domain=domain) as ready:
        _inspect(ready, request, domain, save=True)


def _inspect(recipe: InspectGatesRecipe, request: Request, domain: Domain | None, *, save: bool) -> None:
    from molecli.commands.inspect_gates import run_inspect

    console = request.console
    report = run_inspect(recipe, domain=domain, progress=console.progress, note=console.note, save=save)
    if request.switches["png"]:
        report.draw(request.switches["png"])
    text = report.csv() if request.switches["csv"] else "\n".join(report.lines()) + "\n"
    console.result(report.document(), lambda: print(text, end=""))


def _unless_named(defaults: dict[str, Any], request: Request) -> dict[str, Any]:
    """The defaults, without the composition's data if a suite is named."""
    own = "data.suite" not in request.overrides
    return {key: value for key, value in defaults.items() if own or not key.startswith("data.")}


app = single(inspect_gates)
