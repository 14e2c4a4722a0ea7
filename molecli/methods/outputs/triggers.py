"""How much of a prompt each LoRA's trigger is, by the base's text encoder: what the prompt-aware methods weigh by.

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
    """P∖trigger: the prompt less every phrase of the trigger, whatever the case, and less the commas left over.

    A trigger's phrases stand between commas; each is removed as whole words only ("owl" leaves "bowl" alone).
    """
    for phrase in filter(None, (part.strip() for part in trigger.split(","))):
        pattern = r"\s+".join(re.escape(word) for word in phrase.split())
        prompt = re.sub(rf"(?<!\w){pattern}(?!\w)", "", prompt, flags=re.IGNORECASE)
    prompt = re.sub(r"\s*(?:,\s*)+", ", ", prompt)
    return re.sub(r"\s+", " ", prompt).strip(" ,")


def same_words(prompt: str, other: str) -> bool:
    """Whether two prompts differ in spaces and commas at most."""
    return without(prompt, "") == without(other, "")


def likeness(prompt: str, texts: Sequence[str], encode: Encode) -> Tensor:
    """[N], cos(ē(prompt), ē(text)) for every text, in float32 on the CPU; `encode` gives [P, T, d]."""
    means = encode([prompt, *texts]).detach().float().mean(1).cpu()
    return torch.cosine_similarity(means[:1], means[1:], dim=-1)


def prepared(weights: Tensor | None, mode: str) -> Tensor:
    """`weights`, if a prompt was looked at. Raises: RunError that says how."""
    if weights is None:
        what = "no prompt was given yet, and its weights depend on the prompt"
        raise RunError(f"mode {mode}", what, "Call prepare(prompt) before the pipeline.")
    return weights
