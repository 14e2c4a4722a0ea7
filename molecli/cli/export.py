"""`mole export`."""

from __future__ import annotations

from molecli.cli.options import (
    DRY_RUN,
    IMAGE,
    LORAS,
    MASK,
    OUTPUT,
    SEED_AND_DEVICE,
    Flag,
    Request,
    Toggle,
    recipe_command,
)
from molecli.cli.prompts import read_prompts
from molecli.cli.runs import base_of_composition, base_of_recipe, is_recipe, show_plan, started
from molecli.cli.single import single
from molecli.config import ExportRecipe
from molecli.errors import UsageError

FLAGS = (
    Flag("--format", "format"),
    Flag("--rank", "rank", metavar="K|exact", default="exact"),
    Flag("--dtype", "dtype"),
    Flag("--verify", "verify"),
    Flag("--calibrate", "calibration.examples", "separated by commas", metavar="FILES"),
    Toggle("--prompt", "images: a prompt to draw for calibration; may be repeated", kind=list[str], metavar="TEXT"),
    Toggle("--prompts-file", "images: such prompts, one per line, or .jsonl; - reads stdin", kind=str, metavar="FILE"),
    Flag("--data-dir", "calibration.data_dir", metavar="DIR"),
    Flag("--limit", "calibration.limit"),
    Flag("--batch-size", "calibration.batch_size"),
    *IMAGE,
    *MASK,
    *LORAS,
    Flag("--base", "base.id", metavar="BASE"),
    Flag("--gguf-file", "base.gguf_file", metavar="NAME"),
    *SEED_AND_DEVICE,
    *OUTPUT,
    DRY_RUN,
)
TARGET = ("RECIPE | COMPOSITION", "A recipe (.yaml), or a composition: a folder or a .safetensors file.")


@recipe_command("export", target=TARGET, flags=FLAGS)
def export(request: Request) -> None:
    """Write a composition as one plain adapter that PEFT, diffusers or A1111/ComfyUI can load.

    Fixed compositions are exported exactly, or truncated to --rank K. Gates are averaged over calibration inputs.
    Writes the adapter, recipe.yaml and report.json, which has the errors of truncating and of averaging.
    """
    if not request.targets:
        raise UsageError("mole export", "no composition is named", "Name the output folder of mole compose.")
    target = request.targets[0]
    file = target if is_recipe(target) else None
    more = base_of_recipe(file, request)
    if file is None:
        more |= {"composition": target, **base_of_composition(target, request)}
    prompts = _prompts(request)
    if prompts:
        more["calibration.prompts"] = prompts
    recipe = request.recipe(file, more=more)
    assert isinstance(recipe, ExportRecipe)
    if recipe.composition is None:
        raise UsageError(str(file), "it names no composition", "Write composition: DIR.")
    from molecli.commands.export import domain_for, run_export

    domain, console = domain_for(recipe), request.console
    if request.switches["dry_run"]:
        show_plan(recipe, request, file=file, domain=domain)
        return
    with started(recipe, request, file=file, domain=domain) as ready:
        report = run_export(ready, domain=domain, progress=console.progress, note=console.note)
    request.console.result(report, report.show)


def _prompts(request: Request) -> list[str]:
    given = list(request.switches["prompt"] or [])
    source = request.switches["prompts_file"]
    return given + (read_prompts(source) if source else [])


app = single(export)
