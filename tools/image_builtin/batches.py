"""Batches of captioned scenes: objects, styles and backgrounds, drawn by `scenes`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import scenes
from .captions import LENGTH, CaptionIds, caption_ids, vocabulary
from .data import STYLES, Objects, load_objects, load_sprites
from .tokenizer import build_tokenizer


@dataclass(frozen=True)
class Batch:
    """Scenes, and what they show."""

    images: Tensor  # [B, 3, 64, 64] in [0, 1]
    which: Tensor  # [B, K] positions in Objects.words, -1 for none
    background: Tensor  # [B]
    flat: Tensor  # [B] bool


@dataclass(frozen=True)
class World:
    """Everything that scenes are made from, on one device."""

    objects: Objects
    named: Tensor  # [2 * objects, 4, 64, 64]: the base's style, then the held-out one
    others: Tensor  # pictures in the base's style that no word names
    everything: Tensor  # pictures in the base's style, the held-out concepts aside
    ids: CaptionIds

    @property
    def device(self) -> torch.device:
        """The device of the pictures."""
        return self.named.device

    def base(self) -> Tensor:
        """Positions of the objects that the base is trained on."""
        return torch.arange(len(self.objects.base), device=self.device)

    def concepts(self) -> Tensor:
        """Positions of the held-out concepts."""
        return torch.arange(len(self.objects.base), len(self.objects.words), device=self.device)

    def all(self) -> Tensor:
        """Positions of every object."""
        return torch.arange(len(self.objects.words), device=self.device)

    def draw(
        self,
        generator: torch.Generator,
        batch: int,
        *,
        shares: Sequence[float] = scenes.BASE_COUNTS,
        allowed: Tensor | None = None,
        flat: float = 0.0,
    ) -> Batch:
        """Scenes with `allowed` objects (by default all of the base), a share of them in the held-out style."""
        allowed = self.base() if allowed is None else allowed
        count = scenes.counts(generator, batch, shares)
        which = scenes.choose(generator, count, len(shares), allowed)
        styled = torch.rand(batch, generator=generator, device=self.device) < flat
        return self.scene(generator, which, styled)

    def scene(
        self,
        generator: torch.Generator,
        which: Tensor,
        styled: Tensor,
        *,
        sizes: Mapping[int, tuple[float, float]] = scenes.SIZES,
        background: Tensor | None = None,
    ) -> Batch:
        """Scenes with these objects [B, K] in these styles [B], each on its background [B], or on a random one."""
        if background is None:
            kinds = len(self.objects.phrases)
            background = torch.randint(kinds, (len(which),), generator=generator, device=self.device)
        layout = scenes.arrange(generator, which, sizes)
        rows = torch.where(which >= 0, which + styled.unsqueeze(1) * len(self.objects.words), -1)
        canvas = scenes.draw_backgrounds(generator, background, self.objects)
        layout = scenes.Layout(rows, layout.size, layout.angle, layout.centre)
        return Batch(scenes.render(self.named, layout, canvas), which, background, styled)


def load_world(source: Path, device: torch.device | str, tokenizer_folder: Path, *, small: bool = False) -> World:
    """Reads the pictures and builds the tokenizer of their language; `small`: read only the named pictures."""
    objects = load_objects()
    only = {*objects.base.values(), *objects.concepts.values(), "1f600", "1f680"} if small else None
    sprites = load_sprites(source, device, only=only)
    vocab = build_tokenizer(vocabulary(objects), LENGTH, tokenizer_folder).get_vocab()
    return World(
        objects=objects,
        named=torch.cat([sprites.named(objects, style) for style in STYLES]),
        others=sprites.without(objects, named=True),
        everything=sprites.without(objects),
        ids=caption_ids(objects, vocab, device),
    )
