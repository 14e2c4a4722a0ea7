"""Training X-LoRA's classifier with the experts in PEFT. The loss is the examples' mean loss.

There are no gates to balance, so `train.balance` is not read.
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
    """A record per training step of the classifier of an attached `XLoraMixture`, as in `fit_gates.fit`.

    Raises: as `loop.train`; RunError if the classifier has no gradient, for example with only one LoRA.
    """
    assert isinstance(mixture, XLoraMixture)

    def loss(batch: Sequence[Any], _: StepContext) -> StepLoss:
        total, count = backbone.example_loss(backbone.collate(batch))
        gates = torch.stack(list(mixture.gates().values())).flatten(0, 1)
        usage = zip(mixture.names, gates.mean(0), strict=True)
        return StepLoss(total, count, {"entropy": entropy(gates).mean(), **{f"gate/{name}": q for name, q in usage}})

    mixture.classifier.train()  # for its dropout, which it has if it has several layers
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
