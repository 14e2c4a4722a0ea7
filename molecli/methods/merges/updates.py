"""The input of a merge: the experts' updates at one matrix. A merge returns (A, B, relative error of truncation)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from molecli.config import MethodConfig
from molecli.functional.spectral import Spectrum

# A [r, d_in], B [d_out, r], and ‖exact update − B A‖ / ‖exact update‖.
Result = tuple[Tensor, Tensor, float]


def _baseless() -> Spectrum:
    raise ValueError("the updates came without their base")


@dataclass(frozen=True)
class Updates:
    """N updates at one matrix as (A [r_i, d_in], B [d_out, r_i]), with scalings in B, and the user's weights.

    A convolution's A is flattened. seeds: one per expert at this matrix, so that random choices depend only on the
    expert. spectrum: the singular value decomposition of the base's matrix, which takes long the first time.
    """

    matrix: str
    factors: tuple[tuple[Tensor, Tensor], ...]
    weights: tuple[float, ...]
    seeds: tuple[int, ...]
    spectrum: Callable[[], Spectrum] = _baseless

    @property
    def vector(self) -> Tensor:
        """[N], the weights on the factors' device."""
        return _vector(self.weights, self.factors[0][0].device)

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(A.shape[0] for A, _ in self.factors)

    @property
    def width(self) -> int:
        """min(d_out, d_in), the largest rank that a merge entry by entry can have."""
        A, B = self.factors[0]
        return min(A.shape[1], B.shape[0])

    def dense(self) -> Tensor:
        """[N, d_out, d_in], without weights."""
        return torch.stack([B @ A for A, B in self.factors])

    def weighted(self) -> Tensor:
        """[N, d_out, d_in], each times its weight."""
        return self.scaled(self.dense())

    def scaled(self, updates: Tensor) -> Tensor:
        """`updates` [N, ...], each times its weight."""
        return updates * self.vector.to(updates).view(-1, *(1,) * (updates.dim() - 1))


@lru_cache(maxsize=1)
def _vector(weights: tuple[float, ...], device: torch.device) -> Tensor:
    """The weights as a tensor, transferred once for all matrices."""
    return torch.tensor(weights, device=device)


Merge = Callable[[Updates, MethodConfig], Result]
