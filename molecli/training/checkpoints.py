"""Checkpoints: parameters and optimizer state after a step, as safetensors in atomic folders.

    RUN/checkpoints/step-000100/state.safetensors      keys: parameter/NAME, optimizer/KEY/NAME

The random state is not saved: the loop reseeds at every step from (seed, step). When a run has written its result, its
checkpoints are removed, and report.json says that the run is finished.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from molecli.errors import UsageError
from molecli.files.atomic import atomic_folder

if TYPE_CHECKING:
    from molecli.config import Recipe

FOLDER = "checkpoints"
REPORT_FILE = "report.json"
STATE_FILE = "state.safetensors"
FORMAT = "mole-checkpoint"
# Settings of TrainConfig that may change between a run and its resumption.
FREE_SETTINGS = frozenset({"checkpoint_every", "log_every", "micro_batch_size"})
_NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """What training needs to continue after `step`. `settings` identify the run."""

    step: int
    parameters: Mapping[str, Tensor]
    optimizer: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


def save_checkpoint(run: Path, checkpoint: Checkpoint, *, keep: int = 2) -> Path:
    """Writes one checkpoint under `run` and drops all but the newest `keep`. Returns its folder."""
    folder = Path(run) / FOLDER / f"step-{checkpoint.step:06d}"
    tensors = {f"parameter/{name}": tensor for name, tensor in checkpoint.parameters.items()}
    for key, state in checkpoint.optimizer.items():
        tensors |= {f"optimizer/{key}/{name}": tensor for name, tensor in state.items()}
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    metadata = {"format": FORMAT, "step": str(checkpoint.step), "settings": json.dumps(dict(checkpoint.settings))}
    with atomic_folder(folder, replace=True) as unfinished:
        save_file(tensors, unfinished / STATE_FILE, metadata=metadata)
    _prune(folder.parent, keep)
    return folder


def newest_checkpoint(run: Path) -> Checkpoint | None:
    """The newest complete checkpoint under `run`, or None. Damaged ones are skipped."""
    for folder in reversed(_steps(Path(run) / FOLDER)):
        checkpoint = _read(folder / STATE_FILE)
        if checkpoint is not None:
            return checkpoint
    return None


def newest_step(run: Path) -> int | None:
    """The step of the newest checkpoint under `run`, without reading it."""
    steps = _steps(Path(run) / FOLDER)
    return _step_of(steps[-1]) if steps else None


def discard_checkpoints(run: Path) -> None:
    """Removes every checkpoint under `run`: its result is written, or the run starts again."""
    shutil.rmtree(Path(run) / FOLDER, ignore_errors=True)


def check_same_run(checkpoint: Checkpoint, settings: Mapping[str, Any], run: Path) -> None:
    """Raises: UsageError that names the first setting that differs from the checkpoint's."""
    for key, wanted in settings.items():
        # Through JSON, because the checkpoint's settings were stored as JSON.
        wanted = json.loads(json.dumps(wanted))
        found = checkpoint.settings.get(key)
        if found != wanted:
            what = f"{key} is {wanted!r} now and was {found!r} when step {checkpoint.step} was saved"
            raise UsageError(f"--resume {run}", what, "Restore that setting, or start again with --overwrite.")


def recipe_digest(recipe: Recipe) -> str:
    """A hash of what a run's result depends on: not its output folder, its device, or how often it logs."""
    tree = recipe.model_dump(mode="json", exclude={"output", "device"})
    for name in FREE_SETTINGS:
        tree.get("train", {}).pop(name, None)
    text = json.dumps(tree, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def finished_report(run: Path, recipe: Recipe) -> dict[str, Any] | None:
    """The report of a finished run; None if the run is not finished.

    Raises: UsageError if the finished run had another recipe.
    """
    path = Path(run) / REPORT_FILE
    if not path.exists():
        return None
    report = json.loads(path.read_text(encoding="utf-8"))
    if report.get("recipe_digest") != recipe_digest(recipe):
        what = "the run there is finished, and it had another recipe"
        raise UsageError(f"--resume {run}", what, "Choose another --output, or start again with --overwrite.")
    return report


def _read(path: Path) -> Checkpoint | None:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError):
        return None
    if metadata.get("format") != FORMAT:
        return None
    parameters: dict[str, Tensor] = {}
    optimizer: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, rest = key.partition("/")
        if kind == "parameter":
            parameters[rest] = tensor
        else:
            state, _, name = rest.partition("/")
            optimizer.setdefault(state, {})[name] = tensor
    return Checkpoint(int(metadata["step"]), parameters, optimizer, json.loads(metadata["settings"]))


def _prune(folder: Path, keep: int) -> None:
    kept = set(_steps(folder)[-keep:])
    for entry in folder.iterdir():
        # Entries that are not steps are left from a write that was killed.
        if entry not in kept:
            shutil.rmtree(entry, ignore_errors=True)


def _steps(folder: Path) -> list[Path]:
    found = [entry for entry in folder.glob("step-*") if _NAME.fullmatch(entry.name)]
    return sorted(found, key=_step_of)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """A context that delays Ctrl-C to its end, so that an interrupt never leaves only some parameters updated."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pending: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: pending.append(number)) or signal.SIG_DFL
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if pending:
            signal.raise_signal(signal.SIGINT)
