"""Experts on a language model: its sites, and the passes of its encoder and decoder, which hooks observe.

Contents: TextLayout, TextStreams.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, EncoderDecoderCache
from transformers.cache_utils import CacheLayerMixin

from molecli.bases import language
from molecli.bases.fused import fused_matrices
from molecli.catalog.methods import Kind
from molecli.errors import RunError
from molecli.mixture.called_tokens import CalledTokens, by_name, key_ranges, positional
from molecli.mixture.continuation import SHORT, Trace
from molecli.mixture.generation import Generation, Generations
from molecli.mixture.recompute import Learning, in_backward
from molecli.mixture.sites import as_registered, make_sites
from molecli.mixture.streams import CACHE_ARGUMENTS, Pass, Streams, outside
from molecli.mixture.token_axes import as_tokens, axes_of
from molecli.protocols import Gate, Granularity, Matrices, Reading, Site, Stream

# Models whose keys, values and queries each read another mixture of a token with the one before.
_APART = ("rwkv",)


class TextLayout:
    """The layout of a transformers language model."""

    kind: Kind = "texts"

    def __init__(self, model: Any) -> None:
        self.model = model
        self.seq2seq = bool(getattr(model.config, "is_encoder_decoder", False))
        text = language.text_config(model)
        width = getattr(text, "d_model", None) or text.hidden_size
        self.memory_width: int | None = int(width)

    def matrices(self) -> Matrices:
        """Every linear layer, the output head apart, and what no layer holds: name -> shape."""
        layers = language.adaptable_matrices(self.model)
        every = {**layers, **fused_matrices(self.model)}
        return Matrices(every, head=layers.head, tables=layers.tables, renamed=layers.renamed)

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
        shapes, apart = self.matrices().named, self.model.config.model_type in _APART
        return make_sites(matrices, granularity, seq2seq=self.seq2seq, per_token=per_token, shapes=shapes, apart=apart)


class TextStreams:
    """The current passes of a language model: of the encoder and the decoder, or of a causal model."""

    def __init__(self, model: nn.Module, *, seq2seq: bool) -> None:
        self.model, self.seq2seq = model, seq2seq
        self.encoder = Pass()
        self.decoder = Pass()
        self.generations = Generations()
        self.probing = False  # whether a pass runs only to see the shapes of inputs
        self._probed: set[str] = set()  # the axes for which it ran
        self._encoded: weakref.ref[Tensor] | None = None  # the encoder's last output
        self._begun: dict[str, Generation | None] = {}
        self._last = Trace()  # of the last pass of the decoder that has ended
        self._learning = Learning()
        self._called_whole = False  # whether the model itself runs, and not its encoder or decoder alone

    def parts(self) -> Sequence[nn.Module]:
        """Encoder and decoder, then the model, which has the output head."""
        if not self.seq2seq:
            return [self.model]
        return [self.model.get_encoder(), self.model.get_decoder(), self.model]  # type: ignore[operator]

    def optional(self, matrices: Sequence[str]) -> Collection[str]:
        """Those of a multimodal model's other parts, such as its vision encoder, and those of tokens that see all
        others (LED, Longformer), of which a call may have none."""
        return {*language.outside_text(self.model, matrices), *(name for name in matrices if name.endswith("_global"))}

    def of(self, site: Site) -> Pass:
        """The pass that a site belongs to; cross-attention keys are computed in the decoder's, on encoder tokens.

        In a backward pass, which may compute layers again (gradient checkpointing), it is the pass that is learnt from.
        """
        axis = "encoder" if site.stream == "encoder" else "decoder"
        current: Pass = getattr(self, axis)
        return self._learning.of(axis) or current if current.over and in_backward() else current

    def axes(self, stream: Stream) -> tuple[int, int]:
        """The numbers of sequences and tokens; those of the encoder's output for the keys of cross-attention.

        Raises: RunError outside a pass, and if the call does not say them.
        """
        axis = "encoder" if stream == "encoder" else "decoder"
        current: Pass = getattr(self, axis)
        if current.tokens is None or (current.over and not in_backward()):
            raise outside()
        if current.over:
            current = self._learning.of(axis) or current
            self._learning.check_one()
        assert current.tokens is not None
        if stream != "memory":
            return current.tokens.size()
        if current.memory is None:
            raise _no_memory()
        return current.memory.shape[0], current.memory.shape[1]

    def check_shared(self) -> None:
        """Raises: RunError if the decoder reads another text than that which the encoder read last."""
        memory, generation = self.decoder.memory, self.decoder.generation
        same = memory is None or (self._encoded is not None and self._encoded() is memory)
        if same or (generation is not None and self._begun.get("encoder") is generation):
            return
        what = (
            "gates shared by encoder and decoder weigh LoRAs by the encoder's last text, and the decoder reads another"
        )
        raise RunError("generation", what, "Call the encoder just before, or use another granularity than network.")

    def reading(
        self, site: Site, x: Tensor, u: Tensor, state: tuple[Tensor, Tensor] | None, *, gate: Gate, first: bool | None
    ) -> Reading:
        """x and u [B, T, .] with the masks of the site's tokens, and the memory if the site is in a decoder."""
        current, size = self.of(site), self.axes(site.stream)
        memory = current.memory if site.stream == "decoder" else None
        if self.seq2seq and site.stream == "decoder" and memory is None and not gate.reads_entry(memory=True):
            raise _no_memory()
        memory_valid = valid = prompt = None
        if gate.remembers or getattr(gate, "observed", None) is not None:
            mine = site.stream != "memory"
            valid, prompt = (current.valid, current.prompt) if mine else (current.memory_valid,) * 2
        if not gate.reads_entry(memory=memory is not None):
            memory_valid = current.memory_valid
        else:
            matrix, axes = site.entry.matrices[0], axes_of(tuple(x.shape[:-1]), *size, first=first)
            x, u = as_tokens(x, matrix, axes, size), as_tokens(u, matrix, axes, size)
        return Reading(
            x,
            u,
            valid,
            prompt,
            memory=memory,
            memory_valid=memory_valid,
            state=state,
            kept=self._kept(current, size[1]) if site.stream == "decoder" else None,
            shared=current.shared,
        )

    def fitted(self, matrix: str, value: Tensor, x: Tensor) -> Tensor:
        """`value`: a hosted group places it by the axes of x itself."""
        return value

    def _kept(self, current: Pass, tokens: int) -> int:
        """After how many of the last tokens the state is kept, because a later pass may take some of them back."""
        prompt = current.trace.prompt if current.past == 0 else 0
        return tokens if tokens <= SHORT else max(1, min(SHORT, tokens - prompt + 1))

    # -- hooks -------------------------------------------------------------------------------------------------------

    def attach(self, on_pass: Callable[[], Any], *, pools: bool = False) -> list[Any]:
        """Hooks that update the passes; `on_pass` is called at the start of each pass, and returns whether the order of
        an input's axes is still to be found out; pools: whether gates average over tokens."""
        self.encoder, self.decoder, self._last, self._learning = Pass(), Pass(), Trace(), Learning()
        self._encoded, self._probed = None, set()
        if not self.seq2seq:
            handles = self._watch(self.model, "decoder", self._read_causal, on_pass)
        else:
            encoder, decoder = self.model.get_encoder(), self.model.get_decoder()  # type: ignore[operator]
            handles = self._watch(encoder, "encoder", self._read_encoder, on_pass)
            handles += self._watch(decoder, "decoder", self._read_decoder, on_pass)
            handles += self._watch_head()
        return handles + self.generations.watch(self.model, pools=pools)

    def _watch(
        self, module: nn.Module, axis: str, read: Callable[[Mapping[str, Any]], Pass], on_pass: Callable[[], Any]
    ) -> list[Any]:
        names = positional(module)

        def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            unsure = on_pass()
            told = by_name(names, args, kwargs)
            current = read(told)
            setattr(self, axis, current)
            if self.probing:
                return
            self._begun[axis] = self.generations.current
            current.learning = torch.is_grad_enabled() and module.training
            if current.learning:
                self._learning.begin(axis, current)
            if unsure and axis not in self._probed and self._even(current):
                self._probed.add(axis)
                self._probe(module, axis, told)
                setattr(self, axis, current)

        def end(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            current: Pass = getattr(self, axis)
            current.over = axis == "encoder" or not self._called_whole or self.probing
            if self.probing:
                return
            if axis == "encoder":
                first = output[0] if isinstance(output, (tuple, Mapping)) else output
                self._encoded = weakref.ref(first) if isinstance(first, Tensor) else None
            else:
                # The model creates a cache for a prompt without one; the next pass uses it.
                current.trace.left(_cache_in(output) or (current.trace.cache and current.trace.cache()))
                self._last = current.trace

        return [
            module.register_forward_pre_hook(begin, with_kwargs=True),
            module.register_forward_hook(end),
        ]

    def _watch_head(self) -> list[Any]:
        """Hooks by which the decoder's pass lasts until the model ends, after its output head."""

        def begin(*_: Any) -> None:
            self._called_whole = True

        def end(*_: Any) -> None:
            self._called_whole, self.decoder.over = False, True

        return [
            self.model.register_forward_pre_hook(begin),
            self.model.register_forward_hook(end, always_call=True),
        ]

    def _even(self, current: Pass) -> bool:
        """Whether sequences and tokens of the pass are as many, so that shapes do not tell them apart."""
        shapes = [
            current.tokens.shape if current.tokens else None,
            current.memory.shape if current.memory is not None else None,
        ]
        return any(shape is not None and shape[0] == shape[1] > 1 for shape in shapes)

    def _probe(self, module: nn.Module, axis: str, told: Mapping[str, Any]) -> None:
        """Runs the first sequence alone, without experts, so that the shapes of all inputs are seen once."""
        needed = [
            name for name, one in inspect.signature(module.forward).parameters.items() if one.default is one.empty
        ]
        one = {name: told[name] for name in needed if name in told}
        for name in ("input_ids", "inputs_embeds", "encoder_hidden_states", *(n for n in needed if "padding" in n)):
            if isinstance(told.get(name), Tensor):
                one[name] = told[name][:1]
        self.probing = True
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=_devices(one.values())):
                module(**one)
        except Exception:
            pass
        finally:
            self.probing = False

    # -- what calls say ----------------------------------------------------------------------------------------------

    def _read_encoder(self, told: Mapping[str, Any]) -> Pass:
        return Pass(self.encoder.step + 1, CalledTokens(told))

    def _read_decoder(self, told: Mapping[str, Any]) -> Pass:
        inverted = told.get("decoder_padding_mask")  # FSMT's, true on padding
        if inverted is not None:
            told = {**told, "attention_mask": ~inverted.bool()}
        memory = told.get("encoder_hidden_states")
        current = self._decoding(told, memory=True)
        current.memory = memory
        return current

    def _read_causal(self, told: Mapping[str, Any]) -> Pass:
        return self._decoding(told, memory=False)

    def _decoding(self, told: Mapping[str, Any], *, memory: bool) -> Pass:
        cache = next((told[name] for name in CACHE_ARGUMENTS if told.get(name) is not None), None)
        past = 0 if cache is None else _length(cache)
        counted = cache is None or _counts(cache)
        generation = None if self.probing else self.generations.current
        length = None
        if generation is not None:
            generation.passes += 1
            generation.start = past if generation.passes == 1 else generation.start
            length = generation.prompt if generation.start == 0 and not memory else None
        held = cache if isinstance(cache, Cache) else None
        tokens = CalledTokens(
            told,
            past=past if counted else None,
            keys=lambda: key_ranges(held, past or 0, _count(told)),
            prompt_length=length,
            memory=memory,
        )
        rows, count = tokens.shape or (0, 0)
        trace = Trace(rows, past if counted else None, (past or 0) + count, length or (past or 0) + count)
        if held is not None:
            trace.cache = weakref.ref(held)
        moved = bool(past) and rows > 1 and not (self._last.witness and self._last.witness.unchanged(held))
        return Pass(self.decoder.step + 1, tokens, past, trace, moved, generation)


