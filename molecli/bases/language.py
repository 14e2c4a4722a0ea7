"""Shared by the text backbones: adaptable matrices, padding, losses, length limits, decoding settings, seeds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from molecli.bases.fused import is_layer
from molecli.bases.own_names import own_names
from molecli.errors import UsageError
from molecli.functional.layers import linear_shape
from molecli.functional.wrapped import device_of, layers_of, own_layer
from molecli.protocols import Matrices, Shape

UNSCORED = -100
# Models whose LoRAs are attached in a way that does not work with a key-value cache.
_UNCACHED: WeakSet[nn.Module] = WeakSet()
Side = Literal["left", "right"]


def adaptable_matrices(model: nn.Module) -> Matrices:
    """Module name -> (d_out, d_in) of every linear layer, quantised or not, the output head apart; also works on the
    meta device. See `layers.linear_shape`."""
    head, embeddings = model.get_output_embeddings(), _embeddings(model)  # type: ignore[operator]
    found: dict[str, Shape] = {}
    last: dict[str, Shape] = {}
    tables: dict[str, Shape] = {}
    for name, wrapped in layers_of(model):
        module = own_layer(wrapped)
        if module is embeddings and isinstance(module, nn.Embedding):
            tables[name] = (module.num_embeddings, module.embedding_dim)
        elif (shape := linear_shape(module)) is not None and is_layer(module):
            (last if head in (module, wrapped) else found)[name] = shape
    return Matrices(found, head=last, tables={**tables, **last}, renamed=own_names(model, [*found, *last, *tables]))


def _embeddings(model: nn.Module) -> nn.Module | None:
    try:
        return model.get_input_embeddings()  # type: ignore[operator]
    except NotImplementedError:  # of models whose embeddings transformers does not know
        return None


def freeze(model: nn.Module) -> nn.Module:
    """The same model in eval mode, with all parameters frozen."""
    return model.eval().requires_grad_(False)


def pad(
    rows: Sequence[Sequence[int]], value: int, *, side: Literal["left", "right"] = "right"
) -> tuple[Tensor, Tensor]:
    """(ids, mask), both [B, longest row]; the mask is 0 on padding."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), value, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, place] = torch.tensor(row, dtype=torch.long)
        mask[i, place] = 1
    return ids, mask


def summed_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of cross-entropies over the scored labels, their number); logits [B, T, V] belong to labels [B, T]."""
    # In float32, because a sum over many tokens in bf16 would lose the small terms.
    flat = logits.float().flatten(0, 1)
    total = nn.functional.cross_entropy(flat, labels.flatten(), ignore_index=UNSCORED, reduction="sum")
    return total, (labels != UNSCORED).sum()


def mean_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """[B], each example's mean cross-entropy over its scored labels: a short answer counts as much as a long one."""
    flat = nn.functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=UNSCORED, reduction="none"
    )
    counts = (labels != UNSCORED).sum(1)
    return flat.view_as(labels).sum(1) / counts.clamp_min(1)


def summed(losses: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of losses [B], their number)."""
    return losses.sum(), torch.tensor(len(losses), device=losses.device)


def text_config(model: nn.Module) -> Any:
    """The configuration of the language model: of a multimodal model, its text part; of two stacks, the encoder's."""
    config: Any = model.config
    return getattr(config, "encoder", config) if config.is_encoder_decoder else config.get_text_config()


def outside_text(model: nn.Module, matrices: Iterable[str]) -> list[str]:
    """Those of the matrices that are not in the language model of a multimodal one, such as the vision encoder's."""
    kind = type(text_config(model))
    if isinstance(model.config, kind) or model.config.is_encoder_decoder:  # type: ignore[union-attr]
        return []
    parts = [name for name, module in model.named_modules() if isinstance(getattr(module, "config", None), kind)]
    head = model.get_output_embeddings()  # type: ignore[operator]
    inside = [name for name, module in model.named_modules() if module is head]
    return [name for name in matrices if name not in inside and not any(name.startswith(f"{part}.") for part in parts)]


