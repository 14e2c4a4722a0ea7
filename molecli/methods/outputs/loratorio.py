"""LoRAtorio: an expert counts where it differs from the base. Source: arXiv 2508.11624, its public page and figures.

For each patch p of the predicted noise: Ω_ip = cos(c_i, c_0) of conditional outputs, 0 the base; Ω̂ = softmin over the
experts; c̃ = Σ Ω̂_i c_i and ũ = λ u_0 + (1−λ) Σ Ω̂_i u_i, which the pipeline guides as ũ + g(c̃ − ũ). N + 1 passes.

The publication does not specify these, and we chose: patches of 4 x 4 latents (32 x 32 pixels), over all channels
together; temperature 1 in the softmin; the same weights for all positions of a patch. Choosing LoRAs from a large pool
(top-k) is left out, because k is not public. With one expert, the result equals that LoRA only if λ = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from molecli.config import MethodConfig
from molecli.errors import RunError
from molecli.methods.outputs.branch_weights import kept, mean_weights, one_each
from molecli.protocols import Moment, OutputMethod


def method(
    names: Sequence[str],
    weights: Tensor,
    config: MethodConfig,
    *,
    triggers: Mapping[str, str],
    kinds: Mapping[str, str],
) -> OutputMethod:
    """LoRAtorio with the recipe's λ."""
    return Loratorio(weights, base_share=config.base_share)


class Loratorio:
    """An `OutputMethod` with a branch for the base and one for each kept expert: `weights` [N]; λ is `base_share`."""

    reads_prompt = False

    def __init__(self, weights: Tensor, *, base_share: float = 0.5, patch: int = 4, temperature: float = 1.0) -> None:
        self.weights, self.base_share, self.patch, self.temperature = weights, base_share, patch, temperature

    def prepare(self, prompt: str, encode: Callable[[Sequence[str]], Tensor]) -> None:
        """Does nothing: the weights are computed from the outputs."""

    def text_weights(self, keep: Tensor | None) -> Tensor:
        """[N], see `mean_weights`."""
        return mean_weights(self.weights, keep)

    def branches(self, moment: Moment, keep: Tensor | None) -> Tensor:
        """[1 + K, N]: a branch for the base, then one for each kept expert, with its own weight."""
        experts = one_each(self.weights, kept(range(len(self.weights)), keep))
        return torch.cat([torch.zeros_like(experts[:1]), experts])

    def combine(self, outputs: Tensor, moment: Moment, keep: Tensor | None) -> Tensor:
        """[ũ; c̃] with guidance, otherwise c̃. Raises: RunError if it is not known which outputs are conditional."""
        if moment.guided is None:
            what = "it compares the conditional outputs, and it is not known which those are in this kind of pipeline"
            raise RunError("mode loratorio", what, "Use another mode, such as composite.")
        conditional = outputs.chunk(2, dim=1)[1] if moment.guided else outputs
        shares = self.shares(conditional[0], conditional[1:]).to(outputs.dtype)
        mixed = (shares * conditional[1:]).sum(0)
        if not moment.guided:
            return mixed
        free = outputs.chunk(2, dim=1)[0]
        free = self.base_share * free[0] + (1 - self.base_share) * (shares * free[1:]).sum(0)
        return torch.cat([free, mixed])

    def shares(self, base: Tensor, outputs: Tensor) -> Tensor:
        """Ω̂ at every position, float32 [K, B, 1, H, W], of outputs [K, B, C, H, W] against the base's [B, C, H, W]."""
        alike = patch_cosine(outputs.float(), base.float().expand_as(outputs), self.patch)
        shares = torch.softmax(-alike / self.temperature, dim=0)
        whole = shares.repeat_interleave(self.patch, dim=-2).repeat_interleave(self.patch, dim=-1)
        return whole[..., : outputs.shape[-2], : outputs.shape[-1]].unsqueeze(2)


def patch_cosine(a: Tensor, b: Tensor, patch: int) -> Tensor:
    """cos of a and b [K, B, C, H, W] over each patch's channels and positions: [K, B, ⌈H/patch⌉, ⌈W/patch⌉].

    The last patches of a row or column are smaller if `patch` does not divide its length.
    """

    def sums(products: Tensor) -> Tensor:
        # Without padding: a smaller patch sums only its own positions.
        return F.avg_pool2d(products.sum(2), patch, ceil_mode=True, divisor_override=1)

    norms = sums(a * a).sqrt() * sums(b * b).sqrt()
    return sums(a * b) / norms.clamp_min(1e-12)
