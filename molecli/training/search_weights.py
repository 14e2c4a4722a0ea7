"""One weight for each LoRA, found without gradients: `min_w loss(w) + l1 · mean|w|`, by nevergrad.

Source: LoRAHub (Huang et al. 2024, 2307.13269), section 3.3 and its code: NGOpt from 0, bounds ±1.5, 0.05, 40 steps.
Departs: the loss is the mean over the examples. The published code adds up the means of batches, so its regulariser
counts less the more examples there are.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from molecli.bases.language import seeded
from molecli.errors import RunError, UsageError
from molecli.files.train_log import Record, append_records, begin_log, read_log
from molecli.mixture.merged import MergedMixture
from molecli.mixture.mixture import Mixture
from molecli.protocols import Backbone, Progress
from molecli.training.fit_gates import Task
from molecli.training.ranks import share_from_main

if TYPE_CHECKING:
    from accelerate import Accelerator

    from molecli.config import MethodConfig, TrainConfig

_CLOSE = 1e-6  # tolerance for weights that were stored as JSON


def search(
    backbone: Backbone,
    mixture: Mixture,
    examples: Sequence[Any],
    settings: TrainConfig,
    *,
    config: MethodConfig,
    mode: str = "",
    seed: int,
    folder: Path | str,
    task: Task | None = None,
    resume: bool = False,
    accelerator: Accelerator | None = None,
    progress: Progress | None = None,
) -> list[Record]:
    """A record of every evaluation, after setting the best weights of an attached `MergedMixture`'s experts.

    `config` has the number of evaluations and the most examples to use; messages name `mode`; `task` computes the loss
    of examples, by default the language model's loss. With `resume` the optimiser gets the evaluations in the log.
    Raises: RunError without nevergrad, or if no loss was finite; UsageError if the log is of another search.
    """
    assert isinstance(mixture, MergedMixture)
    optimizer = _optimizer(len(mixture.names), config, mode, seed)
    rows = _few(examples, config.examples, seed)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    done = read_log(folder)[: config.evaluations] if resume else []
    records = begin_log(folder, keep_until=len(done)) if accelerator is None or accelerator.is_main_process else done
    for step in range(1, config.evaluations + 1):
        candidate = _asked(optimizer)
        weights = [float(w) for w in candidate.value]
        if step <= len(done):
            record = _same(done[step - 1], weights, mixture.names, folder)
        else:
            mixture.reweigh(weights)
            with seeded(seed, backbone.device):  # every candidate gets the same noise
                loss = _loss(backbone, mixture, rows, settings.micro_batch_size or settings.batch_size, task)
            if accelerator is not None:
                loss = float(share_from_main(loss, accelerator))  # type: ignore[arg-type]
            record = _record(step, loss, weights, mixture.names, config.l1)
            records.append(record)
            if accelerator is None or accelerator.is_main_process:
                append_records(folder, [record])
        optimizer.tell(candidate, record["objective"])
        if progress is not None:
            progress("search", step, config.evaluations)
    best = [float(w) for w in optimizer.provide_recommendation().value]
    if not all(torch.isfinite(torch.tensor(best))):
        raise RunError(f"--mode {mode}", "no weights were found", "Look at the losses in train_log.jsonl.")
    mixture.reweigh(best)
    return records


def _optimizer(experts: int, config: MethodConfig, mode: str, seed: int) -> Any:
    try:
        import nevergrad
    except ImportError:
        what = "its search needs nevergrad, which is not installed"
        raise RunError(f"--mode {mode}", what, "Run: pip install nevergrad") from None
    space = nevergrad.p.Array(shape=(experts,), lower=-config.bound, upper=config.bound)
    space.value = [0.0] * experts
    space.random_state.seed(seed)
    return nevergrad.optimizers.registry["NGOpt"](parametrization=space, budget=config.evaluations)


def _asked(optimizer: Any) -> Any:
    with warnings.catch_warnings():  # about a tolerance that nevergrad passes to scipy
        warnings.filterwarnings("ignore", message="COBYLA")
        return optimizer.ask()


def _few(examples: Sequence[Any], most: int, seed: int) -> list[Any]:
    """At most `most` of the examples, the same for every candidate."""
    rows = list(examples)
    return rows if len(rows) <= most else random.Random(seed).sample(rows, most)


@torch.no_grad()
def _loss(backbone: Backbone, mixture: Mixture, rows: Sequence[Any], size: int, task: Task | None) -> float:
    """The mean loss over the rows; infinite if it is not a number, so that such weights are never chosen."""
    sums = []
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        if task is None:
            sums.append(float(backbone.example_loss(backbone.collate(batch))[0]))
        else:
            found = task(batch)
            sums.append(float(found.sum) * len(batch) / float(found.count))
    mean = sum(sums) / len(rows)
    return mean if mean == mean else float("inf")


def _record(step: int, loss: float, weights: Sequence[float], names: Sequence[str], l1: float) -> Record:
    # Very large instead of infinite: JSON has no infinity, and the optimiser cannot use it.
    loss = min(loss, 1e9)
    objective = loss + l1 * fmean(abs(w) for w in weights)
    named = {f"weight/{name}": weight for name, weight in zip(names, weights, strict=True)}
    return {"step": step, "loss": loss, "objective": objective, **named}


def _same(record: Record, weights: Sequence[float], names: Sequence[str], folder: Path) -> Record:
    """The record, if this search asks for the same weights at this step. Raises: UsageError."""
    found = [record.get(f"weight/{name}", float("nan")) for name in names]
    if not all(abs(f - w) <= _CLOSE for f, w in zip(found, weights, strict=True)):
        what = "the log there is of another search: it has other weights at the same step"
        raise UsageError(f"--resume {folder}", what, "Restore its settings, or start again with --overwrite.")
    return record
