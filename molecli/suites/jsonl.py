"""JSONL files of {"input", "target"}: one file is one task, and the input is the whole prompt.

`output` is read if `target` is missing; `references` (a list) adds further right answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from molecli.catalog.suites import SUITES
from molecli.errors import UsageError
from molecli.protocols import Example, Source, Split
from molecli.suites._rows import Row, read_rows, task_files


class JsonlSuite:
    """The given files, or those in `data_dir`: <split>/<task>.jsonl, else <task>.jsonl for both splits."""

    name = "jsonl"
    version = "1"

    def __init__(self, files: Mapping[str, str] | Sequence[str] | None = None) -> None:
        self.files = by_task(files or {})
        # stdin can be read only once, but a suite is read several times.
        self._read: dict[str, list[Example]] = {}

    def tasks(self, data_dir: str | None = None) -> list[str]:
        """The tasks of the files. Raises: UsageError if neither files nor a folder are given."""
        if self.files:
            return list(self.files)
        if data_dir is None:
            raise UsageError("suite jsonl", "no files were given", "Write data.files or --data-dir.")
        folders = [Path(data_dir), *(path for path in (Path(data_dir, s) for s in ("train", "test")) if path.is_dir())]
        return sorted({stem for folder in folders for stem in task_files(folder)})

    def known(self, data_dir: str | None = None) -> list[str]:
        """The same as `tasks`: the files determine them."""
        return self.tasks(data_dir)

    def source(self, task: str, split: Split, data_dir: str | None = None) -> Source:
        """The task's file."""
        return Source(str(self._path(task, split, data_dir)))

    def load(self, task: str, split: Split, data_dir: str | None = None) -> list[Example]:
        """The examples of one task. Raises: UsageError that names the unusable file and line."""
        path = str(self._path(task, split, data_dir))
        if path not in self._read:
            self._read[path] = [example(task, row) for row in read_rows(path)]
        return list(self._read[path])

    def metrics(self, task: str) -> tuple[str, ...]:
        """Exact match; ask for others by name."""
        return SUITES[self.name].metrics

    def max_new_tokens(self, task: str) -> int:
        """Room for a sentence or two; `max_new_tokens` in the recipe changes it."""
        return 64

    def _path(self, task: str, split: Split, data_dir: str | None) -> str | Path:
        if self.files:
            return self.files[task]
        of_split = Path(data_dir or ".", split, f"{task}.jsonl")
        return of_split if of_split.is_file() else Path(data_dir or ".", f"{task}.jsonl")


def example(task: str, row: Row) -> Example:
    """One line as an example. Raises: UsageError if `input` or `target` is missing or not text."""
    target = row.text("output") if "output" in row.fields and "target" not in row.fields else row.text("target")
    references = row.texts("references")
    return Example(task, row.text("input"), target, tuple(dict.fromkeys((target, *references))) if references else ())


def by_task(files: Mapping[str, str] | Sequence[str]) -> dict[str, str]:
    """Task -> file: as named, else by the stems of the files. Raises: UsageError for two files of one task."""
    if isinstance(files, Mapping):
        # A recipe names each file by its stem, and "-" is not a name for a task.
        return {"stdin" if task == "-" else task: file for task, file in files.items()}
    named: dict[str, str] = {}
    for file in files:
        task = "stdin" if file == "-" else Path(file).stem
        if task in named:
            raise UsageError(file, f"two files would both be the task {task!r}", "Write data.files as task: file.")
        named[task] = file
    return named
