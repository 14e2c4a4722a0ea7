"""Whether a pass with a cache goes on from the prompt that gates were computed for; if not, or if nobody can know, the
call is refused.

Contents: Trace, of a pass; Witness, of a cache; check_continues, check_whole, rolled_back.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import Cache, EncoderDecoderCache

from molecli.errors import RunError

if TYPE_CHECKING:
    from molecli.mixture.streams import Pass

_FRESH = "Start with an empty cache."
# Passes with at most so many tokens keep what is needed to take some of them back.
SHORT = 64


@dataclass
class Witness:
    """The tensors of a cache's first layer after a pass: if its rows are put in another order, they are others."""

    tensors: dict[str, weakref.ref[Tensor]]

    @classmethod
    def of(cls, cache: Any) -> Witness:
        return cls({name: weakref.ref(tensor) for name, tensor in _tensors(cache)})

    def unchanged(self, cache: Any) -> bool:
        now = dict(_tensors(cache))
        return now.keys() == self.tensors.keys() and all(self.tensors[name]() is now[name] for name in now)


def _tensors(cache: Any) -> Iterator[tuple[str, Tensor]]:
    inner = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    if not isinstance(inner, Cache) or not inner.layers:
        return
    for name, value in vars(inner.layers[0]).items():
        members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, one in members:
            if isinstance(one, Tensor):
                yield f"{name}.{key}", one
        if isinstance(value, Tensor):
            yield name, value


@dataclass
class Trace:
    """What a decoder's pass leaves for later ones.

    rows: its sequences; start: the tokens before it, None if they cannot be counted; end: those after it; prompt: the
    tokens of the prompt, all of them unless `generate` said otherwise; cache, witness: its cache when it had ended.
    """

    rows: int = 0
    start: int | None = 0
    end: int = 0
    prompt: int = 0
    cache: weakref.ref[Any] | None = None
    witness: Witness | None = None

    def left(self, cache: Any) -> None:
        """Notes the cache at the end of the pass."""
        self.cache = weakref.ref(cache) if isinstance(cache, Cache) else None
        self.witness = Witness.of(cache) if self.rows > 1 and self.cache is not None else None


def check_continues(now: Pass, origin: Trace | None, *, fixed: bool) -> None:
    """Whether the pass `now` goes on from the prompt of the pass `origin`, for gates whose values are `fixed` after the
    prompt, or for others that remember. Raises: RunError if it does not, or if that is not known.
    """
    if now.past is None:
        what = "this kind of cache does not say whether it continues a prompt"
        raise RunError("generation", what, "Write use_cache=False, or use gates with --pool token.")
    if origin is None:
        what = "the cache has tokens from before the experts were attached or masked"
        raise RunError("generation", what, _FRESH)
    trace = now.trace
    if origin.cache is None or trace.cache is None or origin.cache() is not trace.cache():
        what, remedy = "the cache is not that of the last prompt, for which the gates were computed", _FRESH
        if now.generation is not None and (now.generation.start == 0 or now.generation.inner):
            what = (
                "the model reads two texts in turn, as with guidance_scale or drafts of its own, and gates follow one"
            )
            remedy = "Leave that out, or use gates with --pool token."
        raise RunError("generation", what, remedy)
    if fixed and trace.start is not None and trace.start < origin.prompt:
        what = "the cache was cut back into the prompt, for which the gates were computed"
        raise RunError("generation", what, _FRESH)
    # Beams of one prompt have the same fixed values, and `generate` keeps them together.
    beams = fixed and now.generation is not None and trace.rows % origin.rows == 0
    if (now.moved or trace.rows != origin.rows) and not beams:
        what = "the rows of the cache were changed or put in another order since the last pass, as beam search does"
        remedy = "Call model.generate." if fixed else "Write use_cache=False, or use gates with --pool prompt or token."
        raise RunError("generation", what, remedy)
    if fixed:
        _check_answer(now)


def check_whole(now: Pass) -> None:
    """Raises: RunError if the pass reads only a part of the prompt, as `generate` said."""
    trace = now.trace
    if now.memory is None and trace.prompt > trace.end:
        what = f"a pass reads only {trace.end} of the {trace.prompt} tokens of the prompt, by which gates weigh LoRAs"
        remedy = "Leave prefill_chunk_size and guidance_scale out, or use gates with --pool running or token."
        raise RunError("generation", what, remedy)


def _check_answer(now: Pass) -> None:
    """Raises: RunError if tokens after a cached prompt may belong to the prompt too."""
    if now.memory is not None or now.trace.end - (now.past or 0) <= 1:
        return
    generation = now.generation
    if generation is not None and (generation.start == 0 or generation.passes > 1):
        return  # it is known where the prompt ends, and it was complete
    if now.tokens is not None and now.tokens.all_answer():
        return
    what = "several tokens follow a cached prompt, and whether they are prompt too is not known"
    raise RunError("generation", what, "Give the whole prompt in one pass, or use gates with --pool running or token.")


def rolled_back(state: tuple[Tensor, Tensor] | None, last: Trace, start: int | None) -> tuple[Tensor, Tensor] | None:
    """The state of `running` pooling when `start` tokens were read, of the states [B, K, .] at the end of pass `last`.

    Assisted decoding takes back the candidates that it does not accept. Raises: RunError if it is too long ago.
    """
    if state is None:
        return None
    back = 0 if start is None or last.start is None else last.end - start
    kept = state[0].shape[1]
    if not 0 <= back < kept:
        what = f"{back} tokens were taken from the cache, which gates that average over all tokens had read"
        raise RunError("generation", what, _FRESH)
    return state[0][:, kept - 1 - back], state[1][:, kept - 1 - back]
