"""The loss of one training step on pictures: noise is added to them, and the UNet predicts it.

PictureLoss         the loss function for training a LoRA      prediction_errors   each picture's squared error
Prompts             prompts -> the UNet's conditioning         draw_noise          noise and timesteps
all_latents         the latents of a whole album               checkpointed        gradient checkpointing
scaled_gradients    float16: gradients are scaled up between the loss and the parameters
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

# Gradients of a mean over a picture's latents are close to the smallest number that float16 can hold.
GRADIENT_SCALE = 1024.0
# Pictures per batch when latents are computed in advance.
AT_ONCE = 8


class PictureLoss:
    """DreamBooth's loss: the denoising error of a step's pictures plus `prior_weight` times that of class pictures.

    Latents are computed in advance if a picture is the same at every step, and prompts if the text encoder is frozen.
    Source: Ruiz et al., arXiv 2208.12242, Eq. 2, where the prior's weight is λ; Ho & Salimans, arXiv 2207.12598,
    Algorithm 1, where `prompt_dropout` is p_uncond.
    """

    def __init__(
        self, backbone: Diffusion, album: Album, *, prior_weight: float, text_encoder: bool, prompt_dropout: float = 0.0
    ) -> None:
        self.backbone, self.album, self.prior_weight = backbone, album, prior_weight
        self.prompt_dropout = prompt_dropout
        self.prompts = [picture.prompt for picture in album.pictures]
        self.conditioning = Prompts(backbone, album.resolution, keep=not text_encoder)
        self.conditioning.look_at([*self.prompts, *([""] if prompt_dropout else [])])
        self.latents = all_latents(backbone, album) if album.fixed else None

    def __call__(self, lessons: Sequence[Lesson], context: StepContext) -> StepLoss:
        """The step's loss over its lessons. All random numbers come from torch's global CPU generator."""
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
        return prediction_errors(self.backbone, self.conditioning(prompts), clean, noise, timesteps)

    @torch.no_grad()
    def probe(self, places: Sequence[int], seed: int, *, timesteps: int = 4) -> float:
        """The mean error of these pictures at evenly spread timesteps, with the same noise in every call."""
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
        """Mixed precision if the base is in half precision: its matrices stay so, and the LoRA's stay in float32."""
        if self._half is None:
            return nullcontext()
        return torch.autocast(self.backbone.device.type, dtype=self._half)

    @property
    def _half(self) -> torch.dtype | None:
        dtype = self.backbone.pipe.unet.conv_in.weight.dtype
        return dtype if dtype in (torch.bfloat16, torch.float16) else None

    def _kept_prompts(self, places: Sequence[int]) -> list[str]:
        """The pictures' prompts, some replaced by the empty prompt. Without dropout no random number is used."""
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
    """The UNet's conditioning for prompts and pictures of `side` pixels.

    keep: the text encoder does not change, so each prompt is encoded once, without gradient.
    """

    def __init__(self, backbone: Diffusion, side: int, *, keep: bool) -> None:
        self.backbone, self.size, self.keep = backbone, (side, side), keep
        self._kept: dict[str, Conditioning] = {}

    @torch.no_grad()
    def look_at(self, prompts: Sequence[str]) -> None:
        """Encodes the new ones among `prompts`; warns if the end of a long prompt is cut."""
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._kept:
                self._kept[prompt] = self.backbone.encode([prompt], size=self.size)

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        """The conditioning, one row per prompt."""
        if self.keep:
            self.look_at(prompts)
            return _joined([self._kept[prompt] for prompt in prompts])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PromptCut)  # reported once, when the run began
            return self.backbone.encode(prompts, size=self.size)


def prediction_errors(
    backbone: Diffusion, conditioning: Conditioning, clean: Tensor, noise: Tensor, timesteps: Tensor
) -> Tensor:
    """[B], each picture's mean squared error. Source: DDPM, Ho et al. 2020, Eq. 14."""
    noisy = backbone.noising.add_noise(clean, noise, timesteps)
    predicted = backbone.predict(noisy, timesteps, conditioning)
    # In float32 whatever the base's type, because it is a mean of many small squares.
    target = backbone.target(clean, noise, timesteps)
    return (predicted.float() - target.float()).square().flatten(1).mean(1)


def draw_noise(backbone: Diffusion, clean: Tensor) -> tuple[Tensor, Tensor]:
    """(noise like `clean`, timesteps [B]) on its device, from torch's global CPU generator."""
    noise = torch.randn(clean.shape)
    timesteps = torch.randint(backbone.noising.config.num_train_timesteps, (len(clean),))
    return noise.to(clean.device), timesteps.to(clean.device)


@torch.no_grad()
def all_latents(backbone: Diffusion, album: Album) -> Tensor:
    """[pictures, C, h, w] in float32, of an album whose pictures are the same at every step."""
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
    """A context in which the factor that `PictureLoss` applies to gradients on a float16 base is divided out again."""
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
    """A context in which, if `on`, activations are recomputed in the backward pass instead of kept.

    The base stays in eval mode, so its dropouts stay off. Only the layers of a text encoder are set to training mode,
    because transformers requires it for gradient checkpointing.
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
    # The newer of two names: transformers 5.23 warns about the older one.
    method = getattr(encoder, f"activation_{name}", None) or getattr(encoder, f"gradient_{name}")
    method(*arguments)
