"""Rows from the Hugging Face hub, or from a public address, where no --data-dir is given."""

from __future__ import annotations

import json
import logging
import os
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from molecli.errors import RunError, UsageError
from molecli.suites.lines import Row, rows_of

_TIMEOUT_S = 30


def hub_rows(dataset: str, config: str | None, split: str, *, labels: str | None = None) -> list[Row]:
    """The rows of one split of a hub dataset; class numbers in the field `labels` become their names.

    Raises: RunError where the hub cannot be reached or lacks the data.
    """
    import datasets

    where = f"{dataset}/{config}" if config else dataset
    try:
        with _quiet():
            table = datasets.load_dataset(dataset, config, split=split)
    except (OSError, ValueError) as error:
        # ConnectionError (no network, HF_HUB_OFFLINE), DatasetNotFoundError and unknown configs are among these.
        raise RunError(where, f"could not be loaded from the hub ({_first_line(error)})", _remedy()) from None
    names = table.features[labels].names if labels else []
    objects = [dict(item) for item in table]
    if labels:
        # -1 marks an example on which the annotators did not agree.
        objects = [{**item, labels: names[item[labels]]} for item in objects if item[labels] >= 0]
    return rows_of(where, objects)


def web_json(address: str) -> Any:
    """The JSON document at `address`. Raises: RunError where it cannot be had."""
    if _offline():
        raise RunError(address, "could not be loaded (offline by choice)", _remedy())
    try:
        with urllib.request.urlopen(address, timeout=_TIMEOUT_S) as answer:
            return json.load(answer)
    except (OSError, ValueError) as error:
        raise RunError(address, f"could not be loaded ({_first_line(error)})", _remedy()) from None


def not_online(suite: str, task: str) -> UsageError:
    """The error for a task that has no public copy this package knows of."""
    return UsageError(f"suite {suite}", f"the task {task!r} is not on the hub", "Give its files with --data-dir.")


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, the hub's client announces no retries, and draws bars on a terminal only."""
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


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def _remedy() -> str:
    if _offline():
        return "HF_HUB_OFFLINE is set: give the files with --data-dir, or unset it."
    return "Check the network, or give the files with --data-dir."


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
