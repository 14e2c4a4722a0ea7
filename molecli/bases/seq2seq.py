"""Encoder-decoder backbones (T5, FLAN-T5, BART, ...): the prompt is encoded, the target decoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from molecli.bases import language
from molecli.functional import fingerprint
from molecli.functional.wrapped import device_of
from molecli.protocols import Example, Family, Matrices


class Seq2Seq:
    """A frozen encoder-decoder model with its tokenizer; a `protocols.Backbone`."""

    family: Family = "seq2seq"

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, name: str = "") -> None:
        self.model = language.freeze(model)
        self.tokenizer = tokenizer
        self.name = name
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        self._stop = language.stop_tokens(model, tokenizer)
        self._limit = language.position_limit(model)

    @property
    def device(self) -> torch.device:
        return device_of(self.model)

    def matrices(self) -> Matrices:
        """Adaptable matrices: module name -> (d_out, d_in)."""
        return language.adaptable_matrices(self.model)

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """input_ids and attention_mask [B, T] of the prompts, labels [B, T'] of the targets; -100 is padding."""
        prompts = [self._ids(example.prompt) for example in examples]
        targets = [self._target_ids(example.target) for example in examples]
        names = [f"an example of {example.task}" for example in examples]
        language.check_lengths(map(len, prompts), self._limit, names=names)
        language.check_lengths(map(len, targets), self._limit, names=names)
        ids, mask = language.pad(prompts, self.tokenizer.pad_token_id)
        labels, _ = language.pad(targets, language.UNSCORED)
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
        labels = batch["labels"]
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        # `labels` are not passed: the model would compute a second, averaged loss from them.
        shifted = self.model.prepare_decoder_input_ids_from_labels(labels=labels)  # type: ignore[operator]
        # Gates also need to know which of the decoder's tokens are padding.
        inputs["decoder_attention_mask"] = (labels != language.UNSCORED).long()
        logits = self.model(**inputs, decoder_input_ids=shifted, use_cache=False).logits
        return logits, labels

    def generate(self, prompts: Sequence[str], *, max_new_tokens: int, **options: Any) -> list[str]:
        """Completions of one batch of prompts, special tokens removed; for the options see `language.Decoding`."""
        decoding = language.Decoding(max_new_tokens, **options)
        if not prompts:
            return []
        rows = [self._ids(prompt) for prompt in prompts]
        language.check_lengths(map(len, rows), self._limit)
        # The completion has its own positions; the start token takes one of them.
        language.check_lengths([1], self._limit, room=max_new_tokens, names=["the completion"])
        pad_id = self.tokenizer.pad_token_id
        ids, mask = language.pad(rows, pad_id)
        out = decoding.complete(self.model, ids, mask, stop=self._stop, pad_id=pad_id)
        return self.tokenizer.batch_decode(out, skip_special_tokens=True)

    def fingerprint(self) -> str:
        """A string that identifies this base; see `functional.fingerprint`."""
        return fingerprint.fingerprint(self.model)

    def _ids(self, words: str) -> list[int]:
        # A tokenizer without special tokens returns nothing for an empty text.
        return self.tokenizer(words)["input_ids"] or [self.tokenizer.eos_token_id]

    def _target_ids(self, words: str) -> list[int]:
        ids, eos = self.tokenizer(text_target=words)["input_ids"], self.tokenizer.eos_token_id
        return ids if ids and ids[-1] == eos else [*ids, eos]
