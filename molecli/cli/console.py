"""The output of a command: progress and notes on stderr, the result on stdout."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

SHOW_AFTER_S = 2.0


@dataclass
class Console:
    """Output as the flags --json, --quiet and --verbose ask for it."""

    json: bool = False
    quiet: bool = False
    verbose: bool = False
    # Of several processes only the first prints.
    silent: bool = field(default_factory=lambda: os.environ.get("RANK", "0") != "0")
    _bars: Progress | None = field(default=None, init=False, repr=False)
    _tasks: dict[str, TaskID] = field(default_factory=dict, init=False, repr=False)
    _started: float = field(default_factory=time.monotonic, init=False, repr=False)

    def note(self, text: str) -> None:
        """Prints a line on stderr, unless --quiet."""
        if not (self.quiet or self.silent):
            print(text, file=sys.stderr, flush=True)

    def detail(self, text: str) -> None:
        """Prints a line on stderr with --verbose."""
        if self.verbose and not self.silent:
            print(text, file=sys.stderr, flush=True)

    def progress(self, label: str, done: int, total: int) -> None:
        """Draws or moves the progress bar `label`, unless --quiet or stderr is not a terminal."""
        if self.quiet or self.silent or not sys.stderr.isatty():
            return
        # Shorter work shows no bar: it would only flash by.
        if self._bars is None and time.monotonic() - self._started < SHOW_AFTER_S:
            return
        bars = self._bars or self._start_bars()
        if label not in self._tasks:
            self._tasks[label] = bars.add_task(label, total=total)
        bars.update(self._tasks[label], completed=done, total=total)

    def result(self, document: Any, show: Callable[[], None]) -> None:
        """Prints `document` as JSON with --json, else calls `show`."""
        self.close()
        if self.silent:
            return
        if self.json:
            json.dump(document, sys.stdout, indent=2, ensure_ascii=False, allow_nan=False, default=str)
            sys.stdout.write("\n")
        else:
            show()

    def close(self) -> None:
        """Removes the progress bars from the screen."""
        if self._bars is not None:
            self._bars.stop()
            self._bars, self._tasks = None, {}

    def _start_bars(self) -> Progress:
        from rich.console import Console as RichConsole
        from rich.progress import Progress

        self._bars = Progress(console=RichConsole(stderr=True), transient=True)
        self._bars.start()
        return self._bars


_current = Console()


def start(*, json: bool = False, quiet: bool = False, verbose: bool = False) -> Console:
    """The console of a new command; from now on `current` returns it."""
    global _current
    _current = Console(json=json, quiet=quiet, verbose=verbose)
    # The libraries' loading bars and advice follow this logger (bases.library_logs).
    logging.getLogger("molecli").setLevel(logging.DEBUG if verbose else logging.WARNING)
    if not verbose:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # hides its retries: the failure itself is reported once
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    return _current


def current() -> Console:
    """The console of the running command."""
    return _current
