"""`mole` commands as processes of their own, forked from one that has imported what they need: that takes seconds each.

Contents: prepare, run_mole.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from threading import Lock
from typing import Any

_IMPORTED = ("molecli.engine.compose", "molecli.engine.evaluate", "molecli.engine.train_lora")
# Starting a process polls all others too, and a status can be read but once.
_polling = Lock()


def prepare() -> None:
    """Starts the process that others are forked from; to be called in the main thread, before `run_mole` in others.

    An interrupt is for the commands, and must not end it while it imports.
    """
    if _context().get_start_method() == "forkserver":
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            forkserver.ensure_running()
        finally:
            signal.signal(signal.SIGINT, before)


def run_mole(arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> int:
    """The exit code of `mole` with these arguments; negative where a signal ended it. What it says goes to `log`.

    Many threads may call it at once. Where processes cannot be forked so, each imports for itself.
    """
    process = _context().Process(target=_mole, args=(tuple(arguments), str(log), dict(environment)))
    with _polling:
        process.start()
    wait([process.sentinel])
    with _polling:
        process.join()
    return int(process.exitcode)


@cache
def _context() -> Any:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_IMPORTED))
    return context


def _mole(arguments: tuple[str, ...], log: str, environment: dict[str, str]) -> None:
    """The command, in the new process."""
    with open(log, "wb") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    if "OMP_NUM_THREADS" in environment:
        import torch

        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))  # it was read when torch was imported
    sys.argv = ["mole", *arguments]
    runpy.run_module("molecli", run_name="__main__")
