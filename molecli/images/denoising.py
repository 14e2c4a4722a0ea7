"""The loss of one training step on pictures: noise on them, and what the UNet takes it for.

PictureLoss         the loss function that the training of a LoRA asks for
Prompts             what the UNet is told of prompts, kept where it stays the same
prediction_errors   each picture's squared error
draw_noise          noise and timesteps, the same numbers on every device
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
from transformers.modeling_layers import GradientCheckpointingLayer

from molecli.bases.diffusion import Conditioning, Diffusion
from molecli.bases.language import seeded
from molecli.bases.pipeline import TEXT_ENCODERS
from molecli.bases.prompt_limits import PromptCut
from molecli.images.pictures import Album, Lesson
from molecli.training.loop import StepLoss
from molecli.training.ranks import StepContext

# What a mean over a picture's latents leaves of a gradient is near the smallest number that float16 holds.
GRADIENT_SCALE = 1024.0
# Pictures at once where latents are prepared ahead.
AT_ONCE = 8


class PictureLoss:
    """DreamBooth's loss: the denoising error of a step's pictures, and `prior_weight` times that of the class's beside.

    Latents are prepared ahead where a picture looks alike at every step, prompts where the text encoder stays as it is.
    Source: Ruiz et al., arXiv 2208.12242, Eq. 2, where the prior's weight is λ; Ho & Salimans, arXiv 2207.12598,
    Algorithm 1, where `prompt_dropout` is p_uncond.
    """

    def __init__(
        self, backbone: Diffusion, album: Album, *, prior_weight: float, text_encoder: bool, prompt_dropout: float = 0.0
    ) -> None:
        self.backbone, self.album, self.prior_weight = backbone, album, prior_weight
        self.prompt_dropout = prompt_dropout
        self.prompts = [picture.prompt for picture in album.pictures]
        self.told = Prompts(backbone, album.resolution, keep=not text_encoder)
        self.told.look_at([*self.prompts, *([""] if prompt_dropout else [])])
        self.latents = all_latents(backbone, album) if album.fixed else None

    def __call__(self, lessons: Sequence[Lesson], context: StepContext) -> StepLoss:
        """The step's loss over its lessons. All that is random is drawn by torch's global CPU generator."""
        places = [lesson.picture for lesson in lessons]
        places += [lesson.prior for lesson in lessons if lesson.prior is not None]
        with self.precision():
            drawn = self._drawn(places)
            errors = self.errors(self._kept_prompts(places), *drawn)
        count = len(lessons)
        own, prior = errors[:count], errors[count:]
        total = own.sum() + self.prior_weight * prior.sum()
        if self._half is torch.float16 and total.requires_grad:
            total.register_hook(lambda gradient: gradient * GRADIENT_SCALE)
        extras = {"instance_loss": own.mean(), "class_loss": prior.mean()} if len(prior) else {}
        return StepLoss(total, count, extras)

    def errors(self, prompts: Sequence[str], clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """[B], the mean squared error of each picture under its prompt."""
        return prediction_errors(self.backbone, self.told(prompts), clean, noise, timesteps)

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
                    total += float(self.errors([self.prompts[place]], clean, noise, moment))
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

    def _kept_prompts(self, places: Sequence[int]) -> list[str]:
        """The pictures' prompts, a share of them left empty; without that share nothing is drawn."""
        prompts = [self.prompts[place] for place in places]
        if not self.prompt_dropout:
            return prompts
        dropped = torch.rand(len(places)) < self.prompt_dropout
        return ["" if drop else prompt for prompt, drop in zip(prompts, dropped.tolist(), strict=True)]

    def _drawn(self, places: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """(clean latents, noise, timesteps) on the device."""
        if self.latents is not None:
            clean = self.latents[list(places)]
        else:
            with torch.no_grad():
                clean = self.backbone.latents(self.album.pixels(places).to(self.backbone.device)).float()
        return clean, *draw_noise(self.backbone, clean)


class Prompts:
    """What the UNet is told of prompts, for pictures of `side` pixels.

    keep: the text encoder stays as it is, so that a prompt is encoded once, without gradient.
    """

    def __init__(self, backbone: Diffusion, side: int, *, keep: bool) -> None:
        self.backbone, self.size, self.keep = backbone, (side, side), keep
        self._kept: dict[str, Conditioning] = {}

    @torch.no_grad()
    def look_at(self, prompts: Sequence[str]) -> None:
        """Encodes what is new of `prompts`; warns of what is cut of a prompt that is too long."""
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._kept:
                self._kept[prompt] = self.backbone.encode([prompt], size=self.size)

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        """What the UNet is told, a row for each prompt."""
        if self.keep:
            self.look_at(prompts)
            return _joined([self._kept[prompt] for prompt in prompts])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PromptCut)  # said once, when the run began
            return self.backbone.encode(prompts, size=self.size)


def prediction_errors(
    backbone: Diffusion, told: Conditioning, clean: Tensor, noise: Tensor, timesteps: Tensor
) -> Tensor:
    """[B], each picture's mean squared error. Source: DDPM, Ho et al. 2020, Eq. 14."""
    noisy = backbone.noising.add_noise(clean, noise, timesteps)
    predicted = backbone.predict(noisy, timesteps, told)
    # In float32 whatever the base's type: a mean of many small squares.
    target = backbone.target(clean, noise, timesteps)
    return (predicted.float() - target.float()).square().flatten(1).mean(1)


def draw_noise(backbone: Diffusion, clean: Tensor) -> tuple[Tensor, Tensor]:
    """(noise like `clean`, timesteps [B]) on its device, drawn by torch's global CPU generator."""
    noise = torch.randn(clean.shape)
    timesteps = torch.randint(backbone.noising.config.num_train_timesteps, (len(clean),))
    return noise.to(clean.device), timesteps.to(clean.device)


@torch.no_grad()
def all_latents(backbone: Diffusion, album: Album) -> Tensor:
    """[pictures, C, h, w] in float32, of an album whose pictures look alike at every step."""
    rows = range(len(album))
    pieces = [rows[start : start + AT_ONCE] for start in range(0, len(rows), AT_ONCE)]
    return torch.cat([backbone.latents(album.pixels(piece).to(backbone.device)).float() for piece in pieces])


def _joined(rows: Sequence[Conditioning]) -> Conditioning:
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


@contextmanager
def checkpointed(backbone: Diffusion, on: bool) -> Iterator[None]:
    """Inside, activations are computed again in the backward pass instead of kept, if `on`.

    The base stays in eval mode, so that its dropouts stay off; of a text encoder only the layers themselves are told
    that they train, which is what transformers asks before it saves memory.
    """
    unet: Any = backbone.pipe.unet
    parts = [getattr(backbone.pipe, name, None) for name in TEXT_ENCODERS]
    encoders = [part for part in parts if part is not None]
    layers = [m for encoder in encoders for m in encoder.modules() if isinstance(m, GradientCheckpointingLayer)]
    if on:
        unet.enable_gradient_checkpointing()
        for encoder in encoders:
            _called(encoder, "checkpointing_enable", {"use_reentrant": False})
        for layer in layers:
            layer.training = True
    try:
        yield
    finally:
        if on:
            unet.disable_gradient_checkpointing()
            for encoder in encoders:
                _called(encoder, "checkpointing_disable")
            for layer in layers:
                layer.training = False


def _called(encoder: Any, name: str, *arguments: Any) -> None:
    # The newer name of two: transformers 5.23 warns of the older one.
    method = getattr(encoder, f"activation_{name}", None) or getattr(encoder, f"gradient_{name}")
    method(*arguments)
