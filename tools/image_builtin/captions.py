"""The caption language's vocabulary, and captions as token ids built in batches on the device.

The captions themselves are made in `molecli.suites._captions`, which the suite `emoji` uses too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from molecli.suites._captions import article, caption

from .data import Objects

__all__ = ["EXTRA_WORDS", "LENGTH", "CaptionIds", "article", "caption", "caption_ids", "vocabulary"]

LENGTH = 32
# Words that no caption of the base uses: triggers for LoRAs, and what people write in prompts.
EXTRA_WORDS = ("sks", "zwx", "ohwx", "qrz", "vpt", "photo", "picture", "drawing", "emoji", "style", "of", "with")


def vocabulary(objects: Objects) -> tuple[str, ...]:
    """Every word of the language; each becomes one token."""
    phrases = [word for phrase in objects.phrases for word in phrase.split()]
    ordered = ["a", "an", "and", "in", objects.style, *EXTRA_WORDS, *phrases, *objects.words]
    return tuple(dict.fromkeys(ordered))


@dataclass(frozen=True)
class CaptionIds:
    """Token ids of captions, from tables on the device: the same as from the tokenizer, without strings."""

    names: Tensor  # [objects, 2] article and word
    phrases: Tensor  # [backgrounds, longest], -1 after the end
    comma: int
    conjunction: int
    style: Tensor  # [3]
    start: int
    end: int

    def __call__(self, which: Tensor, background: Tensor, flat: Tensor) -> Tensor:
        """Ids [B, LENGTH] of scenes: objects [B, K] (-1: none), backgrounds [B] (-1: not named), `flat` [B] bool."""
        batch, slots = which.shape
        count = (which >= 0).sum(1)
        parts = [torch.full((batch, 1), self.start, device=which.device)]
        for slot in range(slots):
            present = (which[:, slot] >= 0).unsqueeze(1)
            parts.append(torch.where(present, self.names[which[:, slot].clamp_min(0)], -1))
            left = count - slot - 1
            joint = torch.where(left > 1, self.comma, torch.where(left == 1, self.conjunction, -1))
            parts.append(joint.unsqueeze(1))
        parts.append(torch.where(flat.unsqueeze(1), self.style, -1))
        parts.append(torch.where((background >= 0).unsqueeze(1), self.phrases[background.clamp_min(0)], -1))
        ids = torch.cat(parts, dim=1)
        order = (ids < 0).long().argsort(dim=1, stable=True)
        ids = ids.gather(1, order)
        ids = torch.nn.functional.pad(ids, (0, max(0, LENGTH - ids.shape[1])), value=-1)[:, :LENGTH]
        return torch.where(ids < 0, self.end, ids)

    def empty(self, batch: int) -> Tensor:
        """Ids [batch, LENGTH] of the empty caption."""
        ids = torch.full((batch, LENGTH), self.end, device=self.names.device)
        ids[:, 0] = self.start
        return ids


def caption_ids(objects: Objects, vocab: dict[str, int], device: torch.device | str) -> CaptionIds:
    """The tables for a vocabulary whose every word is one token `word</w>`."""

    def word(text: str) -> int:
        return vocab[f"{text}</w>"]

    longest = max(len(phrase.split()) for phrase in objects.phrases)
    phrases = torch.full((len(objects.phrases), longest), -1)
    for row, phrase in enumerate(objects.phrases):
        ids = [word(text) for text in phrase.split()]
        phrases[row, : len(ids)] = torch.tensor(ids)
    return CaptionIds(
        names=torch.tensor([[word(article(text)), word(text)] for text in objects.words], device=device),
        phrases=phrases.to(device),
        comma=word(","),
        conjunction=word("and"),
        style=torch.tensor([word("in"), word(objects.style), word("style")], device=device),
        start=vocab["<|startoftext|>"],
        end=vocab["<|endoftext|>"],
    )
