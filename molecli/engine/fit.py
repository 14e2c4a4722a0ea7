"""Learning the gates: `L = L_task + α·L_balance`, with everything but the gates frozen (MoLE, Eq. 14-16)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from molecli.backbones.hosting import Mixture
from molecli.compose.gated import InputGate
from molecli.engine.data import Batches
from molecli.engine.loop import Progress, Record, StepLoss, train
from molecli.engine.ranks import StepContext
from molecli.functional.balance import balance_loss
from molecli.functional.gating import entropy
from molecli.protocols import Backbone, Example

if TYPE_CHECKING:
    from accelerate import Accelerator

    from molecli.files.recipe import TrainConfig

CALIBRATION_BATCHES = 8
# One parameter of each gate that has a gradient from the first step if the gate acts at all. The others may have none:
# at the uniform start the temperature multiplies zeros, a low-rank head's `down` meets an `up` of zeros, and a feature
# that is the same for every input (a seq2seq decoder's start token) standardises to zero.
_TELLING = ("head.bias", "logits", "head.weight")


def fit(
    backbone: Backbone,
    mixture: Mixture,
    examples: Sequence[Example],
    settings: TrainConfig,
    *,
    seed: int,
    folder: Path | str,
    resume: bool = False,
    accelerator: Accelerator | None = None,
    progress: Progress | None = None,
) -> list[Record]:
    """Trains the gates of an attached, fresh mixture; returns a record per step, with the gates' mean entropy (nats)
    and each expert's mean gate, the course of the paper's Fig. 5.

    Raises: as `loop.train`; RunError where a gate gets no gradient at the first step.
    """
    calibrate(backbone, mixture, Batches(examples, batch_size=settings.batch_size, seed=seed))
    parameters = mixture.named_parameters()

    def loss(batch: Sequence[Example], context: StepContext) -> StepLoss:
        total, count = backbone.example_loss(backbone.collate(batch))
        gates = mixture.stacked_gates()
        usage = context.global_mean(gates.flatten(0, 1).mean(0), len(batch))
        regulariser = settings.balance * balance_loss(usage) if settings.balance else None
        extras = {"entropy": entropy(gates.detach()).mean()}
        extras |= {f"gate/{name}": q for name, q in zip(mixture.names, usage.detach(), strict=True)}
        return StepLoss(total, count, extras, regulariser)

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
        unchecked=set(parameters) - _telling(mixture, parameters),
    )


def _telling(mixture: Mixture, parameters: Mapping[str, nn.Parameter]) -> set[str]:
    """The name of one parameter per gate, the first of `_TELLING` that it has."""
    candidates = [[f"site/{site}/{key}" for key in _TELLING] for site in mixture.gate_modules()]
    return {next(name for name in names if name in parameters) for names in candidates}


@torch.no_grad()
def calibrate(backbone: Backbone, mixture: Mixture, batches: Batches) -> None:
    """Standardises each gate's features over the first training batches, with the gates still uniform.

    Every process sees the same whole batches, so that all standardise alike.
    """
    gates = [gate for gate in mixture.gate_modules().values() if isinstance(gate, InputGate)]
    for gate in gates:
        gate.observe()
    count = math.ceil(min(CALIBRATION_BATCHES, len(batches.examples) / batches.batch_size))
    for step in range(1, count + 1):
        backbone.example_loss(backbone.collate(batches[step]))
    for gate in gates:
        gate.settle()
