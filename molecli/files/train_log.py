"""train_log.jsonl: one line per training step, each step once, even after interruptions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from molecli.files.atomic import write_text

LOG_FILE = "train_log.jsonl"
Record = dict[str, float]


def begin_log(run: Path, *, keep_until: int = 0) -> list[Record]:
    """Truncates the log under `run` after step `keep_until`, and returns its records."""
    records = [record for record in read_log(run) if record["step"] <= keep_until]
    write_text(Path(run) / LOG_FILE, _lines(records))
    return records


def append_records(run: Path, records: Sequence[Record]) -> None:
    """Appends records to the log under `run`, in one write."""
    with (Path(run) / LOG_FILE).open("a", encoding="utf-8") as log:
        log.write(_lines(records))


def read_log(run: Path) -> list[Record]:
    """The records of the log under `run`, up to a line that an interruption left incomplete."""
    path = Path(run) / LOG_FILE
    records: list[Record] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _lines(records: Sequence[Record]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)
