"""Experts on a language model: its sites, and the passes of its encoder and decoder, which hooks observe.

Contents: TextLayout, TextStreams.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache

from molecli.bases import language
from molecli.catalog.methods import Kind
from molecli.mixture.sites import as_registered, make_sites
from molecli.mixture.streams import CACHE_ARGUMENTS, Pass, Streams, outside
from molecli.protocols import Granularity, Reading, Shape, Site


class TextLayout:
    """The layout of a transformers language model."""

    kind: Kind = "texts"

    def __init__(self, model: Any) -> None:
        self.model = model
        self.seq2seq = bool(getattr(model.config, "is_encoder_decoder", False))
        text = language.text_config(model)
        width = getattr(text, "d_model", None) or text.hidden_size
        self.memory_width: int | None = int(width)

    def matrices(self) -> dict[str, Shape]:
        """Every linear layer except the output head: name -> shape."""
        return language.adaptable_matrices(self.model)

    def in_order(self, matrices: Iterable[str]) -> list[str]:
        """The matrices in the order of the model's modules, which is that of its forward pass."""
        return as_registered(self.model, matrices)

    def streams(self) -> Streams:
        """The passes of encoder and decoder."""
        return TextStreams(self.model, seq2seq=self.seq2seq)

    def outside(self, matrices: Iterable[str]) -> list[str]:
        """Matrices of a multimodal model's other parts, such as its vision encoder."""
        return language.outside_text(self.model, matrices)

    def sites(self, matrices: Sequence[str], granularity: Granularity, *, per_token: bool) -> list[Site]:
        """See `sites.make_sites`."""
        return make_sites(matrices, granularity, seq2seq=self.seq2seq, per_token=per_token)


class TextStreams:
    """The current passes of a language model: of the encoder and the decoder, or of a causal model."""

    def __init__(self, model: nn.Module, *, seq2seq: bool) -> None:
        self.model, self.seq2seq = model, seq2seq
        self.encoder = Pass()
        self.decoder = Pass()

    def of(self, site: Site) -> Pass:
        """The pass that a site belongs to; cross-attention keys are computed in the decoder's, on encoder tokens."""
        return self.encoder if site.stream == "encoder" else self.decoder

    def reading(self, site: Site, x: Tensor, u: Tensor, state: tuple[Tensor, Tensor] | None) -> Reading:
        """x and u [B, T, .] with the masks of the site's tokens, and the memory if the site is in a decoder."""
        current = self.of(site)
        memory = site.stream == "memory"
        valid, prompt = (current.memory_valid,) * 2 if memory else (current.valid, current.prompt)
        if valid is None or prompt is None:
            raise outside()
        batch, tokens = valid.shape
        return Reading(
            x.reshape(batch, tokens, -1),
            u.reshape(batch, tokens, -1),
            valid,
            prompt,
            memory=current.memory if site.stream == "decoder" else None,
            memory_valid=current.memory_valid,
            state=state if current.past else None,
            shared=current.shared,
        )

    def fitted(self, matrix: str, value: Tensor, x: Tensor) -> Tensor:
        """`value`: a hosted group fits it to the rows of x itself."""
        return value

    def attach(self, on_pass: Callable[[], None]) -> list[RemovableHandle]:
        """Hooks that update the passes; `on_pass` is called at the start of each pass."""

        def watch(module: nn.Module, read: Callable[[Mapping[str, Any]], None]) -> RemovableHandle:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                on_pass()
                read(kwargs if not args else {"input_ids": args[0], **kwargs})

            return module.register_forward_pre_hook(hook, with_kwargs=True)

        self.encoder, self.decoder = Pass(), Pass()

        def note_cache(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            # The model creates a cache for a prompt without one; the next pass uses it.
            cache = next(
                (found for name in CACHE_ARGUMENTS if (found := getattr(output, name, None)) is not None), None
            )
            if cache is not None:
                self.decoder.cache = _reference(cache)

        if not self.seq2seq:
            return [watch(self.model, self._read_causal), self.model.register_forward_hook(note_cache)]
        encoder, decoder = self.model.get_encoder(), self.model.get_decoder()  # type: ignore[operator]
        noting = decoder.register_forward_hook(note_cache)
        return [watch(encoder, self._read_encoder), watch(decoder, self._read_decoder), noting]

    def _read_encoder(self, kwargs: Mapping[str, Any]) -> None:
        valid = _valid(kwargs)
        self.encoder = Pass(self.encoder.step + 1, valid=valid, prompt=valid)

    def _read_decoder(self, kwargs: Mapping[str, Any]) -> None:
        past, cache = _past(kwargs)
        valid = _valid(kwargs)
        memory = kwargs.get("encoder_hidden_states")
        memory_valid = kwargs.get("encoder_attention_mask")
        if memory is not None and (memory_valid is None or memory_valid.dim() != 2):
            memory_valid = torch.ones(memory.shape[:2], device=memory.device)
        prompt = torch.zeros_like(valid)
        prompt[:, 0] = 1  # the start token; the actual prompt is the memory
        self.decoder = Pass(self.decoder.step + 1, past, cache, valid, prompt, memory, memory_valid)

    def _read_causal(self, kwargs: Mapping[str, Any]) -> None:
        past, cache = _past(kwargs)
        valid = _valid(kwargs)
        prompt = valid
        labels = kwargs.get("labels")
        if labels is not None:
            # Teacher forcing: the prompt ends before the first scored token, as in generation.
            prompt = valid * ((labels != -100).cumsum(1) == 0).to(valid.dtype)
        self.decoder = Pass(self.decoder.step + 1, past, cache, valid, prompt)


def _past(kwargs: Mapping[str, Any]) -> tuple[int | None, weakref.ref[Any] | None]:
    cache = next((kwargs[name] for name in CACHE_ARGUMENTS if kwargs.get(name) is not None), None)
    return (0, None) if cache is None else (_length(cache), _reference(cache))


def _length(cache: Any) -> int | None:
    """The number of tokens in the cache, 1 for the state of recurrent layers alone; None if it cannot be known."""
    if not isinstance(cache, Cache):
        return None
    try:
        return int(cache.get_seq_length())
    except ValueError:  # it has no attention layer
        return int(cache.has_previous_state())


def _reference(cache: Any) -> weakref.ref[Any] | None:
    return weakref.ref(cache) if isinstance(cache, Cache) else None


def _valid(kwargs: Mapping[str, Any]) -> Tensor:
    ids = kwargs.get("input_ids")
    shaped = ids if ids is not None else kwargs["inputs_embeds"]
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= shaped.shape[1]:
        return mask[:, -shaped.shape[1] :].to(shaped.device)
    return torch.ones(shaped.shape[:2], dtype=torch.long, device=shaped.device)
