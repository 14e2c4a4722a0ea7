"""Several suites as one, `a+b`: all their tasks together; each suite reads from the folder with its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from molecli.errors import UsageError
from molecli.protocols import Example, Source, Split, Suite


class UnionSuite:
    """The tasks of `suites` under their own names; `data_dir` has one folder per suite, with its name.

    `tasks` or `load` must be called before `metrics` and `max_new_tokens`, to find the suite of a task.
    Raises: UsageError if two suites have a task with the same name.
    """

    def __init__(self, suites: Sequence[Suite]) -> None:
        self.suites = tuple(suites)
        self.name = "+".join(suite.name for suite in suites)
        self.version = "+".join(suite.version for suite in suites)
        self._owner: dict[str, Suite] = {}

    def tasks(self, data_dir: str | None) -> list[str]:
        """All tasks, suite by suite."""
        self._owner = self._owners({suite: suite.tasks(_folder(data_dir, suite)) for suite in self.suites})
        return list(self._owner)

    def known(self, data_dir: str | None) -> list[str]:
        """All tasks of all suites."""
        return list(self._owners({suite: suite.known(_folder(data_dir, suite)) for suite in self.suites}))

    def source(self, task: str, split: Split, data_dir: str | None) -> Source | None:
        """The source in the suite of the task."""
        owners = self._owners({suite: suite.known(_folder(data_dir, suite)) for suite in self.suites})
        return owners[task].source(task, split, _folder(data_dir, owners[task]))

    def load(self, task: str, split: Split, data_dir: str | None) -> list[Example]:
        """The examples of one task, from its suite."""
        suite = self._of(task, data_dir)
        return suite.load(task, split, _folder(data_dir, suite))

    def metrics(self, task: str) -> tuple[str, ...]:
        """The metrics in the suite of the task."""
        return self._owner[task].metrics(task)

    def max_new_tokens(self, task: str) -> int:
        """The limit in the suite of the task."""
        return self._owner[task].max_new_tokens(task)

    def _owners(self, tasks: Mapping[Suite, Sequence[str]]) -> dict[str, Suite]:
        owner: dict[str, Suite] = {}
        for suite, names in tasks.items():
            for task in names:
                if task in owner:
                    what = f"the suites {owner[task].name!r} and {suite.name!r} both have a task {task!r}"
                    raise UsageError(f"--suite {self.name}", what, "Evaluate them one after the other.")
                owner[task] = suite
        return owner

    def _of(self, task: str, data_dir: str | None) -> Suite:
        if task not in self._owner:
            self.tasks(data_dir)
        return self._owner[task]


def _folder(data_dir: str | None, suite: Suite) -> str | None:
    return None if data_dir is None else f"{data_dir}/{suite.name}"
