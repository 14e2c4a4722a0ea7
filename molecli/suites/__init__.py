"""Suites: one row each, naming the class that reads it. A new suite is one file and one row.

SUITES hold examples for language models, SCENE_SUITES scenes for diffusion bases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from molecli.errors import UsageError
from molecli.files.near import suggestion
from molecli.protocols import SceneSuite, Split, Suite

SUITES: dict[str, str] = {
    "builtin": "molecli.suites.builtin:BuiltinSuite",
    "bbh": "molecli.suites.bbh:BbhSuite",
    "nli": "molecli.suites.nli:NliSuite",
    "instruction_induction": "molecli.suites.instruction_induction:InstructionInductionSuite",
    "translation": "molecli.suites.translation:TranslationSuite",
    "struct2text": "molecli.suites.struct2text:Struct2TextSuite",
    "cbqa": "molecli.suites.cbqa:CbqaSuite",
    "jsonl": "molecli.suites.jsonl:JsonlSuite",
}
SCENE_SUITES: dict[str, str] = {
    "emoji": "molecli.suites.emoji:EmojiSuite",
    "dreambooth": "molecli.suites.dreambooth:DreamboothSuite",
    "composlora": "molecli.suites.composlora:ComposLoraSuite",
    "pictures": "molecli.suites.pictures:PicturesSuite",
}


def load_suite(name: str, *, files: Mapping[str, str] | Sequence[str] | None = None) -> Suite:
    """The suite called `name`, or several joined by `+`.

    `files` (task -> path, or paths whose stems name the tasks) is for `jsonl` alone.

    Raises: UsageError for an unknown suite, or for files given to another suite.
    """
    if "+" in name:
        from molecli.suites.union import UnionSuite

        return UnionSuite([load_suite(part) for part in name.split("+")])
    if name in SCENE_SUITES:
        what = f"the suite {name!r} has scenes to draw, and the base is a language model"
        raise UsageError("--suite", what, f"Write one of: {', '.join(SUITES)}.")
    if name not in SUITES:
        raise UsageError("--suite", f"no suite is called {name!r}", suggestion(name, SUITES))
    make = _class(SUITES[name])
    if name == "jsonl":
        return make(files)
    if files:
        raise UsageError("data.files", f"the suite {name!r} has its own files", "Write suite: jsonl to read yours.")
    return make()


def load_scene_suite(
    name: str,
    *,
    files: Mapping[str, str] | Sequence[str] | None = None,
    scenes: Sequence[Any] = (),
    split: Split = "test",
) -> SceneSuite:
    """The suite of scenes called `name`; `files` is for `pictures` alone, `scenes` (of a recipe) for `dreambooth`,
    `split` for `emoji`.

    Raises: UsageError for an unknown suite or one for language models, and for what the suite does not read.
    """
    if name not in SCENE_SUITES:
        known = all(part in SUITES for part in name.split("+"))
        what = f"the suite {name!r} has texts, and the base draws pictures" if known else f"no suite is called {name!r}"
        remedy = f"Write one of: {', '.join(SCENE_SUITES)}." if known else suggestion(name, SCENE_SUITES)
        raise UsageError("--suite", what, remedy)
    make = _class(SCENE_SUITES[name])
    if files and name != "pictures":
        raise UsageError("data.files", f"the suite {name!r} has its own files", "Write suite: pictures to read yours.")
    if scenes and name != "dreambooth":
        raise UsageError("data.scenes", f"the suite {name!r} has its own scenes", "Write suite: dreambooth.")
    if split != "test" and name != "emoji":
        raise UsageError("data.split", f"the suite {name!r} has the split test alone", "Leave it out.")
    given = {"pictures": (files,), "dreambooth": (scenes,), "emoji": (split,)}
    suite: SceneSuite = make(*given.get(name, ()))
    return suite


def _class(row: str) -> Any:
    module, attribute = row.split(":")
    return getattr(import_module(module), attribute)


def select_tasks(suite: Suite, wanted: Sequence[str] | None, data_dir: str | None) -> list[str]:
    """The tasks named in `wanted`, in that order, or all that the suite has there.

    Raises: UsageError for a task that the suite lacks, whose file is missing, or where there is none at all.
    """
    there, known = suite.tasks(data_dir), suite.known(data_dir)
    missing = [task for task in dict.fromkeys(wanted or ()) if task in known and task not in there]
    if missing:
        raise _not_there(suite, missing, data_dir)
    if not there and known:
        what = f"no task of the suite {suite.name!r} is there, and these files are missing"
        raise UsageError(str(data_dir), f"{what}: {_files(suite, known, str(data_dir))}", "Check --data-dir.")
    return selected(suite.name, there, wanted, data_dir)


def _not_there(suite: Suite, tasks: Sequence[str], data_dir: str | None) -> UsageError:
    """The error for tasks without examples at hand: it names the file of each."""
    if data_dir is None:
        what = f"the task {tasks[0]!r} is not on the hub"
        return UsageError(f"suite {suite.name}", what, "Give its files: --data-dir.")
    if len(tasks) == 1:
        source = suite.source(tasks[0], "test", data_dir)
        file = "" if source is None else source.place
        return UsageError(file, f"no such file, and the task {tasks[0]!r} is read from it", "Check --data-dir.")
    what = f"these files are missing, which the tasks {', '.join(map(repr, tasks))} are read from"
    return UsageError(data_dir, f"{what}: {_files(suite, tasks, data_dir)}", "Check --data-dir.")


def _files(suite: Suite, tasks: Sequence[str], data_dir: str) -> str:
    """The file of each task, as it would be called inside `data_dir`."""
    sources = (suite.source(task, "test", data_dir) for task in tasks)
    return ", ".join(str(Path(source.place).relative_to(data_dir)) for source in sources if source is not None)


def selected(suite: str, known: Sequence[str], wanted: Sequence[str] | None, data_dir: str | None) -> list[str]:
    """Those of the tasks `known` that are `wanted`, in that order and once; all where none is named.

    Raises: UsageError as `select_tasks` does.
    """
    if not known:
        raise UsageError(str(data_dir), f"no task of the suite {suite!r} is there", "Check --data-dir.")
    for task in wanted or ():
        if task not in known:
            raise UsageError(f"suite {suite}", f"no task is called {task!r}", suggestion(task, known))
    return list(dict.fromkeys(wanted)) if wanted else list(known)
