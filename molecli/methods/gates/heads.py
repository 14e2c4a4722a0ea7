"""Heads: from a gate's features to one logit per expert (MoLE, Eq. 10).

All start at zero, so that a new gate is uniform and training starts at Eq. 2. With `gate.init_std`, `gated.build_gates`
makes their weights random.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from molecli.config import GateConfig
from molecli.experts import Stacked


class FeatureHead(nn.Module):
    """logits = f Wᵀ + b over features [..., width]; with `rank`, W = up @ down."""

    def __init__(self, width: int, experts: int, *, rank: int | None = None) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(experts))
        self.down = None
        if rank is not None:
            self.down = nn.Parameter(torch.randn(rank, width) / rank**0.5)
        self.weight = nn.Parameter(torch.zeros(experts, rank or width))

    def forward(self, features: Tensor) -> Tensor:
        if self.down is not None:
            features = F.linear(features, self.down)
        return F.linear(features, self.weight, self.bias)

    def matrix(self) -> Tensor:
        """W, [N, width]."""
        return self.weight if self.down is None else self.weight @ self.down


class PerExpertHead(nn.Module):
    """Each expert's logit depends only on its own projection: R weights in total, so the cost does not grow with N²."""

    owner: Tensor

    def __init__(self, owner: Tensor, experts: int) -> None:
        super().__init__()
        self.experts = experts
        self.bias = nn.Parameter(torch.zeros(experts))
        self.weight = nn.Parameter(torch.zeros(len(owner)))
        self.register_buffer("owner", owner, persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        own = features * self.weight
        return own.new_zeros(*own.shape[:-1], self.experts).index_add(-1, self.owner, own) + self.bias


class OutputHead(nn.Module):
    """The paper's head: e applied to the concatenation of the experts' outputs, normalised as one vector.

    The outputs [.., N, d] are never computed. A logit is linear in them, so e is multiplied with B first. The squared
    norm of E_i = B_i u_i is u_iᵀ(B_iᵀB_i)u_i. Only here are factors padded to the largest rank, [N, d, r].
    """

    slot: Tensor
    outputs: Tensor
    gram: Tensor

    def __init__(self, stacked: Sequence[Stacked], experts: int, config: GateConfig) -> None:
        super().__init__()
        owner = torch.cat([s.owner for s in stacked])
        self.normalize = config.normalize != "none"
        self.per_expert = config.head == "per_expert"
        self.experts = experts
        self.widths = [s.B.shape[0] for s in stacked]
        rows = [[int((s.owner == i).sum()) for s in stacked] for i in range(experts)]
        self.padded_rank = max(sum(row) for row in rows)
        # slot[i, k]: the rank of the reading that is expert i's k-th. An appended last rank is always zero.
        slot = torch.full((experts, self.padded_rank), len(owner))
        outputs = torch.zeros(experts, sum(self.widths), self.padded_rank)
        self._fill(stacked, slot, outputs)
        self.register_buffer("slot", slot, persistent=False)
        self.register_buffer("outputs", outputs, persistent=False)
        self.register_buffer("gram", outputs.transpose(1, 2) @ outputs, persistent=False)
        width = sum(self.widths)
        readers = 1 if self.per_expert else experts
        self.down = None
        if config.head == "low_rank":
            self.down = nn.Parameter(torch.randn(experts, config.head_rank, width) / config.head_rank**0.5)
            self.weight = nn.Parameter(torch.zeros(experts, config.head_rank))
        else:
            self.weight = nn.Parameter(torch.zeros(experts, readers, width))

    def _fill(self, stacked: Sequence[Stacked], slot: Tensor, outputs: Tensor) -> None:
        filled = [0] * self.experts
        rank_start, row_start = 0, 0
        for s in stacked:
            for column, i in enumerate(s.owner.tolist()):
                slot[i, filled[i]] = rank_start + column
                outputs[i, row_start : row_start + s.B.shape[0], filled[i]] = s.B[:, column]
                filled[i] += 1
            rank_start, row_start = rank_start + s.B.shape[1], row_start + s.B.shape[0]

    def forward(self, u: Tensor) -> Tensor:
        """u [..., R] -> logits [..., N]."""
        owned = F.pad(u, (0, 1))[..., self.slot]  # [..., N, r]
        e = self.down if self.down is not None else self.weight
        through = e @ self.outputs  # [N, readers, r]: e applied to each expert's ranks
        if self.normalize:
            squared = torch.einsum("...nr,nrs,...ns->...n", owned, self.gram, owned).sum(-1)
            owned = owned / squared.clamp_min(1e-12).sqrt()[..., None, None]
        if self.per_expert:
            return torch.einsum("...nr,nr->...n", owned, through[:, 0])
        logits = torch.einsum("...nr,nkr->...k", owned, through)
        return logits if self.down is None else F.linear(logits, self.weight)
