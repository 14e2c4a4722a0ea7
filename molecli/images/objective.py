"""The loss that the gates of a diffusion model learn from: the weighted sum of the terms of a recipe's objective.

Objective         rows of the concepts' pictures -> their loss, and the gates of every pass that it came from
check_objective   finds mistakes in the settings
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from molecli.bases.diffusion import Diffusion
from molecli.config import ObjectiveConfig
from molecli.errors import UsageError
from molecli.files.concepts import Concept
from molecli.images.clip_guidance import ClipGuide
from molecli.images.collage import Collages
from molecli.images.denoising import GRADIENT_SCALE, Prompts, all_latents, draw_noise, prediction_errors
from molecli.images.joint_prompts import is_subject
from molecli.images.pictures import Album, Lesson
from molecli.mixture.mixture import Mixture
from molecli.training.fit_gates import TaskLoss


class Objective:
    """The task of the gates: denoising the concepts' pictures and collages of them, and CLIP guidance.

    If the loss comes from several passes, the balance term is about the gates of all of them.
    """

    def __init__(
        self,
        backbone: Diffusion,
        mixture: Mixture,
        album: Album,
        concepts: Mapping[str, Concept],
        config: ObjectiveConfig,
        conditioning: Prompts,
        guide: ClipGuide | None = None,
    ) -> None:
        self.backbone, self.mixture, self.album, self.config = backbone, mixture, album, config
        self.conditioning, self.guide = conditioning, guide
        self.collages = Collages(album, concepts) if config.collage else None
        self.latents = all_latents(backbone, album) if config.denoise else None

    def __call__(self, rows: Sequence[Lesson]) -> TaskLoss:
        """The loss of the rows; every term uses one picture per row."""
        terms: dict[str, Tensor] = {}
        gates: list[Tensor] = []
        if self.config.denoise:
            terms["denoise"] = self.errors(rows)
            gates.append(self.mixture.stacked_gates())
        if self.guide is not None:
            terms |= self.guide(len(rows))
            gates.append(self.mixture.stacked_gates())
        weighted = [getattr(self.config, name) * losses for name, losses in terms.items()]
        total, live = torch.stack(weighted).sum(), torch.cat(gates, dim=1)
        if self.backbone.pipe.unet.dtype is torch.float16:
            # `scaled_gradients` divides by it again, for the gradient of the balance term too.
            for tensor in (total, live):
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: gradient * GRADIENT_SCALE)
        return TaskLoss(total, len(rows), live, {name: losses.mean() for name, losses in terms.items()})

    def errors(self, rows: Sequence[Lesson]) -> Tensor:
        """[B], the denoising errors of the rows' pictures, or of the collages that replace them."""
        clean, prompts = self.shown(rows)
        return prediction_errors(self.backbone, self.conditioning(prompts), clean, *draw_noise(self.backbone, clean))

    @torch.no_grad()
    def shown(self, rows: Sequence[Lesson]) -> tuple[Tensor, list[str]]:
        """(clean latents [B, C, h, w], prompts) of the rows' pictures; a share of them is replaced by collages."""
        assert self.latents is not None
        clean, prompts = self.latents[[row.picture for row in rows]], [row.prompt for row in rows]
        if self.collages is None:
            return clean, prompts
        drawn = {}
        for i, row in enumerate(rows):
            if self.collages.can_hold(row.picture) and bool(torch.rand(()) < self.config.collage):
                drawn[i] = self.collages.draw(row.picture)
        if drawn:
            pixels = torch.stack([self.collages.pixels(collage) for collage in drawn.values()])
            clean[list(drawn)] = self.backbone.latents(pixels.to(self.backbone.device)).float()
            for i, collage in drawn.items():
                prompts[i] = collage.prompt
        return clean, prompts


def check_objective(config: ObjectiveConfig, concepts: Sequence[Concept]) -> None:
    """Raises: UsageError for settings with which gates learn nothing, or that would be ignored."""
    guided = bool(config.clip or config.clip_local)
    if not (config.denoise or guided):
        what = "every term has weight 0, so the gates would learn nothing"
        raise UsageError("objective", what, "Write --denoise 1, or --clip 1.")
    if config.prompts and not guided:
        what = "prompts are for CLIP guidance, and both CLIP terms have weight 0"
        raise UsageError("objective.prompts", what, "Write --clip 1, or leave them out.")
    if guided and not config.prompts and len(concepts) < 2:
        what = "the prompts for CLIP guidance name two concepts or more, and there is only one"
        raise UsageError("objective.clip", what, "Write objective.prompts, or --clip 0.")
    if not config.collage:
        return
    if not config.denoise:
        what = "collages are pictures to denoise, and that term has weight 0"
        raise UsageError("objective.collage", what, "Write --denoise 1, or --collage 0.")
    things = sum(is_subject(concept) for concept in concepts)
    if things < 2:
        what = f"a collage shows two things or more, and the LoRAs add {things} (styles and backgrounds do not count)"
        raise UsageError("objective.collage", what, "Give another LoRA, or write --collage 0.")