def position_limit(model: nn.Module) -> int | None:
    """The number of tokens that the model has positions for; None if positions are relative and unlimited (T5)."""
    limit = getattr(text_config(model), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def check_lengths(lengths: Iterable[int], limit: int | None, *, room: int = 0, names: Sequence[str] = ()) -> None:
    """Raises: UsageError for the first text with more than `limit - room` tokens; texts are never cut silently."""
    if limit is None:
        return
    for i, length in enumerate(lengths):
        if length + room > limit:
            where = names[i] if names else f"prompt {i + 1}"
            needed = f"{length} tokens" + (f" and {room} new ones" if room else "")
            remedy = "Shorten it" + (" or lower --max-new-tokens." if room else ".")
            raise UsageError(where, f"{needed} do not fit in this base's limit of {limit}", remedy)


def stop_tokens(model: nn.Module, tokenizer: Any) -> list[int]:
    """The ids that end a completion: those in the generation config (instruction-tuned models list several) and eos."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})


# What decoding takes from a checkpoint's generation config, with a ban on its padding token (`_bans`); everything else
# in it has no effect. The table in docs/prompts.md has every field.
OWN_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id")


@dataclass(frozen=True)
class Decoding:
    """How one batch is completed: greedily at temperature 0, otherwise by plain sampling, repeatable with `seed`."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    use_cache: bool = True

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UsageError("--max-new-tokens", f"{self.max_new_tokens} is less than 1", "Write 1 or more.")
        if not 0 <= self.temperature < float("inf"):
            raise UsageError("--temperature", f"{self.temperature} is not a temperature", "Write 0 (greedy) or more.")
        if not 0 < self.top_p <= 1:
            raise UsageError("--top-p", f"{self.top_p} is not in (0, 1]", "Write 1 to keep every token.")

    def complete(
        self,
        model: nn.Module,
        ids: Tensor,
        mask: Tensor,
        *,
        stop: Sequence[int],
        pad_id: int,
        start: int | None = None,
        forced: int | None = None,
    ) -> Tensor:
        """The output of `model.generate` for prompts ids, mask [B, T], each with up to max_new_tokens more tokens.

        start, forced: the decoder's start token and the first token of the completion, if they are not the
        checkpoint's.
        """
        device = device_of(model)
        settings = self._settings(stop, pad_id, use_cache=self.use_cache and model not in _UNCACHED)
        settings.decoder_start_token_id, settings.forced_bos_token_id = start, forced
        settings.suppress_tokens = [pad_id] if pad_id not in stop and _bans(model, pad_id) else None
        with torch.no_grad(), seeded(self.seed, device), _plain(model):
            return model.generate(  # type: ignore[operator]
                input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings
            )

    def _settings(self, stop: Sequence[int], pad_id: int, *, use_cache: bool) -> GenerationConfig:
        """Greedy decoding or plain sampling, in transformers' terms."""
        sampling = self.temperature > 0
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            eos_token_id=list(stop) or None,
            pad_token_id=pad_id,
            use_cache=use_cache,
            do_sample=sampling,
            temperature=self.temperature if sampling else 1.0,
            top_p=self.top_p if sampling else 1.0,
            top_k=0 if sampling else 50,  # transformers treats 50 as unset in greedy decoding
        )


def decoder_start(model: nn.Module, where: str) -> int:
    """The token with which an encoder-decoder model's completion starts. Raises: UsageError if none is configured."""
    own: Any = model.generation_config
    named = (own.decoder_start_token_id, getattr(model.config, "decoder_start_token_id", None), own.bos_token_id)
    start = next((token for token in named if token is not None), None)
    if not isinstance(start, int):
        what = "its configuration names no token that a completion starts with"
        raise UsageError(where, what, "Write decoder_start_token_id in its generation_config.json.")
    return start


def _bans(model: nn.Module, token: int) -> bool:
    """Whether the generation config rules a token out. Marian's padding needs this: nothing ever trained its logit."""
    own: Any = model.generation_config
    return [token] in (own.bad_words_ids or []) or token in (own.suppress_tokens or [])


@contextmanager
def _plain(model: nn.Module) -> Iterator[None]:
    """A context in which the model's generation config has only its token ids.

    transformers fills every unset value from it: beams, penalties, suppressed tokens. Scores would then depend on
    settings that the recipe does not name.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig(**{name: getattr(own, name, None) for name in OWN_TOKENS})
    try:
        yield
    finally:
        model.generation_config = own


@contextmanager
def uncached(model: nn.Module) -> Iterator[None]:
    """A context in which the model gets no key-value cache, neither from `Decoding` nor from its own default."""
    settings = [config for config in (model.config, model.generation_config) if hasattr(config, "use_cache")]
    were = [config.use_cache for config in settings]
    _UNCACHED.add(model)
    for config in settings:
        config.use_cache = False
    try:
        yield
    finally:
        _UNCACHED.discard(model)
        for config, was in zip(settings, were, strict=True):
            config.use_cache = was


@contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """A context in which random numbers depend on `seed`; afterwards the generators are restored. None: no change."""
    if seed is None:
        yield
        return
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
