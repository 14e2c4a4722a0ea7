"""A toy training task, shared by the tests and by the worker processes they kill or pair up.

Tokens are letters; the model is a small gated network, so that it has a task loss and a balance loss like real gates.
Run as a program it trains and prints nothing; `python toy.py --help` lists its options.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn

from molecli.config import TrainConfig
from molecli.functional.gating import balance_loss
from molecli.protocols import Example
from molecli.training.loop import StepLoss, train
from molecli.training.ranks import StepContext

WIDTH, EXPERTS = 6, 3


def toy_examples(count: int = 20) -> list[Example]:
    """Examples of unequal length, so that a mean of means is not the mean."""
    return [Example("toy", chr(97 + i), "xyz"[: 1 + i % 3]) for i in range(count)]


def toy_settings(**changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "steps": 8, "batch_size": 4, "lr": 0.01, "warmup_steps": 2, "balance": 0.1, "checkpoint_every": 3,
        "log_every": 2,
    }  # fmt: skip
    return TrainConfig(**(values | changes))


class Toy(nn.Module):
    """Experts are random matrices; a gate learns from each example's features which to use."""

    def __init__(self, *, dropout: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.gate = nn.Linear(WIDTH, EXPERTS)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        self.experts = torch.randn(EXPERTS, WIDTH, generator=generator)
        self.table = torch.randn(128, WIDTH, generator=generator)
        self.dropout = nn.Dropout(dropout)

    def features(self, examples: Sequence[Example]) -> Tensor:
        return self.table[torch.tensor([ord(example.prompt) for example in examples])]

    def loss(self, examples: Sequence[Example], context: StepContext, *, balance: float = 0.1) -> StepLoss:
        x = self.features(examples)
        gates = self.gate(self.dropout(x)).softmax(-1)
        tokens = torch.tensor([float(len(example.target)) for example in examples])
        errors = ((gates @ self.experts - x).square().sum(-1) * tokens).sum()
        usage = context.global_mean(gates.mean(0), len(examples))
        entropy = -(gates * gates.log()).sum(-1).mean().detach()
        return StepLoss(errors, tokens.sum(), {"entropy": entropy}, balance * balance_loss(usage))


def train_toy(folder: Path, toy: Toy, **options: Any) -> list[dict[str, float]]:
    """Trains a toy on CPU; `settings`, `loss_fn` and every option of `train` can be given."""
    values: dict[str, Any] = {
        "parameters": dict(toy.named_parameters()), "loss_fn": toy.loss, "examples": toy_examples(),
        "settings": toy_settings(), "seed": 3, "folder": folder, "accelerator": Accelerator(cpu=True),
    }  # fmt: skip
    return train(**(values | options))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--micro", type=int, default=None)
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    toy = Toy(dropout=arguments.dropout)

    def loss(examples: Sequence[Example], context: StepContext) -> StepLoss:
        time.sleep(arguments.pause)
        return toy.loss(examples, context)

    settings = toy_settings(steps=arguments.steps, micro_batch_size=arguments.micro)
    train_toy(arguments.folder, toy, settings=settings, loss_fn=loss, resume=arguments.resume)
    if Accelerator(cpu=True).is_main_process:
        save_file({name: p.detach() for name, p in toy.named_parameters()}, arguments.folder / "result.safetensors")


if __name__ == "__main__":
    main()
