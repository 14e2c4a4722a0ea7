"""Experts: trained LoRAs as low-rank factors, and the bank that stacks them along rank.

Axis legend, used in every shape annotation of the package:
  B batch, T tokens, N experts, r rank of one expert, R = sum of the ranks at one matrix,
  d_in / d_out width of an adapted matrix, d any feature width;
  in images C channels, H and W the sides of a map, P = H*W its positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from molecli.errors import UsageError


@dataclass(frozen=True)
class LowRank:
    """One LoRA at one matrix: `delta = scaling * B @ A`; A is [r, d_in], B is [d_out, r].

    At a convolution A is [r, c_in, k_h, k_w] and B, a 1x1 convolution, is [c_out, r].
    """

    A: Tensor
    B: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def delta(self) -> Tensor:
        """The dense update, [d_out, d_in] or [c_out, c_in, k_h, k_w]. Only for references and merging: a mixture never
        builds it."""
        return self.scaling * (self.B @ self.A.flatten(1)).view(-1, *self.A.shape[1:])


@dataclass(frozen=True)
class Expert:
    """A named, frozen LoRA: its factors by matrix name, and its source.

    absent: its files are missing; its factors have rank 0 and only give its matrices and their shapes. left_out:
    matrices that it adapts but the base lacks. notices: what its reader has to tell the user about it.
    """

    name: str
    factors: Mapping[str, LowRank]
    source: str = ""
    sha256: str = ""
    rank: int = 0
    alpha: float = 0.0
    absent: bool = False
    left_out: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()

    @property
    def matrices(self) -> tuple[str, ...]:
        return tuple(self.factors)


@dataclass(frozen=True)
class Merged:
    """Several experts as one LoRA: its factors and its truncation error ‖exact − merged‖/‖exact‖, by matrix."""

    factors: Mapping[str, LowRank]
    errors: Mapping[str, float]


@dataclass(frozen=True)
class Stacked:
    """All experts at one matrix, concatenated along the rank; B includes the scalings.

    A: [R, d_in] or [R, c_in, k_h, k_w]; B: [d_out, R]; owner: [R], the index of the expert that each rank belongs to.
    """

    A: Tensor
    B: Tensor
    owner: Tensor


class ExpertBank:
    """N experts in a fixed order, stacked per matrix; different ranks need no padding."""

    def __init__(self, experts: Sequence[Expert]) -> None:
        names = [expert.name for expert in experts]
        for name in names:
            if names.count(name) > 1:
                raise UsageError(
                    "--loras", f"the name {name!r} is used twice", "Give each LoRA its own name: name=PATH."
                )
        self.experts = tuple(experts)
        self.names = tuple(names)
        self.matrices = tuple(dict.fromkeys(m for expert in experts for m in expert.factors))

    def __len__(self) -> int:
        return len(self.experts)

    def index(self, name: str) -> int:
        """The position of the expert called `name`. Raises: UsageError for an unknown name."""
        if name not in self.names:
            raise UsageError(name, "no such LoRA in this composition", f"Known: {', '.join(self.names)}.")
        return self.names.index(name)

    def present(self, matrix: str) -> tuple[int, ...]:
        """Indices of the experts that adapt `matrix`."""
        return tuple(i for i, expert in enumerate(self.experts) if matrix in expert.factors)

    def width(self, matrix: str) -> int:
        """d_in (c_in) of `matrix`, from the factors."""
        return self.experts[self.present(matrix)[0]].factors[matrix].A.shape[1]

    def owner(self, matrix: str) -> Tensor:
        """[R], the index of the expert that each rank at `matrix` belongs to."""
        ranks = [(i, self.experts[i].factors[matrix].rank) for i in self.present(matrix)]
        return torch.cat([torch.full((rank,), i, dtype=torch.long) for i, rank in ranks])

    def stacked(
        self, matrix: str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Stacked:
        """The experts at `matrix` as one pair of factors, without experts that do not adapt it."""
        members = [(i, self.experts[i].factors[matrix]) for i in self.present(matrix)]
        A = torch.cat([f.A.to(device=device, dtype=dtype) for _, f in members])
        # Scale in float32 before the cast: scaling B in bfloat16 would round twice.
        B = torch.cat([(f.scaling * f.B.float()).to(device=device, dtype=dtype) for _, f in members], dim=1)
        return Stacked(A, B, self.owner(matrix).to(device))

    def to(self, device: torch.device | str) -> ExpertBank:
        """The same experts on `device` in float32, with one transfer each: on a shared GPU every transfer waits."""
        return ExpertBank([_moved(expert, device) for expert in self.experts])

    def permuted(self, order: Sequence[int]) -> ExpertBank:
        """The same experts in another order."""
        return ExpertBank([self.experts[i] for i in order])

    def renamed(self, index: int, name: str) -> ExpertBank:
        """The same bank with expert `index` called `name`."""
        experts = list(self.experts)
        experts[index] = replace(experts[index], name=name)
        return ExpertBank(experts)


def _moved(expert: Expert, device: torch.device | str) -> Expert:
    parts = [part for factor in expert.factors.values() for part in (factor.A, factor.B)]
    if all(part.dtype == torch.float32 and part.device == torch.device(device) for part in parts):
        return expert
    flat = torch.cat([part.detach().float().flatten() for part in parts]).to(device)
    moved = iter(flat.split([part.numel() for part in parts]))
    factors = {
        matrix: LowRank(next(moved).view_as(factor.A), next(moved).view_as(factor.B), factor.scaling)
        for matrix, factor in expert.factors.items()
    }
    return replace(expert, factors=factors)
