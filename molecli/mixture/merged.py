"""Experts merged into one LoRA, hosted beside the base like any other: what fixed merges of ΔW leave to do at run time.

A mixture to those who use it: its experts have names, and masking some merges the others anew.
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

# Weights and the places of the experts that are kept -> the merged LoRA.
Merging = Callable[[Sequence[float], Sequence[int]], Merged]
_PREFIX = "merged/"


class _Whole(nn.Module):
    """The gate of the one LoRA: 1."""

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
    """The experts of `bank` as the one LoRA that `merge` makes of them, when they are first needed.

    With absent experts it is what `load_state_dict` gave, and merging anew is a UsageError.
    weights [N]: the coefficients that it was made with; what a search finds is set by `reweigh`.
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
        """The merged LoRA of the experts that are kept."""
        if self._kept not in self._known:
            self._check_there()
            self._known[self._kept] = self._merge(self.weights, self._kept)
        return self._known[self._kept]

    def reweigh(self, weights: Sequence[float]) -> None:
        """Merge with these coefficients from now on."""
        self.weights, self._known = tuple(float(w) for w in weights), {}
        self._rehost()

    def attach(self) -> None:
        self._hosted_bank = ExpertBank([Expert("merged", self.merged().factors)])
        super().attach()

    def mask(self, *names: str) -> None:
        """Switch off exactly the named experts: the others are merged as if these had not been there."""
        off = {self.bank.index(name) for name in names}
        if off:
            self._check_there()
        self._kept = tuple(i for i in range(len(self.bank)) if i not in off)
        self._off = not self._kept
        if not self._off:
            self._rehost()

    def gates(self) -> dict[str, Tensor]:
        """Nothing: a merged LoRA has no weights per expert any more."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """`merged/<matrix>/A` and `/B` of all experts together, and `weights`."""
        held, self._kept = self._kept, tuple(range(len(self.bank)))
        factors, self._kept = self.merged().factors, held
        tensors = {f"{_PREFIX}{m}/{part}": t for m, f in factors.items() for part, t in (("A", f.A), ("B", f.B))}
        return {**tensors, "weights": torch.tensor(self.weights)}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the merged LoRA from `tensors`. Raises: MismatchError where it is not one of these experts' matrices."""
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
            what = f"--mask and --only merge the LoRAs that are left anew, and there is {', '.join(gone)}"
            raise UsageError("LoRAs", what, "Put it back, or name all of them with --loras.")

    def _check_shapes(self, matrix: str, tensors: Mapping[str, Tensor]) -> None:
        like = self.bank.experts[self.bank.present(matrix)[0]].factors[matrix]
        A, B = tensors[f"{_PREFIX}{matrix}/A"], tensors[f"{_PREFIX}{matrix}/B"]
        if A.shape[1:] != like.A.shape[1:] or B.shape != (len(like.B), len(A)):
            shapes = f"{tuple(A.shape)} and {tuple(B.shape)}"
            raise MismatchError(f"{_PREFIX}{matrix}", f"its factors have shapes {shapes}, which do not fit")

    def _rehost(self) -> None:
        """Put what is merged now in the place of what was."""
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
    """The experts `kept` (all by default) as one, in float32 on `device`; nothing is left at a matrix none adapts.

    `base` is for methods that look at the base's own matrices.
    Raises: MismatchError where factors cannot be merged.
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
        # Of the names, so that the experts' order changes nothing.
        tuple(zlib.crc32(f"{seed}/{expert.name}/{matrix}".encode()) for expert in experts),
    )


def _nothing(bank: ExpertBank, matrix: str, device: torch.device | str) -> LowRank:
    """A LoRA of rank 1 that adds nothing, for a matrix whose experts are all masked."""
    like = bank.experts[bank.present(matrix)[0]].factors[matrix]
    return LowRank(torch.zeros(1, *like.A.shape[1:], device=device), torch.zeros(len(like.B), 1, device=device), 1.0)
