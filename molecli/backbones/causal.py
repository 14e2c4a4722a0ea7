"""Causal backbones (Llama family, Qwen, GPT-2, ...): the target continues the prompt."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from molecli.backbones import text
from molecli.backbones.chat import PromptFormat
from molecli.errors import UsageError
from molecli.functional import fingerprint
from molecli.protocols import Example, Family, Shape


class Causal:
    """A frozen decoder-only model with its tokenizer; a `protocols.Backbone`."""

    family: Family = "causal"

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, name: str = "", *, chat_template: bool = True
    ) -> None:
        self.model = text.freeze(model)
        self.tokenizer = tokenizer
        self.name = name
        if tokenizer.eos_token_id is None:
            raise UsageError(name or "tokenizer", "it has no eos token, so no completion could end", "Add eos_token.")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        chat = chat_template and bool(tokenizer.chat_template)
        plain = PromptFormat(tokenizer, chat, tuple(text.stop_tokens(model, tokenizer)))
        # Gemma ends a turn with a token that its tokenizer does not call eos.
        self.format = PromptFormat(tokenizer, chat, tuple(sorted({*plain.stop, plain.ending_ids[-1]})))
        self._limit = text.position_limit(model)
        self._sliced = "logits_to_keep" in inspect.signature(type(model).forward).parameters

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def matrices(self) -> dict[str, Shape]:
        """Adaptable matrices: module name -> (d_out, d_in)."""
        return text.adaptable_matrices(self.model)

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """input_ids, attention_mask, labels, all [B, T], padded on the right; labels are -100 over the prompt."""
        prompts = [self.format.prompt_ids(example.prompt) for example in examples]
        targets = [self.format.target_ids(example.prompt, example.target) for example in examples]
        rows = [prompt + target for prompt, target in zip(prompts, targets, strict=True)]
        text.check_lengths(map(len, rows), self._limit, names=[f"an example of {e.task}" for e in examples])
        ids, mask = text.pad(rows, self.tokenizer.pad_token_id)
        scored = [[text.UNSCORED] * len(p) + t for p, t in zip(prompts, targets, strict=True)]
        labels, _ = text.pad(scored, text.UNSCORED)
        return {
            "input_ids": ids.to(self.device),
            "attention_mask": mask.to(self.device),
            "labels": labels.to(self.device),
        }

    def token_loss(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Summed cross-entropy over the target tokens and their number (both scalars)."""
        return text.summed_loss(*self._scored(batch))

    def example_loss(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The examples' mean cross-entropies, summed, and the number of examples (both scalars)."""
        return text.summed(self.example_losses(batch))

    def example_losses(self, batch: Mapping[str, Tensor]) -> Tensor:
        """[B], each example's mean cross-entropy over its target tokens."""
        return text.mean_losses(*self._scored(batch))

    def _scored(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(logits, labels) at the places that some row is scored at."""
        labels = batch["labels"]
        following = labels[:, 1:]
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
        if not self._sliced:
            return self.model(**inputs, labels=labels).logits[:, :-1], following
        # Logits only where some row is scored: over a prompt they would cost more than the rest of a small model.
        places = (following != text.UNSCORED).any(0).nonzero().flatten()
        following = following[:, places]
        # The labels tell the gates where the prompt ends; with shift_labels the model's own loss fits the fewer logits.
        out = self.model(**inputs, labels=labels, shift_labels=following, logits_to_keep=places)
        return out.logits, following

    def generate(self, prompts: Sequence[str], *, max_new_tokens: int, **options: Any) -> list[str]:
        """Completions of one batch of prompts, special tokens removed; for the options see `text.Decoding`."""
        decoding = text.Decoding(max_new_tokens, **options)
        if not prompts:
            return []
        rows = [self.format.prompt_ids(prompt) for prompt in prompts]
        text.check_lengths(map(len, rows), self._limit, room=max_new_tokens)
        pad_id = self.tokenizer.pad_token_id
        ids, mask = text.pad(rows, pad_id, side="left")
        out = decoding.complete(self.model, ids, mask, stop=self.format.stop, pad_id=pad_id)
        new = out[:, ids.shape[1] :].tolist()
        return [self.format.completion(prompt, row) for prompt, row in zip(prompts, new, strict=True)]

    def fingerprint(self) -> str:
        """A string that tells this base from another; see `functional.fingerprint`."""
        return fingerprint.fingerprint(self.model)
