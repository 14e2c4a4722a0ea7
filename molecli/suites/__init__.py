"""Suites: one row each, naming the class that reads it. A new suite is one file and one row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module

from molecli.errors import UsageError
from molecli.files.near import suggestion
from molecli.protocols import Suite

SUITES: dict[str, str] = {
    "builtin": "molecli.suites.builtin:BuiltinSuite",
    "bbh": "molecli.suites.bbh:BbhSuite",
    "nli": "molecli.suites.nli:NliSuite",
    "instruction_induction": "molecli.suites.instruction_induction:InstructionInductionSuite",
    "jsonl": "molecli.suites.jsonl:JsonlSuite",
}


def load_suite(name: str, *, files: Mapping[str, str] | Sequence[str] | None = None) -> Suite:
    """The suite called `name`, or several joined by `+`.

    `files` (task -> path, or paths whose stems name the tasks) is for `jsonl` alone.

    Raises: UsageError for an unknown suite, or for files given to another suite.
    """
    if "+" in name:
        from molecli.suites.union import UnionSuite

        return UnionSuite([load_suite(part) for part in name.split("+")])
    if name not in SUITES:
        raise UsageError("--suite", f"no suite is called {name!r}", suggestion(name, SUITES))
    module, attribute = SUITES[name].split(":")
    make = getattr(import_module(module), attribute)
    if name == "jsonl":
        return make(files)
    if files:
        raise UsageError("data.files", f"the suite {name!r} has its own files", "Write suite: jsonl to read yours.")
    return make()


def select_tasks(suite: Suite, wanted: Sequence[str] | None, data_dir: str | None) -> list[str]:
    """The tasks named in `wanted`, in that order, or all that the suite has there.

    Raises: UsageError for a task that the suite lacks, or where there is none at all.
    """
    known = suite.tasks(data_dir)
    if not known:
        raise UsageError(str(data_dir), f"no task of the suite {suite.name!r} is there", "Check --data-dir.")
    for task in wanted or ():
        if task not in known:
            raise UsageError(f"suite {suite.name}", f"no task is called {task!r}", suggestion(task, known))
    return list(dict.fromkeys(wanted)) if wanted else known
