"""Loads the suites in `catalog.suites`: examples for language models, scenes for diffusion bases.

Contents: load_suite, load_scene_suite, select_tasks, selected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from molecli.catalog.suites import SUITES, SuiteRow, suite_row, takers
from molecli.errors import UsageError, suggestion
from molecli.protocols import SceneSuite, Split, Suite
from molecli.suites.union import UnionSuite

Files = Mapping[str, str] | Sequence[str]


def load_suite(name: str, *, files: Files | None = None) -> Suite:
    """The suite called `name`, or several joined by `+`.

    `files` (task -> path, or paths whose stems name the tasks) is for a suite that reads the user's own files.

    Raises: UsageError for an unknown suite, or for files given to a suite with its own files.
    """
    if "+" in name:
        return UnionSuite([load_suite(part) for part in name.split("+")])
    row = suite_row(name, "texts")
    _check_files(row, files)
    suite: Suite = row.load(files=files)
    return suite


def load_scene_suite(
    name: str, *, files: Files | None = None, scenes: Sequence[Any] = (), split: Split = "test"
) -> SceneSuite:
    """The suite of scenes called `name`. Its row names the keywords that it accepts: `files`, `scenes`, `split`.

    Raises: UsageError for an unknown suite or one for language models, and for keywords that it does not accept.
    """
    if "+" in name and all(part in SUITES for part in name.split("+")):
        suite_row(name.partition("+")[0], "scenes")
    row = suite_row(name, "scenes")
    _check_files(row, files)
    if scenes and "scenes" not in row.given:
        remedy = f"Write suite: {takers('scenes', row.holds)}."
        raise UsageError("data.scenes", f"the suite {name!r} has its own scenes", remedy)
    if split != "test" and "split" not in row.given:
        raise UsageError("data.split", f"the suite {name!r} has only the split test", "Leave it out.")
    suite: SceneSuite = row.load(files=files, scenes=scenes, split=split)
    return suite


def _check_files(row: SuiteRow, files: Files | None) -> None:
    if files and "files" not in row.given:
        remedy = f"Write suite: {takers('files', row.holds)} to read yours."
        raise UsageError("data.files", f"the suite {row.name!r} has its own files", remedy)


def select_tasks(suite: Suite, wanted: Sequence[str] | None, data_dir: str | None) -> list[str]:
    """The tasks in `wanted`, in that order, or all available tasks.

    Raises: UsageError for a task that the suite lacks or whose file is missing, and if there is no task at all.
    """
    there, known = suite.tasks(data_dir), suite.known(data_dir)
    missing = [task for task in dict.fromkeys(wanted or ()) if task in known and task not in there]
    if missing:
        raise _not_there(suite, missing, data_dir)
    if not there and known:
        what = f"there is no task of the suite {suite.name!r}; these files are missing"
        raise UsageError(str(data_dir), f"{what}: {_files(suite, known, str(data_dir))}", "Check --data-dir.")
    return selected(suite.name, there, wanted, data_dir)


def _not_there(suite: Suite, tasks: Sequence[str], data_dir: str | None) -> UsageError:
    """The error for tasks whose examples are missing: it names the file of each."""
    if data_dir is None:
        what = f"the task {tasks[0]!r} is not on the hub"
        return UsageError(f"suite {suite.name}", what, "Give its files: --data-dir.")
    if len(tasks) == 1:
        source = suite.source(tasks[0], "test", data_dir)
        file = "" if source is None else source.place
        return UsageError(file, f"no such file, and the task {tasks[0]!r} needs it", "Check --data-dir.")
    what = f"these files of the tasks {', '.join(map(repr, tasks))} are missing"
    return UsageError(data_dir, f"{what}: {_files(suite, tasks, data_dir)}", "Check --data-dir.")


def _files(suite: Suite, tasks: Sequence[str], data_dir: str) -> str:
    """The expected file of each task, relative to `data_dir`."""
    sources = (suite.source(task, "test", data_dir) for task in tasks)
    return ", ".join(str(Path(source.place).relative_to(data_dir)) for source in sources if source is not None)


def selected(suite: str, known: Sequence[str], wanted: Sequence[str] | None, data_dir: str | None) -> list[str]:
    """The `wanted` tasks among `known`, in that order and without repeats; all if none is named.

    Raises: UsageError as `select_tasks` does.
    """
    if not known:
        raise UsageError(str(data_dir), f"there is no task of the suite {suite!r}", "Check --data-dir.")
    for task in wanted or ():
        if task not in known:
            raise UsageError(f"suite {suite}", f"no task is called {task!r}", suggestion(task, known))
    return list(dict.fromkeys(wanted)) if wanted else list(known)
