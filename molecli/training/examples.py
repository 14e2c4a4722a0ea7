"""Training data: from a DataConfig to examples by task, a held-out part, and batches.

    load_tasks   examples by task              hold_out   splits off a part of each task (split_tasks: loads, too)
    flatten      all examples in one list      Batches    the batch of every step
    sample       at most so many examples      part_of    one of n parts

Everything is a pure function of the configuration and the seed.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from molecli.errors import UsageError
from molecli.protocols import Example, Suite
from molecli.suites import load_suite, select_tasks

if TYPE_CHECKING:
    from molecli.config import DataConfig

Tasks = dict[str, list[Example]]
T = TypeVar("T")


def load_tasks(data: DataConfig, suite: Suite | None = None) -> Tasks:
    """The examples of each task in the order of their files; with `data.limit`, at most that many, chosen at random.

    Raises: UsageError for an unknown task, an unreadable file or line, a task without examples.
    """
    suite = suite or load_suite(data.suite, files=data.files)
    tasks: Tasks = {}
    for task in select_tasks(suite, data.tasks, data.data_dir):
        examples = sample(suite.load(task, data.split, data.data_dir), data.limit, task)
        if not examples:
            what = f"the {data.split} split of the task {task!r} is empty"
            raise UsageError(f"suite {data.suite}", what, "Leave the task out, or check --data-dir.")
        tasks[task] = examples
    return tasks


def split_tasks(data: DataConfig, suite: Suite | None = None) -> tuple[Tasks, Tasks]:
    """(training examples, held-out examples) of the tasks in `data`, each with at most `data.limit` per task.

    Which examples are held out depends only on the task and the fraction. So a LoRA, the gates over it and an
    evaluation have the same ones, whatever their seeds and limits.
    """
    whole = load_tasks(data.model_copy(update={"limit": None}), suite)
    kept, held = hold_out(whole, data.holdout, seed=0)
    if data.part is not None:
        kept = {task: part_of(rows, data.part, task) for task, rows in kept.items()}
    limited = [{task: sample(rows, data.limit, task) for task, rows in part.items()} for part in (kept, held)]
    return limited[0], limited[1]


def load_examples(data: DataConfig) -> Tasks:
    """The examples to inspect or score; if `data` has a held-out fraction, only that part."""
    return load_tasks(data) if data.holdout == 0 else split_tasks(data)[1]


def sample(examples: Sequence[T], limit: int | None, task: str) -> list[T]:
    """At most `limit` of the examples (or scenes), in their order; which ones depends only on the task's name.

    Not the first ones: many files are sorted (numbers by size, words by frequency), so their start is not typical.
    """
    if limit is None or limit >= len(examples):
        return list(examples)
    chosen = sorted(random.Random(f"limit/{task}").sample(range(len(examples)), limit))
    return [examples[i] for i in chosen]


def part_of(examples: Sequence[T], part: str, task: str) -> list[T]:
    """The part `k/n` of the examples: every n-th one, starting with the k-th.

    Raises: UsageError for a part beyond the last, and for one without examples.
    """
    place, count = (int(number) for number in part.split("/"))
    if place > count:
        raise UsageError("data.part", f"there is no part {place} of {count}", f"Write 1/{count} to {count}/{count}.")
    chosen = list(examples[place - 1 :: count])
    if not chosen:
        what = f"the task {task!r} has {len(examples)} examples, too few for {count} parts"
        raise UsageError("data.part", what, "Write fewer parts.")
    return chosen


def hold_out(tasks: Mapping[str, Sequence[Example]], fraction: float, seed: int) -> tuple[Tasks, Tasks]:
    """(training examples, held-out examples): a `fraction` of each task, chosen by the seed; both in file order.

    The choice does not depend on the other tasks. With a fraction above 0, both parts of a task have at least one
    example. Raises: UsageError for a task with a single example.
    """
    if fraction == 0:
        return {task: list(examples) for task, examples in tasks.items()}, {}
    kept: Tasks = {}
    held: Tasks = {}
    for task, examples in tasks.items():
        if len(examples) < 2:
            what = f"the task {task!r} has only one example, so none can be held out"
            raise UsageError("data.holdout", what, "Give it more examples, or write data.holdout: 0.")
        count = min(max(1, round(fraction * len(examples))), len(examples) - 1)
        chosen = set(random.Random(f"{seed}/holdout/{task}").sample(range(len(examples)), count))
        kept[task] = [example for i, example in enumerate(examples) if i not in chosen]
        held[task] = [example for i, example in enumerate(examples) if i in chosen]
    return kept, held


def flatten(tasks: Mapping[str, Sequence[Example]]) -> list[Example]:
    """All tasks' examples in one list: a mixture in proportion to their sizes."""
    return [example for examples in tasks.values() for example in examples]


class Batches:
    """Batches of a fixed size from step 1 on. Every epoch is a new permutation; a batch can span two epochs."""

    def __init__(self, examples: Sequence[Example], *, batch_size: int, seed: int) -> None:
        if not examples:
            raise UsageError("data", "there are no training examples", "Give a training file with at least one line.")
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self._epoch, self._order = -1, [0]

    def __getitem__(self, step: int) -> list[Example]:
        """The batch of `step`; it does not depend on earlier calls."""
        first = (step - 1) * self.batch_size
        return [self._at(place) for place in range(first, first + self.batch_size)]

    @property
    def digest(self) -> str:
        """A hash of the examples in order: a resumed run must have the same examples."""
        text = "\x1e".join(f"{e.task}\x1f{e.prompt}\x1f{e.target}" for e in self.examples)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]

    def _at(self, place: int) -> Example:
        epoch, index = divmod(place, len(self.examples))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, list(range(len(self.examples)))
            random.Random(f"{self.seed}/{epoch}").shuffle(self._order)
        return self.examples[self._order[index]]
