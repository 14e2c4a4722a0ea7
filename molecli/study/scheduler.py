"""Runs a study's commands: so many side by side, each once, whichever of its columns ask for it.

Work      jobs in, failures and progress told; a job waits for those alone that make what it reads
called    one job, as a process of its own

A job is done once <name>.done holds the digest of its recipe, so that a study that was killed, or whose recipe grew,
goes on.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import shutil
import signal
import sys
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from functools import cache
from multiprocessing import connection, forkserver
from pathlib import Path
from queue import Queue
from threading import Event, Lock
from typing import Any

from molecli.evaluation.results import RESULTS_FILE
from molecli.files.atomic import write_text
from molecli.protocols import Note, Progress
from molecli.study.jobs import Job


class Work:
    """Jobs of a study in `folder`, `at_once` side by side over the GPUs there are. failed: the name of a job -> why.

    Many threads may call it; those that wait for a job when it is closed end with an error. What is the same but for
    its place is made once: learned again on a GPU, it would not come out alike.
    """

    def __init__(self, folder: Path, at_once: int, progress: Progress | None, note: Note) -> None:
        self.folder, self.progress, self.note = folder, progress, note
        self.failed: dict[str, str] = {}
        self._pool = ThreadPoolExecutor(at_once)
        self._slots: Queue[int] = Queue()
        for slot in range(at_once):
            self._slots.put(slot)
        self._threads = max(1, (os.cpu_count() or 1) // at_once)
        self._made: dict[str, tuple[Job, Future[str]]] = {}  # digest -> who makes it
        self._planned: dict[Hashable, frozenset[tuple[str, str]]] = {}  # (phase, name)
        self._over: set[tuple[str, str]] = set()
        self._lock = Lock()
        self._closed = Event()

    def plan(self, whose: Hashable, jobs: Sequence[Job]) -> None:
        """What is to be done for a column, in place of what was planned for it; progress is told phase by phase."""
        with self._lock:
            self._planned[whose] = frozenset((job.phase, job.name) for job in jobs)

    def do(self, jobs: Sequence[Job], phases: Sequence[str]) -> None:
        """Those of these phases that are not done yet, each as soon as what it reads is made, if it ever is."""
        waiting = [job for phase in phases for job in jobs if job.phase == phase]
        ahead = {job.output for job in waiting}
        running: list[tuple[Job, Job, Future[str]]] = []
        while ahead:
            running += [(job, *self._start(job)) for job in waiting if ahead.isdisjoint(job.reads)]
            waiting = [job for job in waiting if not ahead.isdisjoint(job.reads)]
            over, _ = wait({future for *_, future in running}, return_when=FIRST_COMPLETED)
            for job, maker, future in [one for one in running if one[2] in over]:
                self._end(job, maker, future.result())
                ahead.remove(job.output)
            running = [one for one in running if one[2] not in over]

    def is_done(self, job: Job) -> bool:
        """Whether its mark and what it makes are there."""
        mark = mark_of(self.folder, job)
        place = self.folder / job.name
        made = place / RESULTS_FILE if job.phase in ("trials", "scores") else place
        return mark.is_file() and mark.read_text().strip() == job.digest and made.exists()

    def done(self, jobs: Sequence[Job], phase: str) -> list[str]:
        """The names of those of a phase that are done."""
        return [job.name for job in jobs if job.phase == phase and self.is_done(job)]

    def close(self) -> None:
        """Begins nothing more; what runs ends."""
        # Each that is left ends itself: a future that is cancelled before a thread takes it up ends no `wait` for it.
        self._closed.set()
        self._pool.shutdown()

    def _start(self, job: Job) -> tuple[Job, Future[str]]:
        """(the job that makes the same, its failure or "" to come)."""
        with self._lock:
            if self.is_done(job):
                future: Future[str] = Future()
                future.set_result("")
                self._made.setdefault(job.digest, (job, future))
                return job, future
            if job.digest not in self._made:
                self._made[job.digest] = job, self._pool.submit(self._one, job)
            return self._made[job.digest]

    def _one(self, job: Job) -> str:
        import torch

        if self._closed.is_set():
            raise CancelledError(job.name)
        slot, gpus = self._slots.get(), torch.cuda.device_count()
        try:
            environment = {"OMP_NUM_THREADS": str(self._threads), **os.environ}
            if gpus:
                environment["CUDA_VISIBLE_DEVICES"] = _gpu(slot % gpus)
            return called(job, self.folder, environment)
        finally:
            self._slots.put(slot)

    def _end(self, job: Job, maker: Job, failure: str) -> None:
        """What another job made is this one's too, if it was made; and that it is over is said."""
        with self._lock:
            if not failure and maker.name != job.name and not self.is_done(job):
                copy(self.folder, maker, job)
            self._tell(job, failure)

    def _tell(self, job: Job, failure: str) -> None:
        """Says that a job is over, once; by who holds the lock."""
        if failure and job.name not in self.failed:
            self.failed[job.name] = failure
            self.note(f"{job.name}: {failure}")
        if (job.phase, job.name) not in self._over:
            self._over.add((job.phase, job.name))
            if self.progress is not None:
                planned = {one for jobs in self._planned.values() for one in jobs if one[0] == job.phase}
                self.progress(job.phase, len(self._over & planned), len(planned))


def _gpu(number: int) -> str:
    """What CUDA calls that one of the GPUs that this command may use: a user may have left it some of them."""
    left = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return left[number] if left else str(number)


def called(job: Job, folder: Path, environment: dict[str, str]) -> str:
    """What went wrong, "" if nothing did; recipe, log and the mark of being done lie beside the job's folder."""
    record = folder / f"{job.name}.yaml"
    write_text(record, job.text)
    log = folder / f"{job.name}.log"
    code = run_mole([job.command, str(record), *job.arguments, "--overwrite"], log, environment)
    if code:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        return f"exit {code}: {lines[-1] if lines else 'no message'}"
    write_text(mark_of(folder, job), job.digest + "\n")
    return ""


def copy(folder: Path, maker: Job, job: Job) -> None:
    """What `maker` made becomes what `job` did, too."""
    shutil.copytree(folder / maker.name, folder / job.name, dirs_exist_ok=True)
    write_text(folder / f"{job.name}.yaml", job.text)
    write_text(mark_of(folder, job), job.digest + "\n")


def mark_of(folder: Path, job: Job) -> Path:
    """The file that says with which recipe the job was done."""
    return folder / f"{job.name}.done"


_IMPORTED = ("molecli.commands.compose", "molecli.text.compose", "molecli.text.evaluate", "molecli.text.train_lora")
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
    connection.wait([process.sentinel])
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
