"""A study's jobs run in the test's own process: as processes of their own they cost seconds each."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from molecli.commands.compose import run_compose
from molecli.commands.evaluate import run_evaluate
from molecli.commands.inspect_gates import run_inspect
from molecli.commands.train_lora import run_train_lora
from molecli.config import load_recipe
from molecli.errors import UsageError
from molecli.files.atomic import write_text
from molecli.study import run as study
from molecli.study import scheduler as study_work
from molecli.study.jobs import Job

_RUNS: dict[str, Any] = {
    "train-lora": run_train_lora,
    "compose": run_compose,
    "evaluate": run_evaluate,
    "inspect-gates": partial(run_inspect, save=True),
}


def run_here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """From here on jobs run in this process; the names of those that ran, in order."""
    made: list[str] = []

    def called(job: Job, folder: Path, environment: dict[str, str]) -> str:
        made.append(job.name)
        record = write_text(folder / f"{job.name}.yaml", job.text)
        try:
            _RUNS[job.command](load_recipe(record))
        except UsageError as error:
            return str(error)
        write_text(study_work.mark_of(folder, job), job.digest + "\n")
        return ""

    monkeypatch.setattr(study_work, "called", called)
    monkeypatch.setattr(study, "prepare", lambda: None)
    return made
