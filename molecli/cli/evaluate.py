"""`mole evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from molecli.catalog.suites import OWN_SCENES, OWN_TEXTS
from molecli.cli.options import (
    BASE,
    DRY_RUN,
    IMAGE,
    LORAS,
    MASKS,
    METHOD,
    OUTPUT,
    SEED_AND_DEVICE,
    Flag,
    Request,
    Toggle,
    recipe_command,
)
from molecli.cli.runs import base_of_composition, base_of_recipe, is_recipe, recipe_file, show_plan, started
from molecli.cli.single import single
from molecli.config import EvaluateRecipe, dump_recipe
from molecli.errors import UsageError
from molecli.files.atomic import write_text
from molecli.files.output_folder import RECIPE_FILE, check, claim

FLAGS = (
    *BASE,
    *LORAS,
    Flag("--modes", "modes", metavar="MODES"),
    Flag("--suite", "eval.data.suite"),
    Flag("--data-dir", "eval.data.data_dir", metavar="DIR"),
    Flag(
        "--files",
        "eval.data.files",
        f"separated by commas; implies --suite {OWN_TEXTS} (images: {OWN_SCENES})",
        metavar="FILES",
    ),
    Flag("--tasks", "eval.data.tasks", metavar="TASKS"),
    Flag("--split", "eval.data.split"),
    Flag("--holdout", "eval.data.holdout"),
    Flag("--limit", "eval.data.limit"),
    Flag("--metrics", "eval.metrics", metavar="METRICS"),
    Flag("--batch-size", "eval.batch_size"),
    Flag("--max-new-tokens", "eval.max_new_tokens"),
    Flag("--bootstrap", "eval.bootstrap"),
    Flag("--images", "eval.images"),
    *IMAGE,
    *METHOD,
    Flag("--clip-model", "eval.clip.model", metavar="MODEL"),
    Flag("--clip-pretrained", "eval.clip.pretrained", metavar="TAG|FILE"),
    Flag("--judge-endpoint", "judge.endpoint", "any --judge flag turns the judge on", metavar="URL"),
    Flag("--judge-model", "judge.model", metavar="MODEL"),
    Flag("--judge-baseline", "judge.baseline", metavar="METHOD"),
    *MASKS,
    *SEED_AND_DEVICE,
    *OUTPUT,
    Toggle("--resume", "images: draw and judge only what is missing in the output folder of an earlier run"),
    Toggle("--compare", "score nothing; compare the methods in the RESULTS folders of finished evaluations"),
    DRY_RUN,
)
COMPARE_FLAGS = ("--tasks", "--metrics", "--bootstrap", "--seed", "--output")
TARGET = (
    "RECIPE | COMPOSITION | RESULTS",
    "One recipe (.yaml), or compositions: folders or .safetensors files. With --compare, folders of results: each PATH "
    "for all its methods, or NAME=PATH for its last method, under that name.",
)


@recipe_command("evaluate", target=TARGET, many=True, flags=FLAGS)
def evaluate(request: Request) -> None:
    """Score compositions on a suite of tasks or scenes.

    Writes results.json and samples_<task>.jsonl. On a diffusion base, every method draws each scene from the same
    seeds: the pictures are in drawn/, and sheet.png shows some of them.

    --mask a --mask b,c --mask "" scores every mixture and composition three times: without a, without b and c, and with
    all LoRAs. The columns are named accordingly. With --mask and --only, each mask is combined with each only.

    --compare reads finished results. It prints a table of all their methods, the best method of each task and on
    average, and whether its lead over each other method is significant (paired bootstrap over the same examples).
    Results of methods with the same name are repetitions; results of the same methods on other tasks are joined.
    --tasks, --metrics, --bootstrap and --seed apply. With --output it also writes comparison.json and comparison.md.
    """
    if request.switches["compare"]:
        _compare(request)
        return
    file, more = _file_and_compositions(request)
    recipe = request.recipe(file, more=more)
    assert isinstance(recipe, EvaluateRecipe)
    from molecli.commands.evaluate import domain_for, read_compositions, run_evaluate

    domain, console = domain_for(recipe, read_compositions(recipe)), request.console
    if request.switches["dry_run"]:
        show_plan(recipe, request, file=file, domain=domain)
        return
    if request.resume and not domain.command("evaluate").RESUMES:
        what = "an evaluation of a language model cannot be resumed"
        raise UsageError("--resume", what, "Write --overwrite to repeat it.")
    with started(recipe, request, file=file, domain=domain) as ready:
        if request.resume:  # it may ask for more pictures than the earlier run
            write_text(Path(ready.output) / RECIPE_FILE, dump_recipe(ready))
        report = run_evaluate(ready, domain=domain, progress=console.progress, note=console.note)
    request.console.result(report, report.show)


def _compare(request: Request) -> None:
    """The comparison of finished evaluations. Raises: UsageError, MismatchError."""
    from molecli.evaluation.compare import run_compare

    _check_compare_flags(request)
    recipe = request.recipe(None)
    assert isinstance(recipe, EvaluateRecipe)
    folder = str(recipe.output) if "output" in request.overrides else None
    overwrite = bool(request.switches["overwrite"])
    if folder is not None:
        check(folder, overwrite=overwrite, resumable=False)
    settings = recipe.eval
    report = run_compare(
        request.targets,
        tasks=settings.data.tasks,
        metrics=settings.metrics,
        samples=settings.bootstrap,
        seed=recipe.seed,
    )
    if folder is not None:
        report.write(claim(folder, overwrite=overwrite, resumable=False))
        request.console.note(f"Written: {folder}")
    request.console.result(report.document(), report.show)


def _check_compare_flags(request: Request) -> None:
    keys = {flag.key: flag.name for flag in FLAGS if isinstance(flag, Flag)}
    given = [keys[key] for key in request.overrides]
    given += [f"--{name.replace('_', '-')}" for name in ("resume", "dry_run") if request.switches[name]]
    given += ["--set"] * bool(request.sets)
    for name in given:
        if name not in COMPARE_FLAGS:
            remedy = f"Leave it out: {', '.join(COMPARE_FLAGS)} apply."
            raise UsageError(name, "it has no effect with --compare, which evaluates nothing", remedy)


def _file_and_compositions(request: Request) -> tuple[str | None, dict[str, Any]]:
    """The named (or resumed) recipe, or else the recipe keys for the named compositions."""
    targets = request.targets
    recipes = [target for target in targets if is_recipe(target)]
    if not targets:
        file = recipe_file(request)
        return file, base_of_recipe(file, request)
    if not recipes:
        return None, {"compositions": list(targets), **base_of_composition(targets[0], request)}
    if len(targets) > 1:
        raise UsageError(
            recipes[0], "a recipe cannot be combined with other arguments", "Name one recipe, or only compositions."
        )
    return recipes[0], base_of_recipe(recipes[0], request)


app = single(evaluate)
