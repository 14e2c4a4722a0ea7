"""CLIP guidance: how well the pictures that the mixture draws of several concepts match their prompts, by CLIP.

    L_g = 1 - cos(E_I(x̂), E_T(prompt))                 x̂: the picture that one denoising step predicts
    L_l = mean over the prompt's concepts j of Σ_k a_kj (1 - cos(E_I(crop k of x̂), E_T(concept j)))
          a_kj = softmax over k of cos / CROP_TEMPERATURE

Source: MoLE (Wu et al., ICLR 2024), its unsupervised objective: CLIP guidance on the picture and on patches of it.
Departs: its code starts from a real picture of one concept, noised to the first tenth of the steps. No picture shows
several concepts, so this starts from noise, runs some steps without gradient and takes the gradient of one step,
chosen at random (ReFL, Xu et al. 2023, arXiv 2304.05977). The directional term is left out: it is relative to the real
picture. The paper's patch term wants every crop to look like some concept, which one concept alone can satisfy; here
every concept must be found in some crop. The terms are added as they are: -log((2.5 - L)/2) is undefined at L = 2.5.

Contents: Theme, themes, ClipGuide, predicted_clean, random_crops, found_in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from molecli.bases.diffusion import Conditioning, Diffusion
from molecli.config import ImageConfig
from molecli.files.concepts import Concept
from molecli.images.denoising import Prompts
from molecli.images.drawing import guidance_of
from molecli.images.joint_prompts import composition, worded
from molecli.metrics.clip import Clip

CROPS = 6  # of each picture
CROP_SIDES = (0.35, 0.65)  # of the picture's side
CROP_TEMPERATURE = 0.05  # sharp enough to find a concept, soft enough to reach neighbouring crops


@dataclass(frozen=True)
class Theme:
    """A prompt for guidance, and the phrases of the concepts that it names."""

    prompt: str
    parts: tuple[str, ...]


def themes(prompts: Sequence[str], concepts: Sequence[Concept]) -> list[Theme]:
    """A theme for each given prompt; without prompts, one for every pair and every three of the concepts."""
    phrases = {concept.name: worded(concept.prompt, concept).phrase for concept in concepts}
    if not prompts:
        joined = [chosen for size in (2, 3) for chosen in combinations(concepts, size)]
        return [Theme(composition(chosen), tuple(phrases[c.name] for c in chosen)) for chosen in joined]

    def named(prompt: str) -> tuple[str, ...]:
        return tuple(phrases[c.name] for c in concepts if c.trigger.lower() in prompt.lower()) or (prompt,)

    return [Theme(prompt, named(prompt)) for prompt in prompts]


class ClipGuide:
    """Draws a training step's themes with the attached mixture; gradients of its losses reach the gates.

    Random numbers come from torch's global CPU generator.
    """

    def __init__(
        self,
        backbone: Diffusion,
        clip: Clip,
        chosen: Sequence[Theme],
        conditioning: Prompts,
        image: ImageConfig,
        *,
        steps: int,
        local: bool,
    ) -> None:
        self.backbone, self.clip, self.conditioning, self.image = backbone, clip, conditioning, image
        self.steps, self.local, self.scale = steps, local, guidance_of(image, backbone)
        self.themes = list(chosen)
        texts = list(dict.fromkeys(text for theme in chosen for text in (theme.prompt, *theme.parts)))
        self.texts = dict(zip(texts, clip.texts(texts), strict=True))

    def __call__(self, count: int) -> dict[str, Tensor]:
        """{"clip": [count], with `local` also "clip_local": [count]}: the losses of `count` pictures."""
        chosen = [self.themes[i] for i in torch.randint(len(self.themes), (count,)).tolist()]
        pixels = self.pictures([theme.prompt for theme in chosen])
        return self.losses(pixels, chosen)

    def pictures(self, prompts: Sequence[str]) -> Tensor:
        """[B, 3, H, W] in [0, 1]: the pictures that one of the steps predicts, with gradient."""
        guided = self.scale > 1
        negatives = [self.image.negative_prompt] * len(prompts) if guided else []
        conditioning = self.conditioning([*negatives, *prompts])
        config = self.backbone.pipe.unet.config
        side = self.backbone.resolution // self.backbone.pipe.vae_scale_factor
        latents = torch.randn(len(prompts), config.in_channels, side, side).to(self.backbone.device)
        teaching = int(torch.randint(self.steps, ()))
        last = self.backbone.noising.config.num_train_timesteps - 1
        times = torch.linspace(last, 0, self.steps + 1).round().long().tolist()
        with torch.no_grad():
            for now, after in pairwise(times[: teaching + 1]):
                clean = self._step(latents, now, conditioning)
                latents = _noised_like(self.backbone, latents, clean, now, after)
        return self.backbone.decode(self._step(latents, times[teaching], conditioning))

    def losses(self, pixels: Tensor, chosen: Sequence[Theme]) -> dict[str, Tensor]:
        """The losses of pictures that were drawn for these themes."""
        seen = self.clip.images(pixels)
        wanted = torch.stack([self.texts[theme.prompt] for theme in chosen])
        found = {"clip": 1 - (seen * wanted).sum(1)}
        if self.local:
            crops = self.clip.images(random_crops(pixels)).unflatten(0, (len(pixels), CROPS))
            parts = [torch.stack([self.texts[part] for part in theme.parts]) for theme in chosen]
            found["clip_local"] = torch.stack([found_in(row, part) for row, part in zip(crops, parts, strict=True)])
        return found

    def _step(self, latents: Tensor, timestep: int, conditioning: Conditioning) -> Tensor:
        """The clean latents [B, C, h, w] that the mixture predicts, with classifier-free guidance if it is on."""
        rows = len(conditioning.embeds) // len(latents)
        times = torch.full((rows * len(latents),), timestep, device=latents.device)
        output = self.backbone.predict(latents.repeat(rows, 1, 1, 1), times, conditioning).float()
        if rows == 2:
            free, conditional = output.chunk(2)
            output = free + self.scale * (conditional - free)
        return predicted_clean(self.backbone.noising, latents, output, timestep)


def predicted_clean(noising: Any, noisy: Tensor, output: Tensor, timestep: int) -> Tensor:
    """The clean latents that the UNet's output implies. Source: DDPM Eq. 15; v-prediction, Salimans & Ho 2022."""
    alpha, sigma = _alpha_sigma(noising, timestep)
    kind = noising.config.prediction_type
    if kind == "sample":
        return output
    return alpha * noisy - sigma * output if kind == "v_prediction" else (noisy - sigma * output) / alpha


