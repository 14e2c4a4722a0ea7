"""A and B added separately, as LoRAHub and PEM define their sums: the product has cross terms B_i A_j.

PEFT calls this `linear`, and peft#3004 is about its effect. Here only these two papers' methods use it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from molecli.errors import MismatchError
from molecli.functional import factors
from molecli.methods.merges.updates import Result, Updates


def added(updates: Updates, on_A: Tensor, on_B: Tensor, rank: int | None) -> Result:
    """(Σ a_i A_i, Σ b_i B_i), or the best approximation of their product with rank `rank`.

    Raises: MismatchError if the LoRAs' ranks differ, because then factors cannot be added.
    """
    if len(set(updates.ranks)) > 1:
        ranks = ", ".join(str(rank) for rank in updates.ranks)
        what = f"the LoRAs have ranks {ranks} there, and the method adds factors of equal rank"
        raise MismatchError(updates.matrix, what, "Write --set method.on=updates, which works with any ranks.")
    A = torch.stack([A for A, _ in updates.factors])
    B = torch.stack([B for _, B in updates.factors])
    A, B = torch.einsum("n,nrd->rd", on_A.to(A), A), torch.einsum("n,ndr->dr", on_B.to(B), B)
    return factors.truncated(A, B, rank) if rank is not None else (A, B, 0.0)
