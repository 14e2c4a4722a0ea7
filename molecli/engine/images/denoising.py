"""The loss of one training step on pictures: noise on them, and what the UNet takes it for.

PictureLoss         the loss function that the training loop asks for
scaled_gradients    float16: gradients large enough for it between the loss and the parameters
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from molecli.backbones.diffusion import Conditioning, Diffusion
from molecli.backbones.prompts import PromptCut
from molecli.backbones.text import seeded
from molecli.engine.images.pictures import Album, Lesson
from molecli.engine.loop import StepLoss
from molecli.engine.ranks import StepContext

# What a mean over a picture's latents leaves of a gradient is near the smallest number that float16 holds.
GRADIENT_SCALE = 1024.0
# Pictures at once where latents are prepared ahead.
AT_ONCE = 8


class PictureLoss:
    """DreamBooth's loss: the denoising error of a step's pictures, and `prior_weight` times that of the class's beside.

    Latents are prepared ahead where a picture looks alike at every step, prompts where the text encoder stays as it is.
    Source: Ruiz et al., arXiv 2208.12242, Eq. 2, where the prior's weight is λ.
    """

    def __init__(self, backbone: Diffusion, album: Album, *, prior_weight: float, text_encoder: bool) -> None:
        self.backbone, self.album, self.prior_weight = backbone, album, prior_weight
        self.prompts = [picture.prompt for picture in album.pictures]
        with torch.no_grad():
            kept = {prompt: backbone.encode([prompt], size=self._size) for prompt in dict.fromkeys(self.prompts)}
            self.latents = self._all_latents() if album.fixed else None
        self.conditionings = None if text_encoder else kept

    def __call__(self, lessons: Sequence[Lesson], context: StepContext) -> StepLoss:
        """The step's loss over its lessons. Crops, noise and timesteps are drawn by torch's global CPU generator."""
        places = [lesson.picture for lesson in lessons]
        places += [lesson.prior for lesson in lessons if lesson.prior is not None]
        with self.precision():
            errors = self.errors(places, *self._drawn(places))
        count = len(lessons)
        own, prior = errors[:count], errors[count:]
        total = own.sum() + self.prior_weight * prior.sum()
        if self._half is torch.float16 and total.requires_grad:
            total.register_hook(lambda gradient: gradient * GRADIENT_SCALE)
        extras = {"instance_loss": own.mean(), "class_loss": prior.mean()} if len(prior) else {}
        return StepLoss(total, count, extras)

    def errors(self, places: Sequence[int], clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """[B], each picture's mean squared error. Source: DDPM, Ho et al. 2020, Eq. 14."""
        backbone = self.backbone
        noisy = backbone.noising.add_noise(clean, noise, timesteps)
        predicted = backbone.predict(noisy, timesteps, self._conditioning(places))
        # In float32 whatever the base's type: a mean of many small squares.
        target = backbone.target(clean, noise, timesteps)
        return (predicted.float() - target.float()).square().flatten(1).mean(1)

    @torch.no_grad()
    def probe(self, places: Sequence[int], seed: int, *, timesteps: int = 4) -> float:
        """The mean error of these pictures under the same noise whenever it is asked, at evenly spread timesteps."""
        total = 0.0
        last = self.backbone.noising.config.num_train_timesteps
        with seeded(seed, self.backbone.device), self.precision():
            for i in range(timesteps):
                for place in places:
                    clean, noise, _ = self._drawn([place])
                    moment = torch.tensor([last * (2 * i + 1) // (2 * timesteps)], device=clean.device)
                    total += float(self.errors([place], clean, noise, moment))
        return total / (timesteps * len(places))

    def precision(self) -> AbstractContextManager[Any]:
        """Mixed precision where the base is in half precision: its matrices stay so, the LoRA's stay in float32."""
        if self._half is None:
            return nullcontext()
        return torch.autocast(self.backbone.device.type, dtype=self._half)

    @property
    def _half(self) -> torch.dtype | None:
        dtype = self.backbone.pipe.unet.conv_in.weight.dtype
        return dtype if dtype in (torch.bfloat16, torch.float16) else None

    @property
    def _size(self) -> tuple[int, int]:
        return self.album.resolution, self.album.resolution

    def _drawn(self, places: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """(clean latents, noise, timesteps) on the device, the same numbers on every device."""
        device = self.backbone.device
        if self.latents is not None:
            clean = self.latents[list(places)]
        else:
            with torch.no_grad():
                clean = self.backbone.latents(self.album.pixels(places).to(device)).float()
        noise = torch.randn(clean.shape)
        timesteps = torch.randint(self.backbone.noising.config.num_train_timesteps, (len(places),))
        return clean, noise.to(device), timesteps.to(device)

    def _all_latents(self) -> Tensor:
        """[pictures, C, h, w] in float32."""
        device, rows = self.backbone.device, range(len(self.album))
        pieces = [rows[start : start + AT_ONCE] for start in range(0, len(rows), AT_ONCE)]
        return torch.cat([self.backbone.latents(self.album.pixels(piece).to(device)).float() for piece in pieces])

    def _conditioning(self, places: Sequence[int]) -> Conditioning:
        prompts = [self.prompts[place] for place in places]
        if self.conditionings is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", PromptCut)  # said once, when the run began
                return self.backbone.encode(prompts, size=self._size)
        rows = [self.conditionings[prompt] for prompt in prompts]
        first = rows[0]
        if first.pooled is None or first.time_ids is None:
            return replace(first, embeds=torch.cat([row.embeds for row in rows]))
        return Conditioning(
            torch.cat([row.embeds for row in rows]),
            torch.cat([row.pooled for row in rows if row.pooled is not None]),
            torch.cat([row.time_ids for row in rows if row.time_ids is not None]),
        )


@contextmanager
def scaled_gradients(parameters: Iterable[nn.Parameter], base: torch.dtype) -> Iterator[None]:
    """Inside, what `PictureLoss` multiplied gradients by on a float16 base is divided out again, in float32."""
    hooks = []
    if base is torch.float16:
        hooks = [parameter.register_hook(lambda gradient: gradient / GRADIENT_SCALE) for parameter in parameters]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
