"""What a metric of pictures is given: a batch of pictures, the scene of each, and the instruments to look at them with.

Instruments   CLIP, recogniser and reference pictures, each read when it is first asked for
Shots         a batch; its CLIP vectors are computed once, whichever metrics ask
pixels_of     a picture as a tensor
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from molecli.files.pictures import pictures_in, read_picture
from molecli.metrics.clip import Clip
from molecli.metrics.recogniser import Recogniser
from molecli.protocols import Scene

# A 64-pixel picture may be scored as well as one of 1024; below, there is nothing to see.
SMALLEST = 8


class Instruments:
    """What pictures are looked at with. `references`: LoRA -> the folder of pictures that show what it adds."""

    def __init__(
        self,
        *,
        clip: Callable[[], Clip],
        recogniser: Callable[[], Recogniser],
        references: Mapping[str, str],
    ) -> None:
        self._clip, self._recogniser, self.references = clip, recogniser, dict(references)
        self._texts: dict[str, Tensor] = {}
        self._looks: dict[str, Tensor] = {}

    @cached_property
    def clip(self) -> Clip:
        return self._clip()

    @cached_property
    def recogniser(self) -> Recogniser:
        return self._recogniser()

    def text(self, prompt: str) -> Tensor:
        """[d], the unit vector of a prompt."""
        if prompt not in self._texts:
            self._texts[prompt] = self.clip.texts([prompt])[0]
        return self._texts[prompt]

    @torch.no_grad()
    def look(self, lora: str) -> Tensor:
        """[d], the mean of the unit vectors of a LoRA's reference pictures: a cosine with it is the mean cosine.

        Raises: UsageError and MismatchError as reading pictures does.
        """
        if lora not in self._looks:
            # One by one: photographs differ in size.
            files = pictures_in(self.references[lora])
            vectors = [self.clip.images(pixels_of(read_picture(file, smallest=SMALLEST))[None]) for file in files]
            self._looks[lora] = torch.cat(vectors).mean(dim=0)
        return self._looks[lora]


@dataclass(frozen=True)
class Shots:
    """Pictures [B, 3, H, W] in [0, 1] and the scene that each shows."""

    pixels: Tensor
    scenes: Sequence[Scene]
    instruments: Instruments = field(repr=False)

    @cached_property
    def vectors(self) -> Tensor:
        """[B, d], the pictures' unit vectors."""
        with torch.no_grad():
            return self.instruments.clip.images(self.pixels)


PictureMetric = Callable[[Shots], list[float]]


def pixels_of(picture: Image.Image) -> Tensor:
    """[3, H, W] in [0, 1] of a picture in RGB."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
