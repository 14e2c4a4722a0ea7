"""What a call of a language model says of its tokens: which are padding, and which belong to the prompt.

All is taken from the call's own arguments, in every form that transformers allows, and only when a gate asks for it. A
form that does not say it is refused by name.

by_name        the arguments of a call, also those given by position
KeyRange       the tokens that the key axis of a prepared mask covers
CalledTokens   validity and prompt of the tokens of one call
visible_memory which tokens of an encoder a decoder may read
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache

from molecli.errors import RunError

UNSCORED = -100
# They mark rows that hold several sequences (padding-free batches, continuous batching).
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx", "block_table")
_OTHER_POOL = "use gates with --pool token"


def positional(module: nn.Module) -> tuple[str, ...]:
    """The names of the arguments of `module` that may be given by position."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = tuple(name for name, one in inspect.signature(module.forward).parameters.items() if one.kind in kinds)
    return names[1:] if names[:1] == ("self",) else names


def by_name(names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The call's arguments by name; `names` are those of the positional ones."""
    return {**dict(zip(names, args, strict=False)), **kwargs} if args else kwargs


class KeyRange(NamedTuple):
    """A prepared mask with `length` keys begins at the token `offset`."""

    length: int
    offset: int


def key_ranges(cache: Cache | None, past: int, tokens: int) -> tuple[KeyRange, ...]:
    """What the masks of a pass may cover: all tokens so far, or what a layer of the cache keeps (static, sliding)."""
    ranges = [KeyRange(past + tokens, 0)]
    if cache is not None:
        plain = [not (linear or dummy) for linear, dummy in zip(cache.is_linear, cache.is_dummy, strict=True)]
        for kind in (False, True):
            layers = [i for i, (slides, kept) in enumerate(zip(cache.is_sliding, plain, strict=True)) if kept]
            found = next((i for i in layers if cache.is_sliding[i] == kind), None)
            if found is not None:
                ranges.append(KeyRange(*map(int, cache.get_mask_sizes(tokens, found))))
    return tuple(ranges)


class CalledTokens:
    """The tokens [B, T] of one call.

    told: the arguments by name; past: the number of tokens before them, None if it cannot be counted; keys: what a
    prepared mask may cover; prompt_length: the number of tokens of the prompt, if `generate` said it; memory: whether
    the prompt is in an encoder, so that only the start token of these belongs to it.
    """

    def __init__(
        self,
        told: Mapping[str, Any],
        *,
        past: int | None = 0,
        keys: Callable[[], tuple[KeyRange, ...]] | None = None,
        prompt_length: int | None = None,
        memory: bool = False,
    ) -> None:
        ids = told.get("input_ids")
        shaped = ids if ids is not None else told.get("inputs_embeds")
        self._shaped = shaped
        self.shape: tuple[int, int] | None = None
        if isinstance(shaped, Tensor) and shaped.dim() == (2 if ids is not None else 3):
            self.shape = shaped.shape[0], shaped.shape[1]
        self._told, self._past, self._prompt_length, self._memory = told, past, prompt_length, memory
        mask = told.get("attention_mask")
        # A cache changes during the pass, so its layers are asked before it, if that is needed.
        prepared = mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2)
        self._keys = keys() if prepared and keys is not None and self.shape is not None else ()

    @cached_property
    def valid(self) -> Tensor:
        """[B, T], 1 for tokens that are not padding. Raises: RunError if the call does not say it."""
        batch, tokens = self.size()
        packed = next((name for name in _PACKED if self._told.get(name) is not None), None)
        if packed is not None:
            what = f"the call packs several sequences into one row ({packed}), and gates weigh LoRAs for each sequence"
            raise RunError("generation", what, f"Give each sequence its own row, or {_OTHER_POOL}.")
        mask = self._told.get("attention_mask")
        if isinstance(mask, Mapping):
            mask = _widest(mask)
        assert self._shaped is not None
        device = self._shaped.device
        if mask is None:
            self._check_positions()
            return torch.ones(batch, tokens, dtype=torch.long, device=device)
        if not isinstance(mask, Tensor) or mask.dim() not in (2, 3, 4):
            what = f"a mask of the kind {type(mask).__name__} does not say which tokens are padding"
            raise RunError("generation", what, f"Give attention_mask as [batch, tokens], or {_OTHER_POOL}.")
        found = self._columns(mask) if mask.dim() == 2 else self._diagonal(mask)
        return found.expand(batch, tokens).to(device, torch.long)

    @cached_property
    def prompt(self) -> Tensor:
        """[B, T], 1 for tokens that belong to the prompt. Raises: RunError if the call does not say it."""
        valid = self.valid
        if self._memory:
            return valid * (valid.cumsum(1) == 1)  # the start token; the actual prompt is the memory
        scored = self._scored()
        if scored is not None:
            # Teacher forcing: the prompt ends before the first scored token, as in generation.
            return valid * (scored.cumsum(1) == 0)
        if self._prompt_length is not None and self._past is not None:
            places = torch.arange(self._past, self._past + valid.shape[1], device=valid.device)
            return valid * (places < self._prompt_length)
        return valid

    @cached_property
    def memory_valid(self) -> Tensor:
        """[B, S], 1 for the encoder's tokens that a decoder may read. Raises: RunError if the call does not say it."""
        mask = self._told.get("encoder_attention_mask")
        return visible_memory(self._told["encoder_hidden_states"], self._told.get("encoder_padding_mask", mask))

    def all_answer(self) -> bool:
        """Whether labels say that no token of this call belongs to the prompt."""
        return self._scored() is not None and not bool(self.prompt.any())

    def size(self) -> tuple[int, int]:
        """The numbers of sequences and tokens. Raises: RunError if the call does not say them."""
        if self.shape is None:
            what = (
                "the model was called without input_ids [batch, tokens] or inputs_embeds, so its tokens are not known"
            )
            raise RunError("generation", what, "Give one of them.")
        return self.shape

    def _scored(self) -> Tensor | None:
        """[B, T], which tokens are scored, as the labels say."""
        labels, shifted = self._told.get("labels"), self._told.get("shift_labels")
        given = labels if labels is not None else shifted
        if given is None:
            return None
        if tuple(given.shape) != self.size():
            what = f"labels of shape {tuple(given.shape)} do not say where the prompt ends in {self.shape} tokens"
            raise RunError("generation", what, "Give labels [batch, tokens].")
        scored = given != UNSCORED
        if labels is None:  # the label of each token is the one after it
            scored = nn.functional.pad(scored[:, :-1], (1, 0))
        return scored

    def _check_positions(self) -> None:
        """Raises: RunError if positions jump without a mask: then they tell of padding or of several sequences."""
        positions = self._told.get("position_ids")
        if not isinstance(positions, Tensor) or positions.dim() != 2 or positions.shape[1] < 2:
            return
        if bool((positions.diff(dim=1) != 1).any()):
            what = "position_ids jump without an attention_mask: they may mean padding or several sequences in a row"
            raise RunError("generation", what, f"Give the attention_mask too, or {_OTHER_POOL}.")

    def _columns(self, mask: Tensor) -> Tensor:
        """The part of a mask [B, L] over all tokens so far that belongs to these tokens."""
        _, tokens = self.size()
        length = mask.shape[1]
        if self._past is None:  # a recurrent state does not count its tokens
            fits, start = length >= tokens, length - tokens
        else:
            # A mask may be as long as a static cache: then the tokens are not its last ones.
            fits, start = (
                length >= self._past + tokens and (self._past > 0 or length == tokens or self._cached),
                self._past,
            )
        if not fits:
            seen = "" if not self._past else f" after {self._past} in the cache"
            what = f"an attention_mask over {length} tokens does not fit {tokens} tokens{seen}"
            raise RunError("generation", what, "Give a mask over all tokens so far.")
        return mask[:, start : start + tokens] != 0

    @property
    def _cached(self) -> bool:
        return any(isinstance(value, Cache) for value in self._told.values())

    def _diagonal(self, mask: Tensor) -> Tensor:
        """Which tokens see themselves in a mask [B, heads, T, L] or [B, T, L]: padding is seen by nobody."""
        _, tokens = self.size()
        visible = _visible(mask)
        if visible is None:
            what = f"an attention_mask of shape {tuple(mask.shape)} must be bool or floating point, not {mask.dtype}"
            raise RunError("generation", what, "Give attention_mask as [batch, tokens].")
        visible = visible.any(1) if visible.dim() == 4 else visible
        queries, length = visible.shape[1:]
        offset = next((keys.offset for keys in self._keys if keys.length == length), None)
        if offset is None or queries not in (1, tokens):
            what = f"an attention_mask of shape {tuple(mask.shape)} does not say which of {tokens} tokens are padding"
            raise RunError("generation", what, "Give attention_mask as [batch, tokens].")
        places = torch.arange(tokens, device=mask.device)
        keys = places + ((self._past or 0) - offset)
        if queries < tokens:
            return visible[:, 0, keys]
        valid = visible[:, places, keys]
        before = visible[:, places[1:], keys[1:] - 1]
        if tokens > 1 and bool((valid[:, 1:] & valid[:, :-1] & ~before).any()):
            what = "the attention_mask separates tokens of one row, so that a row is more than one sequence"
            raise RunError("generation", what, f"Give each sequence its own row, or {_OTHER_POOL}.")
        return valid


