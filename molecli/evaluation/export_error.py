"""A composition and its export on the same inputs: their losses, and the differences between them.

Observed     the results of one method on the inputs
ExportError   the base, the composition and its export
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from molecli.functional.bootstrap import Interval, paired_bootstrap

SAMPLES = 1000


@dataclass(frozen=True)
class Observed:
    """losses {task: [inputs]}; gates {site: [inputs, N]}, if asked for; latents [pictures, C, h, w]."""

    losses: Mapping[str, Tensor] = field(default_factory=dict)
    gates: Mapping[str, Tensor] = field(default_factory=dict)
    latents: Tensor | None = None


@dataclass(frozen=True)
class ExportError:
    """The results of the base, the original (called `mode`) and the export on the same inputs.

    of: what the inputs are; unit: what the loss is.
    """

    mode: str
    of: str
    unit: str
    base: Observed
    original: Observed
    export: Observed
    seed: int = 0

    @property
    def losses(self) -> dict[str, float]:
        """Mean over tasks of the mean loss, by method; empty if no loss was measured."""
        named = {"base": self.base, self.mode: self.original, "export": self.export}
        return {name: _mean(observed.losses) for name, observed in named.items() if observed.losses}

    @property
    def loss_inputs(self) -> int:
        return sum(map(len, self.export.losses.values()))

    @property
    def loss_difference(self) -> Interval | None:
        """The export's loss minus the original's, resampled over inputs."""
        if not self.export.losses:
            return None
        first, second = list(self.export.losses.values()), list(self.original.losses.values())
        generator = torch.Generator().manual_seed(self.seed)
        return paired_bootstrap(first, second, generator=generator, samples=SAMPLES)

    @property
    def latent_differences(self) -> dict[str, float]:
        """Mean absolute difference of the drawn latents from the original's; empty if nothing was drawn."""
        if self.original.latents is None:
            return {}
        own = self.original.latents
        named = {"base": self.base.latents, "export": self.export.latents}
        return {name: (found - own).abs().mean().item() for name, found in named.items() if found is not None}

    def document(self) -> dict[str, Any]:
        """The comparison as JSON stores it."""
        difference = self.loss_difference
        pictures = 0 if self.original.latents is None else len(self.original.latents)
        named = {"base": self.base, self.mode: self.original, "export": self.export}
        return {
            "unit": self.unit,
            "inputs": self.loss_inputs,
            "loss": self.losses,
            "loss_difference": None
            if difference is None
            else {"first": "export", "second": self.mode, **_of(difference)},
            "by_task": {
                task: {name: observed.losses[task].mean().item() for name, observed in named.items()}
                for task in self.export.losses
            },
            "pictures": pictures,
            "latent_difference": self.latent_differences,
        }

    def lines(self) -> list[str]:
        """The comparison as text."""
        lines, difference = [], self.loss_difference
        if difference is not None:
            losses = ", ".join(f"{name} {loss:.4f}" for name, loss in self.losses.items())
            change = f"{difference.estimate:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"
            lines.append(f"loss      {losses}: {self.unit}, {self.loss_inputs} {self.of}")
            lines.append(f"          export minus {self.mode} {change}, 95% interval over the {self.of}")
        if self.latent_differences:
            apart = self.latent_differences
            count = len(self.original.latents) if self.original.latents is not None else 0
            lines.append(
                f"latents   mean difference from {self.mode}: export {apart['export']:.4f}, base {apart['base']:.4f}, "
                f"{count} pictures drawn"
            )
        return lines


def _mean(losses: Mapping[str, Tensor]) -> float:
    return torch.stack([values.double().mean() for values in losses.values()]).mean().item()


def _of(interval: Interval) -> dict[str, float]:
    return {"difference": interval.estimate, "low": interval.low, "high": interval.high, "level": interval.level}
