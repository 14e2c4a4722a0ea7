"""What a command says: progress and notes on stderr, its one result on stdout."""

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
    """The three switches every command has, and the two streams behind them."""

    json: bool = False
    quiet: bool = False
    verbose: bool = False
    # Among several processes only the first speaks.
    silent: bool = field(default_factory=lambda: os.environ.get("RANK", "0") != "0")
    _bars: Progress | None = field(default=None, init=False, repr=False)
    _tasks: dict[str, TaskID] = field(default_factory=dict, init=False, repr=False)
    _started: float = field(default_factory=time.monotonic, init=False, repr=False)

    def note(self, text: str) -> None:
        """One line on stderr, unless --quiet."""
        if not (self.quiet or self.silent):
            print(text, file=sys.stderr, flush=True)

    def detail(self, text: str) -> None:
        """One line on stderr, with --verbose only."""
        if self.verbose and not self.silent:
            print(text, file=sys.stderr, flush=True)

    def progress(self, label: str, done: int, total: int) -> None:
        """Draws or moves the bar called `label`; nothing where stderr is no terminal, or with --quiet."""
        if self.quiet or self.silent or not sys.stderr.isatty():
            return
        # A bar that flashes by tells nothing: work shorter than this stays silent.
        if self._bars is None and time.monotonic() - self._started < SHOW_AFTER_S:
            return
        bars = self._bars or self._start_bars()
        if label not in self._tasks:
            self._tasks[label] = bars.add_task(label, total=total)
        bars.update(self._tasks[label], completed=done, total=total)

    def result(self, document: Any, show: Callable[[], None]) -> None:
        """Prints `document` as the one JSON document with --json, else calls `show`."""
        self.close()
        if self.silent:
            return
        if self.json:
            json.dump(document, sys.stdout, indent=2, ensure_ascii=False, allow_nan=False, default=str)
            sys.stdout.write("\n")
        else:
            show()

    def close(self) -> None:
        """Takes the progress bars off the screen."""
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
    """The console of the command that begins now; `current` returns it from here on."""
    global _current
    _current = Console(json=json, quiet=quiet, verbose=verbose)
    # The libraries' own loading bars and advice follow this logger (bases.library_logs).
    logging.getLogger("molecli").setLevel(logging.DEBUG if verbose else logging.WARNING)
    if not verbose:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its retries: the failure itself is explained once
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    return _current


def current() -> Console:
    """The console of the running command."""
    return _current
