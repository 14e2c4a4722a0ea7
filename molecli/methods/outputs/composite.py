"""Composite: each LoRA runs alone, and their outputs are averaged. Source: Multi-LoRA Composition, arXiv 2402.16843.

mean_i u_i + g·mean_i(c_i − u_i): the mean over the experts of both halves, to which the pipeline applies the guidance
scale g; N passes.
Departs: without guidance the published code keeps only the last LoRA's output; here it is the mean in that case too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from molecli.config import MethodConfig
from molecli.methods.outputs.branch_weights import kept, mean_weights, one_each
from molecli.protocols import Moment, OutputMethod


def method(
    names: Sequence[str],
    weights: Tensor,
    config: MethodConfig,
    *,
    triggers: Mapping[str, str],
    kinds: Mapping[str, str],
) -> OutputMethod:
    """Composite over all experts."""
    return Composite(weights)


class Composite:
    """An `OutputMethod` with a branch for each kept expert. weights: [N]."""

    reads_prompt = False

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights

    def prepare(self, prompt: str, encode: Callable[[Sequence[str]], Tensor]) -> None:
        """Does nothing: the method does not depend on the prompt."""

    def text_weights(self, keep: Tensor | None) -> Tensor:
        """[N], see `mean_weights`."""
        return mean_weights(self.weights, keep)

    def branches(self, moment: Moment, keep: Tensor | None) -> Tensor:
        """[K, N], a branch for each kept expert, with its own weight."""
        return one_each(self.weights, kept(range(len(self.weights)), keep))

    def combine(self, outputs: Tensor, moment: Moment, keep: Tensor | None) -> Tensor:
        """The mean over the branches."""
        return outputs.mean(0)
