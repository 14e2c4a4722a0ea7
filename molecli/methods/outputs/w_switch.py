"""W-Switch: Switch with longer turns for LoRAs that matter more to the prompt. Source: arXiv 2606.03792 and its code.

w_i ∝ max(1 − cos(ē(P), ē(P∖trigger_i)), 0.05): how much the prompt changes without the trigger. Expert i's block has
b_i = max(1, round(τ w_i / max w)) steps, halves to even. The blocks take turns; the last 5 steps are for the character.
One pass per step. Departs: ē uses only the base, where the code encodes with the LoRA that is loaded; a prompt that
consists only of the trigger is compared with the empty prompt, where the code sets 2; the code's callback is one step
late; the code raises if no LoRA is a character, while here the turns then go on to the end.
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
    """W-Switch with the experts' triggers; the last steps are for the first LoRA of kind `character`."""
    order = turns(config.order, names)
    characters = [turn for turn in order if kinds.get(names[turn]) == CHARACTER]
    spoken = words("w_switch", names, triggers)
    return WSwitch(weights, spoken, turns=order, tau=config.tau, characters=characters)


class WSwitch:
    """An `OutputMethod` with one branch. weights: [N]; triggers: one per expert; turns, characters: experts' indices.

    If a trigger is not in a prompt, its expert gets the smallest share, 0.05, and there is a warning: a prompt can be
    about only some of the LoRAs.
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
                what = f"w_switch: the prompt {prompt!r} lacks the trigger {trigger!r}; its LoRA gets the fewest steps"
                warnings.warn(what, UserWarning, stacklevel=2)
        lost = (1 - likeness(prompt, rests, encode)).clamp_min(LEAST)
        self.shares = lost / lost.sum()

    def text_weights(self, keep: Tensor | None) -> Tensor:
        """[N], see `mean_weights`."""
        return mean_weights(self.weights, keep)

    def blocks(self, turns: Sequence[int]) -> list[int]:
        """The number of steps of each expert of `turns`; with equal shares the same as in Switch. Raises: RunError."""
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
