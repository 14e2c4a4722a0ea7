"""W-Composite: Composite weighted by how much the prompt is about each LoRA. Source: arXiv 2606.03792 and its code.

w_i = cos(ē(trigger_i), ē(P)), normalised; Σ w_i [u_i + g(c_i − u_i)] / Σ w_i: the weighted mean of both halves, to
which the pipeline applies guidance. N passes. Departs: ē uses only the base, where the code encodes with the loaded
LoRAs; a negative cosine counts as 0; if no cosine is positive (no weights in the formula), all weights are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from molecli.config import MethodConfig
from molecli.methods.outputs.branch_weights import kept, mean_weights, one_each
from molecli.methods.outputs.by_name import words
from molecli.methods.outputs.triggers import likeness, prepared
from molecli.protocols import Moment, OutputMethod


def method(
    names: Sequence[str],
    weights: Tensor,
    config: MethodConfig,
    *,
    triggers: Mapping[str, str],
    kinds: Mapping[str, str],
) -> OutputMethod:
    """W-Composite with the experts' triggers."""
    return WComposite(weights, words("w_composite", names, triggers))


class WComposite:
    """An `OutputMethod` with a branch for each kept expert. weights: [N]; triggers: one per expert."""

    reads_prompt = True

    def __init__(self, weights: Tensor, triggers: Sequence[str]) -> None:
        self.weights, self.triggers = weights, tuple(triggers)
        self.shares: Tensor | None = None

    def prepare(self, prompt: str, encode: Callable[[Sequence[str]], Tensor]) -> None:
        """Sets `shares` [N] to the cosines; those of kept experts are normalised when they are used."""
        self.shares = likeness(prompt, self.triggers, encode)

    def text_weights(self, keep: Tensor | None) -> Tensor:
        """[N], see `mean_weights`."""
        return mean_weights(self.weights, keep)

    def branches(self, moment: Moment, keep: Tensor | None) -> Tensor:
        """[K, N], a branch for each kept expert, with its own weight."""
        return one_each(self.weights, kept(range(len(self.weights)), keep))

    def combine(self, outputs: Tensor, moment: Moment, keep: Tensor | None) -> Tensor:
        """The weighted mean over the branches. Raises: RunError before a prompt is prepared."""
        experts = kept(range(len(self.weights)), keep)
        if not experts:
            return outputs[0]
        shares = prepared(self.shares, "w_composite")[experts]
        shares = shares.clamp_min(0.0)
        total = float(shares.sum())
        shares = shares / total if total > 1e-6 else torch.full_like(shares, 1 / len(experts))
        return torch.tensordot(shares.to(outputs), outputs, dims=1)
