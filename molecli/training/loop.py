"""Training: one loop for gates and for LoRAs, on one process or many, that can be killed and resumed.

    train            runs the steps; returns one record per step
    StepLoss         what a loss function returns
    learning_rate    the schedule, a pure function of the step

Batches, random state and learning rate are pure functions of (seed, step). So a checkpoint holds only parameters and
optimizer state, and on CPU a resumed run repeats an uninterrupted one bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from molecli.errors import RunError, UsageError
from molecli.files.train_log import Record as Record
from molecli.files.train_log import append_records, begin_log
from molecli.protocols import Example, Progress
from molecli.training.checkpoints import (
    FREE_SETTINGS,
    Checkpoint,
    check_same_run,
    discard_checkpoints,
    interrupts_deferred,
    newest_checkpoint,
    save_checkpoint,
)
from molecli.training.examples import Batches
from molecli.training.ranks import StepContext, accelerator_for, share_from_main, sum_gradients

if TYPE_CHECKING:
    from accelerate import Accelerator

    from molecli.config import TrainConfig


@dataclass(frozen=True)
class StepLoss:
    """The *summed* task loss of some examples, and the number of scored tokens (or examples) that it is over.

    extras are means over the examples, for the log; leave them on their device, they are read every log_every steps.

    regulariser is added to the mean task loss. Gradients are summed over ranks, so it is exact over several ranks if
    everything that depends on the batch goes through `context.global_mean`, and everything that depends only on
    parameters is divided by `context.world`. Departs: with several micro batches per step it is the mean of their
    regularisers, weighted by their counts. For a non-linear function of a batch mean that differs from the function of
    the whole batch's mean. The task loss is exact in every case.
    """

    sum: Tensor
    count: Tensor | int | float
    extras: Mapping[str, Tensor | float] = field(default_factory=dict)
    regulariser: Tensor | Callable[[], Tensor] | None = None


LossFunction = Callable[[Sequence[Example], StepContext], StepLoss]
StepCallback = Callable[[int], "Mapping[str, float] | None"]


def train(
    *,
    parameters: Mapping[str, nn.Parameter],
    loss_fn: LossFunction,
    examples: Sequence[Example],
    settings: TrainConfig,
    seed: int,
    folder: Path | str,
    resume: bool = False,
    accelerator: Accelerator | None = None,
    progress: Progress | None = None,
    label: str = "training",
    on_step: StepCallback | None = None,
    gradient_check: Literal["every", "any"] = "every",
    unchecked: Collection[str] = (),
) -> list[Record]:
    """A record for each step (loss, lr, grad_norm, count, extras), also of resumed steps; trains `parameters` in place.

    Writes `train_log.jsonl` and `checkpoints/` (also of the last step) under `folder`. The values from `on_step` are
    added to that step's record. `progress` receives `label`. At the first step every parameter that is not in
    `unchecked` must have a nonzero gradient; with gradient_check="any" one of them must.

    Raises: RunError (no gradient, loss not finite), UsageError (no examples, batch does not divide, another run's
    checkpoint). KeyboardInterrupt is raised after a checkpoint is saved.
    """
    loop = _Loop(
        parameters=dict(parameters),
        loss_fn=loss_fn,
        examples=examples,
        settings=settings,
        seed=seed,
        folder=Path(folder),
        accelerator=accelerator or accelerator_for("auto"),
        gradient_check=gradient_check,
        unchecked=frozenset(unchecked),
    )
    loop.begin(resume=resume)
    try:
        for step in range(loop.completed + 1, settings.steps + 1):
            loop.step(step)
            if on_step is not None:
                loop.note(on_step(step) or {})
            if progress is not None:
                progress(label, step, settings.steps)
            loop.read_and_save()
    except KeyboardInterrupt:
        loop.save_interrupted()
        raise
    return loop.history


def learning_rate(step: int, settings: TrainConfig) -> float:
    """The learning rate of `step` (from 1): linear warm-up, then constant, or linear or cosine decay towards 0."""
    if step <= settings.warmup_steps:
        return settings.lr * step / settings.warmup_steps
    done = (step - 1 - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    if settings.schedule == "linear":
        return settings.lr * (1 - done)
    if settings.schedule == "cosine":
        return settings.lr * 0.5 * (1 + math.cos(math.pi * done))
    return settings.lr


class _Loop:
    """The state of one run between its steps."""

    def __init__(
        self,
        *,
        parameters: dict[str, nn.Parameter],
        loss_fn: LossFunction,
        examples: Sequence[Example],
        settings: TrainConfig,
        seed: int,
        folder: Path,
        accelerator: Accelerator,
        gradient_check: Literal["every", "any"],
        unchecked: frozenset[str],
    ) -> None:
        world = accelerator.num_processes
        if settings.batch_size % world:
            what = f"{settings.batch_size} examples cannot be shared equally by {world} processes"
            raise UsageError("train.batch_size", what, f"Write a multiple of {world}.")
        self.parameters, self.loss_fn, self.settings, self.seed = parameters, loss_fn, settings, seed
        self.folder, self.accelerator = folder, accelerator
        self.gradient_check, self.unchecked = gradient_check, unchecked
        self.batches = Batches(examples, batch_size=settings.batch_size, seed=seed)
        self.optimizer = torch.optim.AdamW(
            list(parameters.values()), lr=settings.lr, weight_decay=settings.weight_decay, fused=True
        )
        self.completed = self.saved = 0
        self.history: list[Record] = []
        # Records whose numbers are still on the device: reading them at each step would stall it.
        self.unread: list[tuple[Record, list[str], Tensor]] = []

    # -- start and resume ------------------------------------------------------------------------------------------

    def begin(self, *, resume: bool) -> None:
        """Loads the newest checkpoint (with `resume`), or removes what an earlier run left."""
        main = self.accelerator.is_main_process
        found = None
        if main and resume:
            found = newest_checkpoint(self.folder)
        elif main:
            discard_checkpoints(self.folder)
        if main:
            self.history = begin_log(self.folder, keep_until=found.step if found else 0)
            # All ranks must start alike even if their initialisation differs: rank 0's state goes to all.
            found = found or Checkpoint(0, {n: p.detach().cpu() for n, p in self.parameters.items()})
        found, self.history = share_from_main((found, self.history), self.accelerator)  # type: ignore[misc]
        assert found is not None
        self.restore(found)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restores a checkpoint's parameters and optimizer state."""
        if checkpoint.step:
            check_same_run(checkpoint, self.identity(), self.folder)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(checkpoint.parameters[name])
        state = {
            index: {key: tensors[name] for key, tensors in checkpoint.optimizer.items()}
            for index, name in enumerate(self.parameters)
            if checkpoint.optimizer
        }
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.completed = self.saved = checkpoint.step

    def identity(self) -> dict[str, Any]:
        """The settings that must not change when a run is resumed."""
        settings = self.settings.model_dump(mode="json", exclude=set(FREE_SETTINGS))
        kept = {f"train.{key}": value for key, value in settings.items()}
        shapes = {name: list(parameter.shape) for name, parameter in self.parameters.items()}
        hashes = {"hash of the training data": self.batches.digest, "hash of the parameters' shapes": _digest(shapes)}
        return kept | {"seed": self.seed} | hashes

    # -- one step --------------------------------------------------------------------------------------------------

    def step(self, step: int) -> None:
        """One optimizer step over one global batch; its record stays on the device."""
        context = StepContext(step, self.accelerator)
        rate = learning_rate(step, self.settings)
        _seed(_step_seed(self.seed, step, self.accelerator.process_index), self.accelerator.device)
        self.optimizer.zero_grad(set_to_none=True)
        try:
            means = self.backward(context)
        except torch.OutOfMemoryError:
            size = self.settings.micro_batch_size or self.settings.batch_size // context.world
            remedy = f"Write --set train.micro_batch_size={max(1, size // 2)}."
            raise RunError(f"train step {step}", f"{size} examples at once do not fit in memory", remedy) from None
        if step == 1:
            self.check_gradients()
        parameters = list(self.parameters.values())
        clip = self.settings.grad_clip or math.inf
        norm = nn.utils.clip_grad_norm_(parameters, clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        numbers = torch.stack([*means.values(), norm.float().to(self.accelerator.device)])
        with interrupts_deferred():
            self.optimizer.step()
            self.completed = step
            self.unread.append(({"step": step, "lr": rate}, [*means, "grad_norm"], numbers))

    def backward(self, context: StepContext) -> dict[str, Tensor]:
        """The step's means over all ranks. Leaves the whole batch's gradient in the parameters."""
        sums: dict[str, Tensor] = {}
        for examples in self.micro_batches(context.step):
            loss = self.loss_fn(examples, context)
            count = torch.as_tensor(loss.count, dtype=torch.float32, device=self.accelerator.device).detach()
            objective, logged = loss.sum.float(), {"loss": loss.sum.detach().float(), "count": count}
            if loss.regulariser is not None:
                regulariser = loss.regulariser() if callable(loss.regulariser) else loss.regulariser
                # Gradients are divided by the global count at the end. So the regulariser is multiplied by the count
                # of this micro batch over all ranks, and one backward pass is enough for both terms.
                objective = objective + context.total(count) * regulariser
                logged["regulariser"] = count * regulariser.detach()
            objective.backward()
            for name, value in loss.extras.items():
                mean = torch.as_tensor(value, dtype=torch.float32, device=count.device).detach()
                logged[name] = mean * len(examples)
            for name, value in logged.items():
                sums[name] = sums[name] + value if name in sums else value.float()
        return self.normalise(sums, context)

    def normalise(self, sums: Mapping[str, Tensor], context: StepContext) -> dict[str, Tensor]:
        """Adds gradients and sums over the ranks and divides both by the global count."""
        totals = dict(zip(sums, context.total(torch.stack(list(sums.values()))), strict=True))
        count = totals["count"]
        sum_gradients(self.parameters.values(), self.accelerator)
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        for gradient in gradients:
            gradient.div_(count)
        divisors = {"count": 1, "loss": count, "regulariser": count}
        return {name: total / divisors.get(name, self.settings.batch_size) for name, total in totals.items()}

    def micro_batches(self, step: int) -> Iterator[Sequence[Example]]:
        """This rank's share of the step's batch, in pieces of at most micro_batch_size examples."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        batch = self.batches[step]
        size = (self.settings.micro_batch_size or len(batch)) * world
        # Cut first, then share: then every rank has the same number of pieces, as collective operations need.
        for start in range(0, len(batch), size):
            yield batch[start : start + size][rank::world]

    def check_gradients(self) -> None:
        """Raises: RunError that names parameters that should learn but have no gradient."""
        checked = [name for name in self.parameters if name not in self.unchecked]
        grads = {name: self.parameters[name].grad for name in checked}
        dead = [name for name, grad in grads.items() if grad is None or not bool(grad.any())]
        if dead and (self.gradient_check == "every" or len(dead) == len(checked)):
            shown = ", ".join(dead[:3]) + (f" and {len(dead) - 3} more" if len(dead) > 3 else "")
            what = f"no gradient reaches {shown}: training would not change it"
            raise RunError("train step 1", what, "Check that it is used by the model and that targets are not empty.")

    # -- records and checkpoints -----------------------------------------------------------------------------------

    def note(self, values: Mapping[str, float]) -> None:
        """Adds values to the newest step's record."""
        self.unread[-1][0].update(values)

    def read_and_save(self) -> None:
        """Reads records every log_every steps, and saves every checkpoint_every steps and at the last step."""
        last = self.completed == self.settings.steps
        due = last or self.completed % self.settings.checkpoint_every == 0
        with interrupts_deferred():
            if due or self.completed == 1 or self.completed % self.settings.log_every == 0:
                self.read()
            if due:
                self.save()

    def read(self) -> None:
        """Moves unread records to the host and the log. Raises: RunError if a loss or gradient is not finite."""
        if not self.unread:
            return
        numbers = torch.cat([row for _, _, row in self.unread]).tolist()
        records: list[Record] = []
        for record, names, row in self.unread:
            values, numbers = numbers[: len(row)], numbers[len(row) :]
            records.append(record | dict(zip(names, values, strict=True)))
        self.unread = []
        for record in records:
            self.check_finite(record)
        self.history += records
        if self.accelerator.is_main_process:
            append_records(self.folder, records)

    def check_finite(self, record: Record) -> None:
        """Raises: RunError if the record's loss or gradient norm is not finite."""
        where = f"train step {record['step']:.0f}"
        if record["count"] == 0:
            raise RunError(where, "the batch has no scored token", "Check that the training targets are not empty.")
        for name, words in (("loss", "loss"), ("regulariser", "regulariser"), ("grad_norm", "gradient norm")):
            if not math.isfinite(record.get(name, 0.0)):
                kept = f" The checkpoint of step {self.saved} is kept." if self.saved else ""
                lr = f"Lower train.lr (now {self.settings.lr:g})"
                remedy = f"{lr}, lengthen train.warmup_steps or use --dtype float32."
                raise RunError(where, f"the {words} is {record[name]}", remedy + kept)

    def save(self) -> None:
        """Writes a checkpoint of the last completed step, in the main process."""
        if self.completed == self.saved:
            return
        if self.accelerator.is_main_process:
            optimizer: dict[str, dict[str, Tensor]] = {}
            for name, parameter in self.parameters.items():
                for key, value in self.optimizer.state[parameter].items():
                    optimizer.setdefault(key, {})[name] = value
            detached = {name: parameter.detach() for name, parameter in self.parameters.items()}
            save_checkpoint(self.folder, Checkpoint(self.completed, detached, optimizer, self.identity()))
        self.saved = self.completed

    def save_interrupted(self) -> None:
        """Saves the completed steps of an interrupted run, unless their losses are not finite."""
        try:
            self.read()
        except RunError:
            return
        self.save()


def _seed(seed: int, device: torch.device) -> None:
    # Not torch.manual_seed: without a GPU, each call queues a call with a stack trace for every kind of device.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _step_seed(seed: int, step: int, rank: int) -> int:
    """A seed for this step and rank, unrelated to its neighbours'. Ranks differ, so that their dropout differs."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()[:8], "big") >> 1
