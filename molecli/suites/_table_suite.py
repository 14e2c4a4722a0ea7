"""The base class of suites whose tasks are tables: files in a folder, or datasets on the hub."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from molecli.protocols import Example, Source, Split
from molecli.suites._hub import HubSet
from molecli.suites._rows import Row, half_of, in_order, read_rows, task_files


class TabledSuite(ABC):
    """The tasks of `hubs` from `data_dir` or the hub; a suite adds how rows become questions and examples."""

    hubs: ClassVar[Mapping[str, HubSet]]

    @abstractmethod
    def question(self, task: str, row: Row) -> str:
        """The text by which a single file is divided into train and test. Raises: UsageError for an unreadable row."""

    @abstractmethod
    def example(self, task: str, row: Row) -> Example:
        """The row as an example. Raises: UsageError for an unreadable row."""

    def tasks(self, data_dir: str | None = None) -> list[str]:
        """The tasks whose files are in `data_dir`; all on the hub."""
        return list(self.hubs) if data_dir is None else local_tasks(list(self.hubs), data_dir)

    def known(self, data_dir: str | None = None) -> list[str]:
        """All tasks."""
        return list(self.hubs)

    def source(self, task: str, split: Split, data_dir: str | None = None) -> Source:
        """The file of the split, or the single file; else the table on the hub."""
        if data_dir is None:
            return self.hubs[task].source(split)
        return Source(str(local_file(task, split, data_dir)))

    def load(self, task: str, split: Split, data_dir: str | None = None) -> list[Example]:
        """The examples of one task. Raises: UsageError for bad files, RunError if the hub is not reached."""
        if data_dir is None:
            rows = self.hubs[task].rows(split)
        else:
            rows = local_rows(task, split, data_dir, lambda row: self.question(task, row))
        return [self.example(task, row) for row in rows]


SPLITS: tuple[Split, ...] = ("train", "test")


def local_tasks(names: Sequence[str], data_dir: str) -> list[str]:
    """The tasks in `names` with a file in `data_dir`. Raises: UsageError if there is no such folder."""
    found = set(task_files(data_dir))
    for split in SPLITS:
        if Path(data_dir, split).is_dir():
            found |= set(task_files(Path(data_dir, split)))
    return in_order(names, found)


def local_file(task: str, split: Split, data_dir: str) -> Path:
    """The file of a split of a task: that of the split, or a single file for both."""
    of_split = [Path(data_dir, name, f"{task}.jsonl") for name in (split, *SPLITS)]
    lone = Path(data_dir, f"{task}.jsonl")
    # If there is a file for one split only, the other is missing: a single file could repeat its rows.
    return of_split[0] if any(path.is_file() for path in of_split) or not lone.is_file() else lone


def local_rows(task: str, split: Split, data_dir: str, asked: Callable[[Row], str]) -> list[Row]:
    """The rows of one split; a single file is halved by the text `asked`. Raises: UsageError as `read_rows` does."""
    path = local_file(task, split, data_dir)
    rows = read_rows(path)
    if path != Path(data_dir, f"{task}.jsonl"):
        return rows
    return [row for row in rows if half_of(asked(row)) == split]
