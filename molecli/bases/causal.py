"""Causal backbones (Llama family, Qwen, GPT-2, ...): the target continues the prompt."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from molecli.bases import language, languages
from molecli.bases.prompt_format import PromptFormat, choose_format
from molecli.errors import UsageError
from molecli.functional import fingerprint
from molecli.functional.wrapped import device_of
from molecli.protocols import Completion, Example, Family, Matrices


class Causal:
    """A frozen decoder-only model with its tokenizer; a `protocols.Backbone`."""

    family: Family = "causal"

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        name: str = "",
        *,
        chat_template: bool = True,
        system_prompt: str | None = None,
        template_args: Mapping[str, Any] | None = None,
        source_language: str | None = None,
        target_language: str | None = None,
    ) -> None:
        self.model = language.freeze(model)
        self.tokenizer = tokenizer
        self.name = name
        if tokenizer.eos_token_id is None:
            raise UsageError(name or "tokenizer", "it has no eos token, so completions would not end", "Add eos_token.")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        languages.refuse_any(name or "the base", source_language, target_language)
        found = choose_format(
            tokenizer,
            language.stop_tokens(model, tokenizer),
            name,
            chat_template=chat_template,
            system_prompt=system_prompt,
            template_args=template_args,
        )
        # Gemma ends a turn with a token that its tokenizer does not call eos.
        self.format: PromptFormat = replace(found, stop=tuple(sorted({*found.stop, found.ending_ids[-1]})))
        self._limit = language.position_limit(model)
        self._sliced = "logits_to_keep" in inspect.signature(type(model).forward).parameters

    @property
    def device(self) -> torch.device:
        return device_of(self.model)

    def matrices(self) -> Matrices:
        """Adaptable matrices: module name -> (d_out, d_in)."""
        return language.adaptable_matrices(self.model)

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """input_ids, attention_mask, labels, all [B, T], padded on the right; labels are -100 over the prompt."""
        prompts = [self.format.prompt_ids(example.prompt) for example in examples]
        targets = [self.format.target_ids(example.prompt, example.target) for example in examples]
        rows = [prompt + target for prompt, target in zip(prompts, targets, strict=True)]
        language.check_lengths(map(len, rows), self._limit, names=[f"an example of {e.task}" for e in examples])
        ids, mask = language.pad(rows, self.tokenizer.pad_token_id)
        scored = [[language.UNSCORED] * len(p) + t for p, t in zip(prompts, targets, strict=True)]
        labels, _ = language.pad(scored, language.UNSCORED)
        return {
            "input_ids": ids.to(self.device),
            "attention_mask": mask.to(self.device),
            "labels": labels.to(self.device),
        }

    def token_loss(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Summed cross-entropy over the target tokens and their number (both scalars)."""
        return language.summed_loss(*self._scored(batch))

    def example_loss(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The sum of the examples' mean cross-entropies, and the number of examples (both scalars)."""
        return language.summed(self.example_losses(batch))

    def example_losses(self, batch: Mapping[str, Tensor]) -> Tensor:
        """[B], each example's mean cross-entropy over its target tokens."""
        return language.mean_losses(*self._scored(batch))

    def _scored(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(logits, labels) at the positions where some row is scored."""
        labels = batch["labels"]
        following = labels[:, 1:]
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
        if not self._sliced:
            return self.model(**inputs, labels=labels).logits[:, :-1], following
        # Logits only where some row is scored: over the whole prompt they can cost more than the rest of a small model.
        places = (following != language.UNSCORED).any(0).nonzero().flatten()
        following = following[:, places]
        # The gates find the end of the prompt from `labels`. shift_labels makes the model's own loss fit these logits.
        out = self.model(**inputs, labels=labels, shift_labels=following, logits_to_keep=places)
        return out.logits, following

    def generate(self, prompts: Sequence[str], *, max_new_tokens: int, **options: Any) -> list[Completion]:
        """Completions of one batch of prompts, special tokens removed; for the options see `language.Decoding`."""
        decoding = language.Decoding(max_new_tokens, **options)
        if not prompts:
            return []
        rows = [self.format.prompt_ids(prompt) for prompt in prompts]
        language.check_lengths(map(len, rows), self._limit, room=max_new_tokens)
        pad_id = self.tokenizer.pad_token_id
        ids, mask = language.pad(rows, pad_id, side="left")
        out = decoding.complete(self.model, ids, mask, stop=self.format.stop, pad_id=pad_id)
        new = out[:, ids.shape[1] :].tolist()
        made = [self.format.completion(prompt, row) for prompt, row in zip(prompts, new, strict=True)]
        if any(completion.answer is None for completion in made):
            self._warn_of_thoughts()
        return made

    def _warn_of_thoughts(self) -> None:
        off = f", or turn thinking off by {self.format.switch}" if self.format.switch else ""
        what = "a completion ended within its thoughts and counts as no answer"
        warnings.warn(f"{what}: raise --max-new-tokens{off}", stacklevel=3)

    def fingerprint(self) -> str:
        """A string that identifies this base; see `functional.fingerprint`."""
        return fingerprint.fingerprint(self.model)
