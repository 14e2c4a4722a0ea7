"""What the tokens of a forward pass are (padding, prompt, cached past), read from the model's own call by hooks.

Contents: Pass; Streams, what a mixture asks of any model; TextStreams, of a language model. Those of a diffusion
pipeline are in `pipeline_streams`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from molecli.errors import RunError
from molecli.protocols import Reading, Site

# What transformers calls the key-value cache, in calls and in outputs: from 5.24 on, and before.
CACHE_ARGUMENTS = ("cache", "past_key_values")


@dataclass
class Pass:
    """One forward pass along one token axis.

    step: counts passes, so that a site knows its gate is stale; past: tokens already in the key-value
    cache, and which that is; over: the pass has ended, and what is called now is recomputed for its backward pass;
    shared: what a first gate computed and the others of this pass need too.
    """

    step: int = 0
    past: int = 0
    cache: weakref.ref[Any] | None = None
    valid: Tensor | None = None
    prompt: Tensor | None = None
    memory: Tensor | None = None
    memory_valid: Tensor | None = None
    over: bool = False
    shared: dict[Any, Any] = field(default_factory=dict)

    def differs(self, later: Pass) -> bool:
        """Whether the `later` pass goes on from another cache than this one filled."""
        return self.cache is not None and later.cache is not None and self.cache() is not later.cache()


class Streams(Protocol):
    """The current pass along each token axis of a model."""

    def attach(self, on_pass: Callable[[], None]) -> list[RemovableHandle]:
        """Hooks that keep the passes current; `on_pass` is called at the start of each."""
        ...

    def of(self, site: Site) -> Pass:
        """The pass that `site` belongs to."""
        ...

    def reading(self, site: Site, x: Tensor, u: Tensor, state: tuple[Tensor, Tensor] | None) -> Reading:
        """What the gate of `site` sees of the entry's input x and its projections u.

        Raises: RunError where the model itself was never called.
        """
        ...


def outside() -> RunError:
    """The error for experts that are called when no pass has begun."""
    what = "the experts were called outside the model they are attached to"
    return RunError("mixture", what, "Call the model itself.")


class TextStreams:
    """The passes of a language model: its encoder's and its decoder's, or the one of a causal model."""

    def __init__(self, model: nn.Module, *, seq2seq: bool) -> None:
        self.model, self.seq2seq = model, seq2seq
        self.encoder = Pass()
        self.decoder = Pass()

    def of(self, site: Site) -> Pass:
        """The pass a site belongs to; cross-attention keys run once per decoder pass, on encoder tokens."""
        return self.encoder if site.stream == "encoder" else self.decoder

    def reading(self, site: Site, x: Tensor, u: Tensor, state: tuple[Tensor, Tensor] | None) -> Reading:
        """x and u [B, T, .] with the masks of the site's tokens, and the memory where the site sits in a decoder."""
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
            cache = next(
                (found for name in CACHE_ARGUMENTS if (found := getattr(output, name, None)) is not None), None
            )
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
    cache = next((kwargs[name] for name in CACHE_ARGUMENTS if kwargs.get(name) is not None), None)
    return (0, None) if cache is None else (int(cache.get_seq_length()), weakref.ref(cache))


def _valid(kwargs: Mapping[str, Any], past: int) -> Tensor:
    ids = kwargs.get("input_ids")
    shaped = ids if ids is not None else kwargs["inputs_embeds"]
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= shaped.shape[1]:
        return mask[:, -shaped.shape[1] :].to(shaped.device)
    return torch.ones(shaped.shape[:2], dtype=torch.long, device=shaped.device)
