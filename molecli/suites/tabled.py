"""What suites share whose tasks are tables: of files in a folder, or of a set on the hub."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from molecli.protocols import Example, Source, Split
from molecli.suites.lines import Row
from molecli.suites.local import local_file, local_rows, local_tasks
from molecli.suites.online import HubSet


class TabledSuite(ABC):
    """The tasks of `hubs` from `data_dir` or the hub; a suite adds what a row asks and what it gives."""

    hubs: ClassVar[Mapping[str, HubSet]]

    @abstractmethod
    def question(self, task: str, row: Row) -> str:
        """What a lone file is divided by into train and test. Raises: UsageError for a row that cannot be read."""

    @abstractmethod
    def example(self, task: str, row: Row) -> Example:
        """The row as an example. Raises: UsageError for a row that cannot be read."""

    def tasks(self, data_dir: str | None = None) -> list[str]:
        """The tasks whose files are in `data_dir`; all on the hub."""
        return list(self.hubs) if data_dir is None else local_tasks(list(self.hubs), data_dir)

    def known(self, data_dir: str | None = None) -> list[str]:
        """All tasks."""
        return list(self.hubs)

    def source(self, task: str, split: Split, data_dir: str | None = None) -> Source:
        """The split's file or the lone one; else the hub's table."""
        if data_dir is None:
            return self.hubs[task].source(split)
        return Source(str(local_file(task, split, data_dir)))

    def load(self, task: str, split: Split, data_dir: str | None = None) -> list[Example]:
        """The examples of one task. Raises: UsageError for bad files, RunError where the hub is out of reach."""
        if data_dir is None:
            rows = self.hubs[task].rows(split)
        else:
            rows = local_rows(task, split, data_dir, lambda row: self.question(task, row))
        return [self.example(task, row) for row in rows]
