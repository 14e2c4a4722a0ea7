"""Encoder-decoder backbones (T5, FLAN-T5, BART, mBART, ...): the prompt is encoded, the target decoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from molecli.bases import language, languages
from molecli.bases.prompt_format import choose_format
from molecli.errors import UsageError
from molecli.functional import fingerprint
from molecli.functional.wrapped import device_of
from molecli.protocols import Example, Family, Matrices


class Seq2Seq:
    """A frozen encoder-decoder model with its tokenizer; a `protocols.Backbone`."""

    family: Family = "seq2seq"

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
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        self._stop = language.stop_tokens(model, tokenizer)
        self.format = choose_format(
            tokenizer,
            self._stop,
            name,
            chat_template=chat_template,
            system_prompt=system_prompt,
            template_args=template_args,
        )
        self.languages = languages.choose(model, tokenizer, name or "the base", source_language, target_language)
        self._limit = language.position_limit(model)
        self._writes = not languages.two_vocabularies(tokenizer)

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
        shifted = labels.roll(1, 1).masked_fill(labels.roll(1, 1) == language.UNSCORED, self.tokenizer.pad_token_id)
        shifted[:, 0] = self._start
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
        first = {"start": self._start, "forced": self.languages.forced}
        out = decoding.complete(self.model, ids, mask, stop=self._stop, pad_id=pad_id, **first)
        # A language's code is not everywhere a special token.
        codes = (self.languages.start, self.languages.forced)
        rows = [[token for token in row if token not in codes] for row in out.tolist()]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)

    def fingerprint(self) -> str:
        """A string that identifies this base; see `functional.fingerprint`."""
        return fingerprint.fingerprint(self.model)

    @property
    def _start(self) -> int:
        """The token that the decoder starts with, in training as in generation."""
        own = self.languages.start
        return language.decoder_start(self.model, self.name or "the base") if own is None else own

    def _ids(self, prompt: str) -> list[int]:
        words = self.languages.tagged(self.format.prompt_text(prompt))
        # A template writes the special tokens itself. A tokenizer without them returns nothing for an empty text.
        ids = self.tokenizer(words, add_special_tokens=not self.format.chat)["input_ids"]
        return ids or [self.tokenizer.eos_token_id]

    def _target_ids(self, words: str) -> list[int]:
        """The labels of a target: the library's own, after the token that generation forces, up to eos."""
        if not self._writes:
            what = "its tokenizer writes targets with the vocabulary of the prompts, and the model has another for them"
            raise UsageError(self.name or "the base", what, "Choose another base to train on; this one can be sampled.")
        ids, eos = self.tokenizer(text_target=words)["input_ids"], self.tokenizer.eos_token_id
        ids = ids if ids[-1:] == [eos] or eos in ids[-2:] else [*ids, eos]
        own = self.languages.forced
        forced = getattr(self.model.generation_config, "forced_bos_token_id", None) if own is None else own
        return ids if forced is None or forced in ids[:1] else [forced, *ids]
