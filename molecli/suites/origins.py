"""The sources of examples, before any is read: existing files, missing files, public datasets.

Sources         the sources of a DataConfig, by task        find_sources    DataConfig -> Sources
source_lines    the same as lines of a plan
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molecli.protocols import Suite
from molecli.suites import load_suite
from molecli.suites._hub import offline

if TYPE_CHECKING:
    from molecli.config import DataConfig


@dataclass(frozen=True)
class Sources:
    """Task -> place: `files` exist, `missing` do not, `online` would be fetched; `made` lists generated tasks."""

    files: Mapping[str, str] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    online: Mapping[str, str] = field(default_factory=dict)
    made: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        """The sources as JSON."""
        return asdict(self)


def find_sources(data: DataConfig, suite: Suite | None = None) -> Sources:
    """The sources of `data`: of its tasks, or if it names none of all tasks of the suite.

    Reads no example and requests nothing. Raises: UsageError for a missing folder.
    """
    suite = suite or load_suite(data.suite, files=data.files)
    # Online a suite lists the available tasks; in a folder also tasks whose file may be missing.
    known = suite.tasks(None) if data.data_dir is None else suite.known(data.data_dir)
    suite.tasks(data.data_dir)
    files, missing, online, made = {}, {}, {}, []
    for task in data.tasks or known:
        if task not in known:
            continue
        source = suite.source(task, data.split, data.data_dir)
        if source is None:
            made.append(task)
        elif source.online:
            online[task] = source.place
        elif source.place == "-" or Path(source.place).is_file():
            files[task] = source.place
        else:
            missing[task] = source.place
    return Sources(files, missing, online, tuple(made))


def source_lines(sources: Sources) -> list[str]:
    """One line for existing files, one for each missing file, and one for datasets that would be fetched."""
    lines = []
    if sources.missing and sources.files:
        count = len(sources.files) + len(sources.missing)
        lines.append(f"files     {len(sources.files)} of {count} tasks are there: {', '.join(sources.files)}")
    lines += [f"missing   {task}: no file {place}" for task, place in sources.missing.items()]
    if sources.online:
        tasks = "1 task" if len(sources.online) == 1 else f"{len(sources.online)} tasks"
        remedy = "HF_HUB_OFFLINE is set: write --data-dir" if offline() else "--data-dir reads files instead"
        lines.append(f"online    {tasks} would be fetched; {remedy}")
        lines += [f"          {task}: {place}" for task, place in sources.online.items()]
    return lines
