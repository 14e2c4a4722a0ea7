"""Training X-LoRA's classifier, where PEFT hosts the experts: the examples' mean loss and nothing besides.

There are no gates to balance: `train.balance` is not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from molecli.functional.gating import entropy
from molecli.mixture.mixture import Mixture
from molecli.mixture.peft_routed import XLoraMixture
from molecli.protocols import Backbone, Progress
from molecli.training.loop import Record, StepLoss, train
from molecli.training.ranks import StepContext

if TYPE_CHECKING:
    from accelerate import Accelerator

    from molecli.config import TrainConfig


def fit_router(
    backbone: Backbone,
    mixture: Mixture,
    examples: Sequence[Any],
    settings: TrainConfig,
    *,
    seed: int,
    folder: Path | str,
    resume: bool = False,
    accelerator: Accelerator | None = None,
    progress: Progress | None = None,
) -> list[Record]:
    """Trains the classifier of an attached `XLoraMixture`; returns a record per step, as `fit.fit` does.

    Raises: as `loop.train`; RunError where the classifier gets no gradient, as with one LoRA alone.
    """
    assert isinstance(mixture, XLoraMixture)

    def loss(batch: Sequence[Any], _: StepContext) -> StepLoss:
        total, count = backbone.example_loss(backbone.collate(batch))
        gates = torch.stack(list(mixture.gates().values())).flatten(0, 1)
        usage = zip(mixture.names, gates.mean(0), strict=True)
        return StepLoss(total, count, {"entropy": entropy(gates).mean(), **{f"gate/{name}": q for name, q in usage}})

    mixture.classifier.train()  # for the dropout that it has with several layers
    try:
        return train(
            parameters=mixture.named_parameters(),
            loss_fn=loss,
            examples=examples,
            settings=settings,
            seed=seed,
            folder=folder,
            resume=resume,
            accelerator=accelerator,
            progress=progress,
            label="gates",
        )
    finally:
        mixture.classifier.eval()
