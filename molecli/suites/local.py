"""A suite's copy on disk: <split>/<task>.jsonl, or a lone <task>.jsonl that serves both splits.

A lone file is halved by a hash of what the task is asked, so that nothing asked in training is asked again in the test.
Contents: local_tasks, local_file, local_rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from molecli.protocols import Split
from molecli.suites.lines import Row, half_of, in_order, read_rows, task_files

SPLITS: tuple[Split, ...] = ("train", "test")


def local_tasks(names: Sequence[str], data_dir: str) -> list[str]:
    """Those of the tasks `names` that have a file in `data_dir`. Raises: UsageError where the folder is missing."""
    found = set(task_files(data_dir))
    for split in SPLITS:
        if Path(data_dir, split).is_dir():
            found |= set(task_files(Path(data_dir, split)))
    return in_order(names, found)


def local_file(task: str, split: Split, data_dir: str) -> Path:
    """The file that holds a split of a task: the split's own, or the lone one where that is there instead."""
    of_split = [Path(data_dir, name, f"{task}.jsonl") for name in (split, *SPLITS)]
    lone = Path(data_dir, f"{task}.jsonl")
    # With a file for one split alone, the other is missing: the lone file may repeat its rows.
    return of_split[0] if any(path.is_file() for path in of_split) or not lone.is_file() else lone


def local_rows(task: str, split: Split, data_dir: str, asked: Callable[[Row], str]) -> list[Row]:
    """The rows of one split; `asked` is what a lone file is halved by. Raises: UsageError as `read_rows` does."""
    path = local_file(task, split, data_dir)
    rows = read_rows(path)
    if path != Path(data_dir, f"{task}.jsonl"):
        return rows
    return [row for row in rows if half_of(asked(row)) == split]
