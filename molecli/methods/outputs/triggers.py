"""How much of a prompt is about each LoRA's trigger, by the base's text encoder: the weights of prompt-aware methods.

ē(text) is the mean over all positions of the encoded text, padding included. Source: W-Switch and W-Composite,
arXiv 2606.03792, and its code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from molecli.errors import RunError

Encode = Callable[[Sequence[str]], Tensor]


def without(prompt: str, trigger: str) -> str:
    """P∖trigger: the prompt without the phrases of the trigger (ignoring case) and without superfluous commas.

    A trigger's phrases are separated by commas. Each is removed only as whole words ("owl" does not change "bowl").
    """
    for phrase in filter(None, (part.strip() for part in trigger.split(","))):
        pattern = r"\s+".join(re.escape(word) for word in phrase.split())
        prompt = re.sub(rf"(?<!\w){pattern}(?!\w)", "", prompt, flags=re.IGNORECASE)
    prompt = re.sub(r"\s*(?:,\s*)+", ", ", prompt)
    return re.sub(r"\s+", " ", prompt).strip(" ,")


def same_words(prompt: str, other: str) -> bool:
    """Whether two prompts differ only in spaces and commas."""
    return without(prompt, "") == without(other, "")


def likeness(prompt: str, texts: Sequence[str], encode: Encode) -> Tensor:
    """[N], cos(ē(prompt), ē(text)) for every text, in float32 on the CPU; `encode` gives [P, T, d]."""
    means = encode([prompt, *texts]).detach().float().mean(1).cpu()
    return torch.cosine_similarity(means[:1], means[1:], dim=-1)


def prepared(weights: Tensor | None, mode: str) -> Tensor:
    """The weights. Raises: RunError if no prompt was prepared."""
    if weights is None:
        what = "no prompt was given yet, and its weights depend on the prompt"
        raise RunError(f"mode {mode}", what, "Call prepare(prompt) before the pipeline.")
    return weights
