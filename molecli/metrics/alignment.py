"""The CLIP similarity of a picture to its prompt and to the concepts that it should show.

Source: MoLE (Wu et al., ICLR 2024), Table 1; Ruiz et al., arXiv 2208.12242, section 4.2 (CLIP-T and CLIP-I).
"""

from __future__ import annotations

import torch

from molecli.metrics.image_batch import Shots


def text(shots: Shots) -> list[float]:
    """The cosine of each picture with its prompt."""
    said = torch.stack([shots.instruments.text(scene.prompt) for scene in shots.scenes])
    return (shots.vectors * said).sum(-1).tolist()


def image(shots: Shots) -> list[float]:
    """For each picture the mean, over the scene's concepts, of its mean cosine with the concept's pictures."""
    looks = [torch.stack([shots.instruments.look(name) for name in scene.loras]).mean(0) for scene in shots.scenes]
    return (shots.vectors * torch.stack(looks)).sum(-1).tolist()
