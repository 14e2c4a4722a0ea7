"""Causal backbones (Llama family, Qwen, GPT-2, ...), with Causal and PromptFormat: the target continues the prompt."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from molecli.bases import language
from molecli.errors import UsageError
from molecli.functional import fingerprint
from molecli.functional.wrapped import device_of
from molecli.protocols import Example, Family, Matrices


class Causal:
    """A frozen decoder-only model with its tokenizer; a `protocols.Backbone`."""

    family: Family = "causal"

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, name: str = "", *, chat_template: bool = True
    ) -> None:
        self.model = language.freeze(model)
        self.tokenizer = tokenizer
        self.name = name
        if tokenizer.eos_token_id is None:
            raise UsageError(name or "tokenizer", "it has no eos token, so completions would not end", "Add eos_token.")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        chat = chat_template and bool(tokenizer.chat_template)
        plain = PromptFormat(tokenizer, chat, tuple(language.stop_tokens(model, tokenizer)))
        # Gemma ends a turn with a token that its tokenizer does not call eos.
        self.format = PromptFormat(tokenizer, chat, tuple(sorted({*plain.stop, plain.ending_ids[-1]})))
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

    def generate(self, prompts: Sequence[str], *, max_new_tokens: int, **options: Any) -> list[str]:
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
        return [self.format.completion(prompt, row) for prompt, row in zip(prompts, new, strict=True)]

    def fingerprint(self) -> str:
        """A string that identifies this base; see `functional.fingerprint`."""
        return fingerprint.fingerprint(self.model)


# Stands for an assistant's answer, to find what the template writes after an answer.
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
        """The model's input for a prompt, the same in training and in generation."""
        # The template writes the bos token itself; the tokenizer would add a second one.
        ids = self._ids(self._prompt_text(prompt), special=not self.chat)
        return ids or [self._start]

    def target_ids(self, prompt: str, target: str) -> list[int]:
        """The tokens that should follow `prompt`, up to and including the token that ends the answer."""
        before, after = self._prompt_text(prompt), self._delimiter(prompt) + target
        given = self._ids(before, special=not self.chat)
        joined = self._ids(before + after, special=not self.chat)
        # Tokenised together, like the text that the model was trained on, unless a token would span the border.
        if joined[: len(given)] == given and (given or not after):
            answer = joined[len(given) :]
        else:
            answer = self._ids(after, special=False)
        return answer + list(self.ending_ids)

    def completion(self, prompt: str, ids: Sequence[int]) -> str:
        """The text of generated ids, without special tokens and without the space between prompt and target."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).removeprefix(self._delimiter(prompt))

    @cached_property
    def ending_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer: the template's end of turn up to its stop token, or eos."""
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
