"""Operations of merges on the entries of dense updates: trim, drop, elect a sign, average.

Updates are [N, d_out, d_in]. Contents: trim, drop, elected_mean.
"""

from __future__ import annotations

import torch
from torch import Tensor


def trim(updates: Tensor, density: float) -> Tensor:
    """Each update with only its ⌊density · entries⌋ largest entries in magnitude. Source: TIES (2306.01708), step 1.

    Departs: the paper ranks the entries of the whole model together; here every matrix keeps the same fraction.
    """
    flat = updates.flatten(1)
    count = int(density * flat.shape[1])
    if count >= flat.shape[1]:
        return updates
    kept = flat.abs().topk(count, dim=1, sorted=False).indices
    return torch.zeros_like(flat).scatter_(1, kept, flat.gather(1, kept)).view_as(updates)


def drop(update: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """m ⊙ update / density, m ~ Bernoulli(density): its expectation is the update. Source: DARE (2311.03099), Eq. 3-4.

    The mask is drawn on the CPU, so that it is the same on every device.
    """
    mask = torch.rand(update.shape, generator=generator) < density
    return update * mask.to(update) / density


def elected_mean(updates: Tensor) -> Tensor:
    """[d_out, d_in]: for every entry the mean over the updates with the sign of their sum. Source: TIES, steps 2 and 3.

    Departs: weights are included in the updates, so that a negative one reverses the vote; PEFT elects first.
    """
    sign = updates.sum(0).sign()
    agrees = updates.sign() == sign
    count = (agrees & (updates != 0)).sum(0).clamp_min(1)
    return (updates * agrees).sum(0) / count
