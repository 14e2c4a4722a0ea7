"""Experts merged into one LoRA, which is attached to the base like any other. Contents: MergedMixture, merge_experts.

It can be used like every mixture: its experts have names, and masking some of them merges the others again.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from molecli.bases.weights import BaseWeights
from molecli.config import MethodConfig
from molecli.errors import MismatchError, UsageError
from molecli.experts import Expert, ExpertBank, LowRank, Merged
from molecli.methods.merges.updates import Merge, Updates
from molecli.mixture.mixture import Mixture
from molecli.mixture.streams import Streams
from molecli.protocols import Progress, Reading, Site

# Weights and the indices of the kept experts -> the merged LoRA.
Merging = Callable[[Sequence[float], Sequence[int]], Merged]
_PREFIX = "merged/"


class _Whole(nn.Module):
    """The gate of the merged LoRA, which is 1."""

    per_sequence = True
    remembers = False
    constant = True
    one: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("one", torch.ones(1))

    def forward(self, reading: Reading | None, keep: Tensor | None = None) -> Tensor:
        return self.one


class MergedMixture(Mixture):
    """The experts of `bank`, merged by `merge` into one LoRA when it is first needed.

    If experts are absent, it is the LoRA from `load_state_dict`, and merging again is a UsageError.
    weights [N]: the coefficients of the merge; `reweigh` sets those that a search finds.
    """

    def __init__(
        self,
        model: nn.Module,
        bank: ExpertBank,
        sites: Sequence[Site],
        merge: Merging,
        weights: Sequence[float],
        *,
        streams: Streams,
    ) -> None:
        super().__init__(model, bank, sites, {site.name: _Whole() for site in sites}, streams=streams)
        self._merge = merge
        self.weights = tuple(weights)
        self._kept = tuple(range(len(bank)))
        self._known: dict[tuple[int, ...], Merged] = {}

    def merged(self) -> Merged:
        """The merged LoRA of the kept experts."""
        if self._kept not in self._known:
            self._check_there()
            self._known[self._kept] = self._merge(self.weights, self._kept)
        return self._known[self._kept]

    def reweigh(self, weights: Sequence[float]) -> None:
        """Merges with these coefficients from now on."""
        self.weights, self._known = tuple(float(w) for w in weights), {}
        self._rehost()

    def attach(self) -> None:
        self._hosted_bank = ExpertBank([Expert("merged", self.merged().factors)])
        super().attach()

    def mask(self, *names: str) -> None:
        """Switches off exactly the named experts: the others are merged as if these had not been there."""
        off = {self.bank.index(name) for name in names}
        if off:
            self._check_there()
        self._kept = tuple(i for i in range(len(self.bank)) if i not in off)
        self._off = not self._kept
        if not self._off:
            self._rehost()

    def gates(self) -> dict[str, Tensor]:
        """Empty: a merged LoRA has no weights per expert."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """`merged/<matrix>/A` and `/B` of the merge of all experts, and `weights`."""
        held, self._kept = self._kept, tuple(range(len(self.bank)))
        factors, self._kept = self.merged().factors, held
        tensors = {f"{_PREFIX}{m}/{part}": t for m, f in factors.items() for part, t in (("A", f.A), ("B", f.B))}
        return {**tensors, "weights": torch.tensor(self.weights)}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Loads the merged LoRA from `tensors`. Raises: MismatchError if it does not have these experts' matrices."""
        wanted = {f"{_PREFIX}{matrix}/{part}" for matrix in self.bank.matrices for part in "AB"} | {"weights"}
        for key in sorted(wanted ^ set(tensors)):
            what = "is missing" if key in wanted else "belongs to no matrix of these LoRAs"
            raise MismatchError(key, f"the merged tensor {what}", "Compose again.")
        for matrix in self.bank.matrices:
            self._check_shapes(matrix, tensors)
        self.weights = tuple(tensors["weights"].tolist())
        factors = {m: LowRank(tensors[f"{_PREFIX}{m}/A"], tensors[f"{_PREFIX}{m}/B"], 1.0) for m in self.bank.matrices}
        self._known = {tuple(range(len(self.bank))): Merged(factors, {})}
        self._rehost()

    def _check_there(self) -> None:
        gone = [f"no {expert.name} at {expert.source}" for expert in self.bank.experts if expert.absent]
        if gone:
            what = f"--mask and --only merge the remaining LoRAs again, but there is {', '.join(gone)}"
            raise UsageError("LoRAs", what, "Put it back, or name all of them with --loras.")

    def _check_shapes(self, matrix: str, tensors: Mapping[str, Tensor]) -> None:
        like = self.bank.experts[self.bank.present(matrix)[0]].factors[matrix]
        A, B = tensors[f"{_PREFIX}{matrix}/A"], tensors[f"{_PREFIX}{matrix}/B"]
        if A.shape[1:] != like.A.shape[1:] or B.shape != (len(like.B), len(A)):
            shapes = f"{tuple(A.shape)} and {tuple(B.shape)}"
            raise MismatchError(f"{_PREFIX}{matrix}", f"its factors have shapes {shapes}, which do not fit")

    def _rehost(self) -> None:
        """Replaces the attached LoRA by the current merge."""
        if self._handles:
            self.detach()
            self.attach()


@torch.no_grad()
def merge_experts(
    bank: ExpertBank,
    merge: Merge,
    weights: Sequence[float],
    config: MethodConfig,
    *,
    base: BaseWeights | None = None,
    kept: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Merged:
    """The experts `kept` (all by default) merged in float32 on `device`. A matrix that none of them adapts gets zeros.

    `base` is for methods that read the base's own matrices.
    Raises: MismatchError if factors cannot be merged.
    """
    chosen = range(len(bank)) if kept is None else kept
    factors, errors = {}, {}
    for done, matrix in enumerate(bank.matrices, start=1):
        present = [i for i in bank.present(matrix) if i in chosen]
        shape = bank.experts[bank.present(matrix)[0]].factors[matrix].A.shape[1:]
        if present:
            updates = _updates(bank, matrix, present, weights, config.seed, device)
            if base is not None:
                updates = replace(updates, spectrum=partial(base.spectrum, matrix))
            A, B, errors[matrix] = merge(updates, config)
            factors[matrix] = LowRank(A.view(-1, *shape), config.scale * B, 1.0)
        else:
            factors[matrix] = _nothing(bank, matrix, device)
        if progress is not None:
            progress("merging", done, len(bank.matrices))
    return Merged(factors, errors)


def _updates(
    bank: ExpertBank,
    matrix: str,
    present: Sequence[int],
    weights: Sequence[float],
    seed: int,
    device: torch.device | str,
) -> Updates:
    def pair(factor: LowRank) -> tuple[Tensor, Tensor]:
        A, B = factor.A.to(device, torch.float32), factor.B.to(device, torch.float32)
        return A.flatten(1), factor.scaling * B

    experts = [bank.experts[i] for i in present]
    return Updates(
        matrix,
        tuple(pair(expert.factors[matrix]) for expert in experts),
        tuple(float(weights[i]) for i in present),
        # From the names, so that the order of the experts does not matter.
        tuple(zlib.crc32(f"{seed}/{expert.name}/{matrix}".encode()) for expert in experts),
    )


def _nothing(bank: ExpertBank, matrix: str, device: torch.device | str) -> LowRank:
    """A LoRA of rank 1 with zeros, for a matrix whose experts are all masked."""
    like = bank.experts[bank.present(matrix)[0]].factors[matrix]
    return LowRank(torch.zeros(1, *like.A.shape[1:], device=device), torch.zeros(len(like.B), 1, device=device), 1.0)
