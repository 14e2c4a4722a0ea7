"""Learning the gates: `L = L_task + α·L_balance`, with everything but the gates frozen (MoLE, Eq. 14-16).

fit             trains the gates of a mixture
calibrate       sets the mean and spread by which gates standardise their features
TaskLoss        the task's loss on some rows, and the gates that it came from
example_task    the task of a language model: its examples
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from molecli.bases.language import seeded
from molecli.functional.gating import balance_loss, entropy
from molecli.methods.gates.gated import InputGate
from molecli.mixture.mixture import Mixture
from molecli.protocols import Backbone, Progress
from molecli.training.examples import Batches
from molecli.training.loop import Record, StepLoss, train
from molecli.training.ranks import StepContext

if TYPE_CHECKING:
    from accelerate import Accelerator

    from molecli.config import TrainConfig

CALIBRATION_BATCHES = 8
# A parameter of each gate that has a gradient from the first step, if the gate acts at all. The other parameters may
# have none: at the uniform start the temperature multiplies zeros, a low-rank head's `down` is multiplied by an `up` of
# zeros, and a feature that is the same for every input (a seq2seq decoder's start token) standardises to zero.
_CHECKED = ("head.bias", "logits", "head.weight")


@dataclass(frozen=True)
class TaskLoss:
    """The sum of the rows' losses, their number, and the gates [M sites, rows of the passes, N], with gradient.

    extras are means over the rows, for the log.
    """

    sum: Tensor
    count: Tensor | int
    gates: Tensor
    extras: Mapping[str, Tensor] = field(default_factory=dict)


# Rows of the training data -> the task's loss on them, with the mixture attached.
Task = Callable[[Sequence[Any]], TaskLoss]


def example_task(backbone: Backbone, mixture: Mixture) -> Task:
    """The task of a language model: the mean losses of its examples."""

    def task(batch: Sequence[Any]) -> TaskLoss:
        total, count = backbone.example_loss(backbone.collate(batch))
        return TaskLoss(total, count, mixture.stacked_gates())

    return task


def fit(
    backbone: Backbone,
    mixture: Mixture,
    examples: Sequence[Any],
    settings: TrainConfig,
    *,
    seed: int,
    folder: Path | str,
    task: Task | None = None,
    resume: bool = False,
    accelerator: Accelerator | None = None,
    progress: Progress | None = None,
) -> list[Record]:
    """A record per training step of an attached, new mixture, with the gates' mean entropy in nats and each expert's
    mean gate (as in the paper's Fig. 5).

    `task` computes the loss of rows of `examples`, by default `example_task`.
    Raises: as `loop.train`; RunError if a gate has no gradient at the first step.
    """
    batches = Batches(examples, batch_size=settings.batch_size, seed=seed)
    with seeded(seed, backbone.device):
        calibrate(backbone, mixture, batches, task)
    task = task or example_task(backbone, mixture)
    parameters = mixture.named_parameters()

    def loss(batch: Sequence[Any], context: StepContext) -> StepLoss:
        found = task(batch)
        usage = context.global_mean(found.gates.flatten(0, 1).mean(0), len(batch))
        regulariser = settings.balance * balance_loss(usage) if settings.balance else None
        extras = {**found.extras, "entropy": entropy(found.gates.detach()).mean()}
        extras |= {f"gate/{name}": q for name, q in zip(mixture.names, usage.detach(), strict=True)}
        return StepLoss(found.sum, found.count, extras, regulariser)

    return train(
        parameters=parameters,
        loss_fn=loss,
        examples=examples,
        settings=settings,
        seed=seed,
        folder=folder,
        resume=resume,
        accelerator=accelerator,
        progress=progress,
        label="gates",
        unchecked=set(parameters) - _checked(mixture, parameters),
    )


def _checked(mixture: Mixture, parameters: Mapping[str, nn.Parameter]) -> set[str]:
    """The name of one parameter of each gate that learns: the first of `_CHECKED` that it has, otherwise its first."""
    found = set()
    for site in mixture.gate_modules():
        own = [name for name in parameters if name.startswith(f"site/{site}/")]
        known = (f"site/{site}/{key}" for key in _CHECKED)
        found.update(next(([name] for name in known if name in own), own[:1]))
    return found


@torch.no_grad()
def calibrate(backbone: Backbone, mixture: Mixture, batches: Batches, task: Task | None = None) -> None:
    """Sets the mean and spread of each gate's features from the first training batches, with uniform gates.

    Every process uses the same whole batches, and the same random numbers if the task needs some, so that all processes
    standardise alike.
    """
    # A given `task` draws noise, so the same rows give other features every time.
    enough = math.inf if task is not None else len(batches.examples) / batches.batch_size
    task = task or example_task(backbone, mixture)
    gates = [gate for gate in mixture.gate_modules().values() if isinstance(gate, InputGate)]
    for gate in gates:
        gate.observe()
    for step in range(1, math.ceil(min(CALIBRATION_BATCHES, enough)) + 1):
        task(batches[step])
    for gate in gates:
        gate.settle()
