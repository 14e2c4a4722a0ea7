"""Prompts that are too long for a text encoder: a warning names the words that are cut."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any


class PromptCut(UserWarning):
    """The warning for a prompt that is too long for the text encoder; the message quotes the words that are cut."""


def warn_of_cuts(prompts: Iterable[str], tokenizers: Sequence[Any]) -> None:
    """Warns once about each prompt that a tokenizer cuts, and quotes the words that its encoder does not see."""
    for prompt in dict.fromkeys(prompts):
        for tokenizer in tokenizers:
            rest = cut_words(prompt, tokenizer)
            if rest:
                limit = tokenizer.model_max_length
                message = f"the text encoder reads only {limit} tokens, and the prompt is longer. Left out: {rest!r}"
                warnings.warn(message, PromptCut, stacklevel=3)
                break  # SDXL's second encoder has the same limit


def cut_words(prompt: str, tokenizer: Any) -> str:
    """The end of `prompt` that does not fit beside the start and end tokens; "" if all of it fits."""
    room = tokenizer.model_max_length - tokenizer.num_special_tokens_to_add()
    encoded = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = encoded["offset_mapping"]
    return prompt[offsets[room][0] :].strip() if len(offsets) > room else ""