def random_crops(pixels: Tensor) -> Tensor:
    """[B * CROPS, 3, s, s]: squares cut from random places of each picture, scaled to half its side."""
    side, found = pixels.shape[-1], []
    for picture in pixels:
        for size, top, left in torch.rand(CROPS, 3).tolist():
            edge = max(1, round(side * (CROP_SIDES[0] + size * (CROP_SIDES[1] - CROP_SIDES[0]))))
            y, x = round(top * (side - edge)), round(left * (side - edge))
            crop = picture[None, :, y : y + edge, x : x + edge]
            found.append(F.interpolate(crop, (side // 2, side // 2), mode="bilinear", antialias=True))
    return torch.cat(found)


def found_in(crops: Tensor, parts: Tensor) -> Tensor:
    """How far the parts [P, d] are from being found in the crops [K, d] of a picture; all are unit vectors."""
    likeness = crops @ parts.T
    weights = (likeness.detach() / CROP_TEMPERATURE).softmax(0)
    return (weights * (1 - likeness)).sum(0).mean()


def _noised_like(backbone: Diffusion, noisy: Tensor, clean: Tensor, now: int, after: int) -> Tensor:
    """The latents at `after`: DDIM's deterministic step, Song et al. 2021, Eq. 12 with σ = 0."""
    alpha, sigma = _alpha_sigma(backbone.noising, now)
    noise = (noisy - alpha * clean) / sigma
    alpha, sigma = _alpha_sigma(backbone.noising, after)
    return alpha * clean + sigma * noise


def _alpha_sigma(noising: Any, timestep: int) -> tuple[float, float]:
    kept = float(noising.alphas_cumprod[timestep])
    return kept**0.5, (1 - kept) ** 0.5