def _widest(masks: Mapping[str, Any]) -> Any:
    """Of one mask for each kind of layer, that of the layers which see most; None if there is no padding at all."""
    if "full_attention" in masks:
        return masks["full_attention"]
    return next((mask for mask in masks.values() if mask is not None), None)


def _visible(mask: Tensor) -> Tensor | None:
    """Where a prepared mask, of truths or of numbers that are added to the scores, lets tokens be seen."""
    if mask.dtype == torch.bool:
        return mask
    # What hides a token is at least -1e4, as in half precision; biases such as ALiBi's are smaller.
    return mask > -5e3 if mask.dtype.is_floating_point else None


def visible_memory(memory: Tensor, mask: Any) -> Tensor:
    """[B, S], 1 for the encoder's tokens [B, S, d] that the decoder may read. Raises: RunError for other masks."""
    if mask is None:
        return torch.ones(memory.shape[:2], device=memory.device)
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape == memory.shape[:2]:
        return mask
    if isinstance(mask, Tensor) and mask.dim() in (3, 4) and mask.shape[-1] == memory.shape[1]:
        visible = _visible(mask)
        rows = None if visible is None else visible.flatten(1, -2)
        if rows is not None and bool((rows == rows[:, :1]).all()):
            return rows[:, 0].expand(memory.shape[:2]).long()
    shape = tuple(getattr(mask, "shape", ()))
    what = f"an encoder_attention_mask of shape {shape} does not say which of the encoder's tokens are padding"
    raise RunError("generation", what, "Give it as [batch, tokens].")
