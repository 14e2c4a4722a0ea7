"""Switch: one LoRA at a time, taking turns every τ denoising steps. Source: Multi-LoRA Composition, arXiv 2402.16843.

At step t = 1, 2, ... the kept expert number i(t) = ⌊((t−1) mod Nτ)/τ⌋ + 1 is active: one pass per step.
Departs: the published code changes LoRAs one step later (its callback runs after the step), so the first has τ+1 steps;
it also resets every weight to 1. This follows the paper and keeps the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from molecli.config import MethodConfig
from molecli.methods.outputs.branch_weights import kept, mean_weights, one_each
from molecli.methods.outputs.by_name import turns
from molecli.protocols import Moment, OutputMethod


def method(
    names: Sequence[str],
    weights: Tensor,
    config: MethodConfig,
    *,
    triggers: Mapping[str, str],
    kinds: Mapping[str, str],
) -> OutputMethod:
    """Switch with the recipe's order of LoRAs."""
    return Switch(weights, turns=turns(config.order, names), tau=config.tau)


class Switch:
    """An `OutputMethod` with one branch. weights: [N]; turns: the experts' indices in order; tau: steps per turn."""

    reads_prompt = False

    def __init__(self, weights: Tensor, *, turns: Sequence[int] | None = None, tau: int = 5) -> None:
        self.weights = weights
        self.turns = tuple(range(len(weights)) if turns is None else turns)
        self.tau = tau

    def prepare(self, prompt: str, encode: Callable[[Sequence[str]], Tensor]) -> None:
        """Does nothing: every prompt has the same schedule."""

    def text_weights(self, keep: Tensor | None) -> Tensor:
        """[N], see `mean_weights`."""
        return mean_weights(self.weights, keep)

    def branches(self, moment: Moment, keep: Tensor | None) -> Tensor:
        """[1, N], the weight of the expert whose turn it is."""
        turns = kept(self.turns, keep)
        if not turns:
            return one_each(self.weights, [])
        return one_each(self.weights, [turns[moment.index % (len(turns) * self.tau) // self.tau]])

    def combine(self, outputs: Tensor, moment: Moment, keep: Tensor | None) -> Tensor:
        """The one branch's output."""
        return outputs[0]
