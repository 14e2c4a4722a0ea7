"""Suites joined by `+`: all their tasks, each read, scored and limited by its own suite."""

from __future__ import annotations

import pytest

from molecli.errors import UsageError
from molecli.protocols import Example, Source, Split
from molecli.suites import load_suite
from molecli.suites.union import UnionSuite


class Stub:
    """A suite of given tasks that remembers where it was told to read."""

    def __init__(self, name: str, *tasks: str, metric: str = "exact_match", room: int = 8) -> None:
        self.name, self.version, self._tasks, self.metric, self.room = name, f"{name}-1", tasks, metric, room
        self.folders: list[str | None] = []

    def tasks(self, data_dir: str | None) -> list[str]:
        self.folders.append(data_dir)
        return list(self._tasks)

    def known(self, data_dir: str | None) -> list[str]:
        return [*self._tasks, f"{self.name} elsewhere"]

    def source(self, task: str, split: Split, data_dir: str | None) -> Source:
        return Source(f"{data_dir}/{split}/{task}")

    def load(self, task: str, split: Split, data_dir: str | None) -> list[Example]:
        return [Example(task, f"{self.name} {split} {data_dir}", "y")]

    def metrics(self, task: str) -> tuple[str, ...]:
        return (self.metric,)

    def max_new_tokens(self, task: str) -> int:
        return self.room


def joined() -> UnionSuite:
    return UnionSuite([Stub("one", "b", "a"), Stub("two", "c", metric="rougeL", room=64)])


def test_the_tasks_are_those_of_every_suite_in_order() -> None:
    suite = joined()
    assert (suite.name, suite.version) == ("one+two", "one-1+two-1")
    assert suite.tasks(None) == ["b", "a", "c"]


def test_each_task_is_read_by_its_own_suite_from_its_own_folder() -> None:
    suite = joined()
    assert suite.load("c", "test", "data") == [Example("c", "two test data/two", "y")]
    assert suite.load("a", "train", "data") == [Example("a", "one train data/one", "y")]
    assert suite.suites[0].folders == ["data/one"]  # type: ignore[attr-defined]


def test_tasks_that_are_not_there_are_known_and_each_has_the_place_of_its_own_suite() -> None:
    suite = joined()
    assert suite.known("data") == ["b", "a", "one elsewhere", "c", "two elsewhere"]
    assert suite.source("c", "test", "data") == Source("data/two/test/c")
    assert suite.source("one elsewhere", "train", "data") == Source("data/one/train/one elsewhere")


def test_without_a_folder_no_suite_is_given_one() -> None:
    assert joined().load("c", "test", None)[0].prompt == "two test None"


def test_metrics_and_room_are_those_of_the_tasks_own_suite() -> None:
    suite = joined()
    suite.tasks("data")
    assert (suite.metrics("a"), suite.max_new_tokens("a")) == (("exact_match",), 8)
    assert (suite.metrics("c"), suite.max_new_tokens("c")) == (("rougeL",), 64)


def test_two_tasks_of_one_name_are_refused() -> None:
    suite = UnionSuite([Stub("one", "a"), Stub("two", "c", "a")])
    with pytest.raises(UsageError) as caught:
        suite.tasks(None)
    assert str(caught.value) == (
        "--suite one+two: the suites 'one' and 'two' both have a task 'a'. Evaluate them one after the other."
    )


def test_a_name_with_a_plus_loads_every_part() -> None:
    suite = load_suite("nli+instruction_induction")
    assert isinstance(suite, UnionSuite)
    assert [part.name for part in suite.suites] == ["nli", "instruction_induction"]
    with pytest.raises(UsageError) as caught:
        load_suite("nli+instruction_inductoin")
    assert str(caught.value) == (
        "--suite: no suite is called 'instruction_inductoin'. Did you mean 'instruction_induction'?"
    )