def _no_memory() -> RunError:
    what = "the decoder was called without the encoder's output, by which gates weigh LoRAs"
    return RunError("generation", what, "Give it as encoder_hidden_states.")


def _count(told: Mapping[str, Any]) -> int:
    """The number of tokens of a call."""
    ids = told.get("input_ids")
    shaped = ids if ids is not None else told.get("inputs_embeds")
    return 0 if shaped is None or shaped.dim() < 2 else int(shaped.shape[1])


def _length(cache: Any) -> int | None:
    """The number of tokens in the cache, 1 for the state of recurrent layers alone; None if it cannot be known."""
    if not isinstance(cache, Cache):
        return None
    try:
        return int(cache.get_seq_length())
    except ValueError:  # it has no attention layer
        return int(cache.has_previous_state())


def _counts(cache: Any) -> bool:
    """Whether the cache counts its tokens: it has a layer of attention, or no layer yet."""
    if not isinstance(cache, Cache):
        return False
    inner = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    return not inner.layers or any(isinstance(layer, CacheLayerMixin) for layer in inner.layers)


def _cache_in(output: Any) -> Cache | None:
    """The cache in a model's output, which is a tuple with return_dict=False."""
    found = output if isinstance(output, tuple) else [getattr(output, name, None) for name in CACHE_ARGUMENTS]
    return next((one for one in found if isinstance(one, Cache)), None)


def _devices(tensors: Iterable[Any]) -> list[torch.device]:
    return list({one.device for one in tensors if isinstance(one, Tensor) and one.device.type == "cuda"})
