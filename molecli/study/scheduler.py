"""Runs a study's commands, several at a time. Each runs once, even if several columns need it.

Work      runs jobs and reports failures and progress; a job waits only for the jobs whose output it reads
called    runs one job in its own process

A job is done when <name>.done holds the digest of its recipe. So a study that was killed, or whose recipe has grown,
can be continued.
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
    """Runs a study's jobs in `folder`, `at_once` at a time over the GPUs. failed: the name of a job -> why it failed.

    Many threads can use it; threads that wait for a job when it is closed end with an error. Jobs that differ only in
    their output run once: trained again on a GPU, the result would differ slightly.
    """

    def __init__(self, folder: Path, at_once: int, progress: Progress | None, note: Note) -> None:
        self.folder, self.progress, self.note = folder, progress, note
        self.failed: dict[str, str] = {}
        self._pool = ThreadPoolExecutor(at_once)
        self._slots: Queue[int] = Queue()
        for slot in range(at_once):
            self._slots.put(slot)
        self._threads = max(1, (os.cpu_count() or 1) // at_once)
        self._made: dict[str, tuple[Job, Future[str]]] = {}  # digest -> the job that runs
        self._planned: dict[Hashable, frozenset[tuple[str, str]]] = {}  # (phase, name)
        self._over: set[tuple[str, str]] = set()
        self._lock = Lock()
        self._closed = Event()

    def plan(self, whose: Hashable, jobs: Sequence[Job]) -> None:
        """Sets the jobs that are planned for a column. Progress counts the planned jobs of each phase."""
        with self._lock:
            self._planned[whose] = frozenset((job.phase, job.name) for job in jobs)

    def do(self, jobs: Sequence[Job], phases: Sequence[str]) -> None:
        """Runs the jobs of these phases that are not done, each as soon as the jobs that it depends on are over."""
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
        """Whether the job's mark and its output exist."""
        mark = mark_of(self.folder, job)
        place = self.folder / job.name
        made = place / RESULTS_FILE if job.phase in ("trials", "scores") else place
        return mark.is_file() and mark.read_text().strip() == job.digest and made.exists()

    def done(self, jobs: Sequence[Job], phase: str) -> list[str]:
        """The names of the jobs of a phase that are done."""
        return [job.name for job in jobs if job.phase == phase and self.is_done(job)]

    def close(self) -> None:
        """Starts no more jobs, and waits for those that run."""
        # Waiting jobs end themselves: cancelling a future before a thread takes it would leave `wait` hanging.
        self._closed.set()
        self._pool.shutdown()

    def _start(self, job: Job) -> tuple[Job, Future[str]]:
        """(the job that makes the same output, a future with its failure or "")."""
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
        """Copies the output if an equal job made it, and reports that the job is over."""
        with self._lock:
            if not failure and maker.name != job.name and not self.is_done(job):
                copy(self.folder, maker, job)
            self._report(job, failure)

    def _report(self, job: Job, failure: str) -> None:
        """Reports once that a job is over. The caller holds the lock."""
        if failure and job.name not in self.failed:
            self.failed[job.name] = failure
            self.note(f"{job.name}: {failure}")
        if (job.phase, job.name) not in self._over:
            self._over.add((job.phase, job.name))
            if self.progress is not None:
                planned = {one for jobs in self._planned.values() for one in jobs if one[0] == job.phase}
                self.progress(job.phase, len(self._over & planned), len(planned))


def _gpu(number: int) -> str:
    """CUDA's name of the GPU with this number among those that CUDA_VISIBLE_DEVICES allows."""
    left = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return left[number] if left else str(number)


def called(job: Job, folder: Path, environment: dict[str, str]) -> str:
    """What went wrong, or "". The recipe, the log and the done mark are written beside the job's folder."""
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
    """Copies the output of `maker` to `job`, and marks `job` as done."""
    shutil.copytree(folder / maker.name, folder / job.name, dirs_exist_ok=True)
    write_text(folder / f"{job.name}.yaml", job.text)
    write_text(mark_of(folder, job), job.digest + "\n")


def mark_of(folder: Path, job: Job) -> Path:
    """The file that records the digest of the recipe with which the job was done."""
    return folder / f"{job.name}.done"


_IMPORTED = ("molecli.commands.compose", "molecli.text.compose", "molecli.text.evaluate", "molecli.text.train_lora")
# Starting a process polls all other processes, and an exit status can be read only once.
_polling = Lock()


def prepare() -> None:
    """Starts the process from which the others are forked. Call it in the main thread, before `run_mole` in others.

    An interrupt is meant for the commands, and must not end this process while it imports.
    """
    if _context().get_start_method() == "forkserver":
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            forkserver.ensure_running()
        finally:
            signal.signal(signal.SIGINT, before)


def run_mole(arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> int:
    """The exit code of `mole` with these arguments, negative if a signal ended it. Its output goes to `log`.

    Many threads can call it at once. On systems without a fork server each process imports everything itself.
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
    """Runs the command in the new process."""
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
