"""Prompts longer than a text encoder takes: what of them is cut, said and never silent."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any


class PromptCut(UserWarning):
    """A prompt is longer than the text encoder takes; the message says exactly which words are left out."""


def warn_of_cuts(prompts: Iterable[str], tokenizers: Sequence[Any]) -> None:
    """Warns once of each prompt that a tokenizer cuts, naming the words that its encoder never sees."""
    for prompt in dict.fromkeys(prompts):
        for tokenizer in tokenizers:
            rest = cut_words(prompt, tokenizer)
            if rest:
                limit = tokenizer.model_max_length
                message = f"the text encoder takes {limit} tokens, and the prompt is longer. Left out: {rest!r}"
                warnings.warn(message, PromptCut, stacklevel=3)
                break  # the second encoder of SDXL takes as many


def cut_words(prompt: str, tokenizer: Any) -> str:
    """The end of `prompt` that does not fit beside the start and end tokens; "" where all of it does."""
    room = tokenizer.model_max_length - tokenizer.num_special_tokens_to_add()
    encoded = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = encoded["offset_mapping"]
    return prompt[offsets[room][0] :].strip() if len(offsets) > room else ""
