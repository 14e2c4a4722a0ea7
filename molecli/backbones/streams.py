"""What the tokens of a forward pass are (padding, prompt, cached past), read from the model's own call by hooks."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from molecli.protocols import Stream


@dataclass
class Pass:
    """One forward pass along one token axis.

    step: counts passes, so that a site knows its gate is stale; past: tokens already in the key-value
    cache, and which that is;
    shared: what a first gate computed and the others of this pass need too.
    """

    step: int = 0
    past: int = 0
    cache: weakref.ref[Any] | None = None
    valid: Tensor | None = None
    prompt: Tensor | None = None
    memory: Tensor | None = None
    memory_valid: Tensor | None = None
    shared: dict[Any, Any] = field(default_factory=dict)

    def differs(self, later: Pass) -> bool:
        """Whether the `later` pass goes on from another cache than this one filled."""
        return self.cache is not None and later.cache is not None and self.cache() is not later.cache()


class Streams:
    """The current pass along each token axis of a model."""

    def __init__(self, model: nn.Module, *, seq2seq: bool) -> None:
        self.model, self.seq2seq = model, seq2seq
        self.encoder = Pass()
        self.decoder = Pass()

    def of(self, stream: Stream) -> Pass:
        """The pass a site of `stream` belongs to; cross-attention keys run once per decoder pass, on encoder tokens."""
        return self.encoder if stream == "encoder" else self.decoder

    def attach(self, on_pass: Callable[[], None]) -> list[RemovableHandle]:
        """Hooks that keep the passes current; `on_pass` is called at the start of each."""

        def watch(module: nn.Module, read: Callable[[Mapping[str, Any]], None]) -> RemovableHandle:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                on_pass()
                read(kwargs if not args else {"input_ids": args[0], **kwargs})

            return module.register_forward_pre_hook(hook, with_kwargs=True)

        self.encoder, self.decoder = Pass(), Pass()

        def note_cache(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            # A prompt without a cache is given one by the model; the next pass comes with it.
            cache = getattr(output, "past_key_values", None)
            if cache is not None:
                self.decoder.cache = weakref.ref(cache)

        if not self.seq2seq:
            return [watch(self.model, self._read_causal), self.model.register_forward_hook(note_cache)]
        encoder, decoder = self.model.get_encoder(), self.model.get_decoder()  # type: ignore[operator]
        noting = decoder.register_forward_hook(note_cache)
        return [watch(encoder, self._read_encoder), watch(decoder, self._read_decoder), noting]

    def _read_encoder(self, kwargs: Mapping[str, Any]) -> None:
        valid = _valid(kwargs, past=0)
        self.encoder = Pass(self.encoder.step + 1, valid=valid, prompt=valid)

    def _read_decoder(self, kwargs: Mapping[str, Any]) -> None:
        past, cache = _past(kwargs)
        valid = _valid(kwargs, past)
        memory = kwargs.get("encoder_hidden_states")
        memory_valid = kwargs.get("encoder_attention_mask")
        if memory is not None and (memory_valid is None or memory_valid.dim() != 2):
            memory_valid = torch.ones(memory.shape[:2], device=memory.device)
        prompt = torch.zeros_like(valid)
        prompt[:, 0] = 1  # the start token; the prompt proper is the memory
        self.decoder = Pass(self.decoder.step + 1, past, cache, valid, prompt, memory, memory_valid)

    def _read_causal(self, kwargs: Mapping[str, Any]) -> None:
        past, cache = _past(kwargs)
        valid = _valid(kwargs, past)
        prompt = valid
        labels = kwargs.get("labels")
        if labels is not None:
            # Teacher forcing: the prompt ends before the first scored token, as it does in generation.
            prompt = valid * ((labels != -100).cumsum(1) == 0).to(valid.dtype)
        self.decoder = Pass(self.decoder.step + 1, past, cache, valid, prompt)


def _past(kwargs: Mapping[str, Any]) -> tuple[int, weakref.ref[Any] | None]:
    cache = kwargs.get("past_key_values")
    return (0, None) if cache is None else (int(cache.get_seq_length()), weakref.ref(cache))


def _valid(kwargs: Mapping[str, Any], past: int) -> Tensor:
    ids = kwargs.get("input_ids")
    shaped = ids if ids is not None else kwargs["inputs_embeds"]
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= shaped.shape[1]:
        return mask[:, -shaped.shape[1] :].to(shaped.device)
    return torch.ones(shaped.shape[:2], dtype=torch.long, device=shaped.device)
