"""W-Switch: Switch whose blocks are as long as the prompt needs each LoRA. Source: arXiv 2606.03792 and its code.

w_i ∝ max(1 − cos(ē(P), ē(P∖trigger_i)), 0.05), what the prompt loses without the trigger; expert i's block is
b_i = max(1, round(τ w_i / max w)) steps, halves to even; the blocks take turns; the last 5 steps are the character's.
One pass a step. Departs: ē is the base's own, where the code encodes with whichever LoRA is loaded; a prompt that is
nothing but the trigger is compared with the empty one, where the code sets 2; the code's callback lags one step and it
raises where no LoRA is a character's, whereas here nobody's then are the last steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from molecli.config import MethodConfig
from molecli.methods.outputs.branch_weights import kept, mean_weights, one_each
from molecli.methods.outputs.by_name import turns, words
from molecli.methods.outputs.triggers import likeness, prepared, same_words, without
from molecli.protocols import Moment, OutputMethod

LEAST = 0.05
LAST_STEPS = 5
CHARACTER = "character"


def method(
    names: Sequence[str],
    weights: Tensor,
    config: MethodConfig,
    *,
    triggers: Mapping[str, str],
    kinds: Mapping[str, str],
) -> OutputMethod:
    """W-Switch by the experts' triggers; the last steps are for those of kind `character`."""
    order = turns(config.order, names)
    characters = [turn for turn in order if kinds.get(names[turn]) == CHARACTER]
    spoken = words("w_switch", names, triggers)
    return WSwitch(weights, spoken, turns=order, tau=config.tau, characters=characters)


class WSwitch:
    """An `OutputMethod` with one branch: `weights` [N], a trigger each, the experts' `turns`, and the `character`.

    A trigger that is not in a prompt gives its expert the least share, 0.05, and a warning: a prompt may be about some
    of the LoRAs only.
    """

    reads_prompt = True

    def __init__(
        self,
        weights: Tensor,
        triggers: Sequence[str],
        *,
        turns: Sequence[int] | None = None,
        tau: int = 5,
        characters: Sequence[int] = (),
    ) -> None:
        self.weights, self.triggers = weights, tuple(triggers)
        self.turns = tuple(range(len(weights)) if turns is None else turns)
        self.tau, self.characters = tau, tuple(characters)
        self.shares: Tensor | None = None

    def prepare(self, prompt: str, encode: Callable[[Sequence[str]], Tensor]) -> None:
        """Sets `shares` [N], which sum to 1."""
        rests = [without(prompt, trigger) for trigger in self.triggers]
        for trigger, rest in zip(self.triggers, rests, strict=True):
            if same_words(prompt, rest):
                what = f"w_switch: the prompt {prompt!r} has no {trigger!r}: its LoRA gets the fewest steps"
                warnings.warn(what, UserWarning, stacklevel=2)
        lost = (1 - likeness(prompt, rests, encode)).clamp_min(LEAST)
        self.shares = lost / lost.sum()

    def text_weights(self, keep: Tensor | None) -> Tensor:
        """[N], see `mean_weights`."""
        return mean_weights(self.weights, keep)

    def blocks(self, turns: Sequence[int]) -> list[int]:
        """Steps of each expert of `turns` before the next one's; equal shares make Switch's. Raises: RunError."""
        shares = prepared(self.shares, "w_switch")[list(turns)]
        return torch.round(self.tau * shares / shares.max()).clamp_min(1).int().tolist()

    def branches(self, moment: Moment, keep: Tensor | None) -> Tensor:
        """[1, N], the weight of the expert whose step it is. Raises: RunError before a prompt is prepared."""
        turns = kept(self.turns, keep)
        if not turns:
            return one_each(self.weights, [])
        character = kept(self.characters, keep)
        if character and moment.index >= moment.total - LAST_STEPS:
            return one_each(self.weights, character[:1])
        schedule = [expert for expert, steps in zip(turns, self.blocks(turns), strict=True) for _ in range(steps)]
        return one_each(self.weights, [schedule[moment.index % len(schedule)]])

    def combine(self, outputs: Tensor, moment: Moment, keep: Tensor | None) -> Tensor:
        """The one branch's output."""
        return outputs[0]
