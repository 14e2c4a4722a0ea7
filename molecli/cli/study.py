"""`mole study`."""

from __future__ import annotations

from molecli.cli.options import (
    BASE,
    DRY_RUN,
    OUTPUT,
    RECIPE,
    RESUME,
    SEED_AND_DEVICE,
    Flag,
    Request,
    Toggle,
    recipe_command,
)
from molecli.cli.runs import output_folder, recipe_file, started
from molecli.cli.single import single
from molecli.config import StudyRecipe
from molecli.errors import RunError, UsageError

FLAGS = (
    *BASE,
    Flag("--data-dir", "data_dir", metavar="DIR"),
    Flag("--limit", "test.data.limit", "for the scores"),
    Toggle("--column", "run only what this column needs; may be repeated", kind=list[str], metavar="NAME"),
    Toggle("--jobs", "commands at once; by default four per GPU, one without a GPU", kind=int, metavar="N"),
    *SEED_AND_DEVICE,
    *OUTPUT,
    RESUME,
    DRY_RUN,
)


@recipe_command("study", target=RECIPE, flags=FLAGS)
def study(request: Request) -> None:
    """Compare methods: train LoRAs, compose them with each method, and score them all.

    Each step is a separate mole command, with its recipe and log in study-steps/ of the output folder. --resume runs
    missing and failed steps. Columns can be run separately, even on several machines: collect their study-steps in one
    folder and run --resume there for the whole report. Writes study.md and study.json; also study.png if the number of
    LoRAs varies, and entropy.png if gates are reported.
    """
    file = recipe_file(request)
    if file is None:
        raise UsageError("study", "no recipe is named", "Name one; `mole recipe ls` lists the shipped ones.")
    recipe = request.recipe(file)
    assert isinstance(recipe, StudyRecipe)
    from molecli.study.jobs import PHASES, chosen_jobs
    from molecli.study.run import check_columns, jobs_of, run_study

    columns = request.switches["column"] or []
    check_columns(recipe, columns)
    if request.switches["dry_run"]:
        placed = recipe.model_copy(update={"output": output_folder(recipe, request, file)})
        jobs = chosen_jobs(jobs_of(placed), columns)
        document = [{"phase": job.phase, "name": job.name, "recipe": job.tree} for job in jobs]
        by_phase = {phase: sum(job.phase == phase for job in jobs) for phase in PHASES}
        counts = ", ".join(f"{count} {phase}" for phase, count in by_phase.items() if count)
        lines = [f"{len(jobs)} commands: {counts}", *(f"mole {job.command:13} {job.name}" for job in jobs)]
        request.console.result(document, lambda: print("\n".join(lines)))
        return
    with started(recipe, request, file=file) as ready:
        console = request.console
        at_once = request.switches["jobs"] or _at_once()
        report = run_study(ready, at_once=at_once, columns=columns, progress=console.progress, note=console.note)
    request.console.result(report.document(), report.show)
    if report.failed:
        what = f"{len(report.failed)} commands failed, and the report lacks the results that depend on them"
        raise RunError(ready.output, what, "Read their logs in study-steps/; --resume runs them again.")


def _at_once() -> int:
    import torch

    return max(1, 4 * torch.cuda.device_count())


app = single(study)
