"""The input of a metric of pictures: a batch of pictures with their scenes, and the models to score them.

Instruments   CLIP, recogniser and reference pictures, each loaded at first use
Shots         a batch; its CLIP vectors are computed once for all metrics
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

# Pictures from 64 to 1024 pixels can be scored; smaller ones show nothing.
SMALLEST = 8


class Instruments:
    """The models that score pictures. `references`: LoRA -> the folder of pictures that show what it adds."""

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
        """[d], the mean of the unit vectors of a LoRA's reference pictures; products with it are mean cosines.

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
    """Pictures [B, 3, H, W] in [0, 1] and the scene of each."""

    pixels: Tensor
    scenes: Sequence[Scene]
    instruments: Instruments = field(repr=False)

    @cached_property
    def vectors(self) -> Tensor:
        """[B, d], the unit vectors of the pictures."""
        with torch.no_grad():
            return self.instruments.clip.images(self.pixels)


PictureMetric = Callable[[Shots], list[float]]


def pixels_of(picture: Image.Image) -> Tensor:
    """[3, H, W] in [0, 1] of a picture in RGB."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
