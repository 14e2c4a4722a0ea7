"""Rows from the Hugging Face hub or a web address, for use without --data-dir.

Contents: HubSet, hub_rows, web_json, not_online, offline.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

from molecli.errors import RunError, UsageError
from molecli.protocols import Source, Split
from molecli.suites._rows import Row, rows_of

_TIMEOUT_S = 30


@dataclass(frozen=True)
class HubSet:
    """The public copy of a task: dataset, config, and its splits for train and test.

    stream: read row by row, for large datasets; train_rows: number of first rows to use as train; parquet: use the
    hub's conversion of a dataset that is a script, which `datasets` does not run.
    """

    dataset: str
    config: str | None = None
    train: str = "train"
    test: str = "test"
    stream: bool = False
    train_rows: int | None = None
    parquet: bool = False

    def source(self, split: Split) -> Source:
        """The dataset that `rows` requests."""
        name = f"{self.dataset}/{self.config}" if self.config else self.dataset
        return Source(f"{name}, {self._split(split)}", online=True)

    def rows(self, split: Split, *, labels: str | None = None) -> list[Row]:
        """The rows of one split. Raises: RunError as `hub_rows` does."""
        return hub_rows(
            self.dataset,
            self.config,
            self._split(split),
            labels=labels,
            stream=self.stream,
            at_most=self.train_rows if split == "train" else None,
            parquet=self.parquet,
        )

    def _split(self, split: Split) -> str:
        return self.train if split == "train" else self.test


def hub_rows(
    dataset: str,
    config: str | None,
    split: str,
    *,
    labels: str | None = None,
    stream: bool = False,
    at_most: int | None = None,
    parquet: bool = False,
) -> list[Row]:
    """The rows of one split of a hub dataset; class numbers in the field `labels` become their names.

    stream, parquet: as in `HubSet`. at_most: number of first rows to read; with `stream` no others are fetched.
    Raises: RunError if the hub cannot be reached or lacks the data.
    """
    import datasets

    where = f"{dataset}/{config}" if config else dataset
    try:
        with _quiet():
            if parquet:
                files = {split: f"hf://datasets/{dataset}@refs%2Fconvert%2Fparquet/{config}/{split}/*.parquet"}
                table = datasets.load_dataset("parquet", data_files=files, split=split)
            elif stream:
                table = datasets.load_dataset(dataset, config, split=split, streaming=True)
            else:
                table = datasets.load_dataset(dataset, config, split=split)
            objects = [dict(item) for item in islice(table, at_most)]
    except (OSError, ValueError, RuntimeError) as error:
        # Among these: ConnectionError (no network, HF_HUB_OFFLINE), DatasetNotFoundError, an unknown config, a dataset
        # kept as a script.
        raise RunError(where, f"could not be loaded from the hub ({_first_line(error)})", _remedy()) from None
    if labels:
        names = table.features[labels].names
        # -1 marks an example on which the annotators did not agree.
        objects = [{**item, labels: names[item[labels]]} for item in objects if item[labels] >= 0]
    return rows_of(where, objects)


def web_json(address: str) -> Any:
    """The JSON document at `address`. Raises: RunError if it cannot be loaded."""
    if offline():
        raise RunError(address, "could not be loaded (offline mode)", _remedy())
    try:
        with urllib.request.urlopen(address, timeout=_TIMEOUT_S) as answer:
            return json.load(answer)
    except (OSError, ValueError) as error:
        raise RunError(address, f"could not be loaded ({_first_line(error)})", _remedy()) from None


def not_online(suite: str, task: str) -> UsageError:
    """The error for a task without a known public copy."""
    return UsageError(f"suite {suite}", f"the task {task!r} is not on the hub", "Give its files with --data-dir.")


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides the retries of the hub's client, and its progress bars outside a terminal."""
    import datasets

    logger = logging.getLogger("huggingface_hub")
    level, bars = logger.level, not datasets.utils.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


def offline() -> bool:
    """Whether HF_HUB_OFFLINE is set."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def _remedy() -> str:
    if offline():
        return "HF_HUB_OFFLINE is set: give the files with --data-dir, or unset it."
    return "Check the network, or give the files with --data-dir."


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
