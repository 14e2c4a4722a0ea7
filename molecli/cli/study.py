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
    Flag("--limit", "test.data.limit"),
    Toggle("--column", "run what this column needs, no more; may be repeated", kind=list[str], metavar="NAME"),
    Toggle("--jobs", "commands side by side; by default four a GPU, one without any", kind=int, metavar="N"),
    *SEED_AND_DEVICE,
    *OUTPUT,
    RESUME,
    DRY_RUN,
)


@recipe_command("study", target=RECIPE, flags=FLAGS)
def study(request: Request) -> None:
    """Compare methods: train LoRAs, compose them by every method, score all side by side.

    Each step is a mole command of its own, with its recipe and log in study-steps/ of the output folder; --resume does
    what is not done yet and what failed. Columns may be run apart, on several machines too: put their study-steps
    together in one folder, and --resume there reports on all. Writes study.md, study.json, where the number of LoRAs
    varies study.png, and where gates are looked at entropy.png.
    """
    file = recipe_file(request)
    if file is None:
        raise UsageError("study", "no recipe is named", "Name one; `mole recipe ls` lists those that ship.")
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
        what = f"{len(report.failed)} commands failed, and what needs them is not in the report"
        raise RunError(ready.output, what, "Their logs lie in study-steps/; --resume runs them again.")


def _at_once() -> int:
    import torch

    return max(1, 4 * torch.cuda.device_count())


app = single(study)
