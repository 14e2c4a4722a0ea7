"""From prompt and target to tokens of a causal model, with or without a chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

# Stands in for an assistant's answer to find what the template puts behind one.
_PROBE = "mole0probe"


@dataclass(frozen=True)
class PromptFormat:
    """How prompts and targets become tokens. The prompt's tokens never depend on the target.

    With a chat template: prompt = the user's turn and the opening of the assistant's, target = the answer and its end
    of turn. Without one: the target follows the prompt after a space, unless the prompt ends in white space.
    """

    tokenizer: Any
    chat: bool
    stop: tuple[int, ...]

    def prompt_ids(self, prompt: str) -> list[int]:
        """What the model is given, in training and in generation alike."""
        # The template writes the bos token itself; the tokenizer would add a second one.
        ids = self._ids(self._prompt_text(prompt), special=not self.chat)
        return ids or [self._start]

    def target_ids(self, prompt: str, target: str) -> list[int]:
        """What the model is to say after `prompt`, up to and including the token that ends it."""
        before, said = self._prompt_text(prompt), self._delimiter(prompt) + target
        given = self._ids(before, special=not self.chat)
        joined = self._ids(before + said, special=not self.chat)
        # Tokenised together, as the model has seen text, unless a token would then straddle the border.
        if joined[: len(given)] == given and (given or not said):
            answer = joined[len(given) :]
        else:
            answer = self._ids(said, special=False)
        return answer + list(self.ending_ids)

    def completion(self, prompt: str, ids: Sequence[int]) -> str:
        """The text of generated ids: specials removed, and the space that belongs between prompt and target."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).removeprefix(self._delimiter(prompt))

    @cached_property
    def ending_ids(self) -> tuple[int, ...]:
        """What closes an answer: the template's end of turn up to its stop token, or eos."""
        ids = self._ids(self._turn_end, special=False) if self.chat else []
        special = (i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special)
        ends = {*self.stop, *special}
        place = next((i for i, token in enumerate(ids) if token in ends), None)
        return (*ids, self.tokenizer.eos_token_id) if place is None else tuple(ids[: place + 1])

    @cached_property
    def _turn_end(self) -> str:
        turns = [{"role": "user", "content": "-"}, {"role": "assistant", "content": _PROBE}]
        return self.tokenizer.apply_chat_template(turns, tokenize=False).rpartition(_PROBE)[2]

    @property
    def _start(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    def _prompt_text(self, prompt: str) -> str:
        if not self.chat:
            return prompt
        turns = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    def _delimiter(self, prompt: str) -> str:
        return "" if self.chat or not prompt or prompt[-1].isspace() else " "

    def _ids(self, words: str, *, special: bool) -> list[int]:
        return self.tokenizer(words, add_special_tokens=special)["input_ids"] if words or special else []
