"""A composition whose weights are the same for every input: as a mixture, and as one update.

read_gates         a mixture's gates in the last pass
constant_weights   the weights of a mixture whose gates do not read the input
mean_weights       the weights of other mixtures, averaged over inputs
fixed_mixture      a mixture with such weights
updates            its exact update of every matrix, as factors
limited            the best factors of a given rank, and their errors
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from molecli.catalog.methods import DEFAULT, SUM
from molecli.errors import RunError, UsageError
from molecli.experts import ExpertBank, LowRank
from molecli.functional.factors import cat, truncated
from molecli.functional.gating import rescale
from molecli.methods.sums.fixed_gate import FixedGate
from molecli.mixture.layout import layout_of
from molecli.mixture.merged import MergedMixture
from molecli.mixture.mixture import Mixture
from molecli.protocols import Progress

# site -> [N] on the CPU
Weights = Mapping[str, Tensor]


def read_gates(mixture: Mixture) -> dict[str, Tensor]:
    """{site: [inputs, N]} of the last forward pass, on the CPU. Raises: UsageError for a mixture without gates."""
    gates = mixture.gates()
    if not gates:
        what = "the composition routes its LoRAs inside another library, and has no weights to average"
        raise UsageError("mole export", what, f"Compose them with --mode {DEFAULT} or {SUM}, and export that.")
    return {site: gate.float().cpu() for site, gate in gates.items()}


def constant_weights(mixture: Mixture, off: Collection[str] = ()) -> Weights | None:
    """The weights at each site with the experts `off` masked; None if a gate reads the input."""
    gates = mixture.gate_modules()
    # A mixture inside another library has sites, but none of our gates.
    if len(gates) < len(mixture.sites) or not all(gate.constant for gate in gates.values()):
        return None
    keep = torch.tensor([float(name not in off) for name in mixture.names]) if off else None
    found = {}
    for site, gate in gates.items():
        place = next((tensor.device for tensor in (*gate.parameters(), *gate.buffers())), None)
        found[site] = gate(None, keep if keep is None else keep.to(place)).detach().float().cpu()
    return found


def mean_weights(mixture: Mixture, observed: Mapping[str, Tensor]) -> Weights:
    """The mean over inputs of the gates [inputs, N] at each site. Raises: RunError for a site without inputs."""
    for site in mixture.sites:
        if site.name not in observed:
            what = f"no input reached the gate at {site.name}"
            raise RunError("calibration", what, "Give other inputs, or more of them.")
    return {site.name: observed[site.name].double().mean(0).float() for site in mixture.sites}


def fixed_mixture(mixture: Mixture, weights: Weights, *, renormalize: bool) -> Mixture:
    """A mixture of the same experts and sites with these constant weights; it is not attached yet.

    renormalize: if experts lack a matrix, the others get their share there.
    """
    return Mixture(
        mixture.model,
        mixture.bank,
        mixture.sites,
        {site: FixedGate(values, normalized=False) for site, values in weights.items()},
        streams=layout_of(mixture.model).streams(),
        renormalize_absent=renormalize,
    )


def updates(mixture: Mixture, weights: Weights, *, renormalize: bool) -> dict[str, LowRank]:
    """Every nonzero update by matrix: the weighted experts stacked along rank, in float64 with scaling 1.

    A merged mixture has its own update already. Experts with weight 0 add no rank.
    """
    if isinstance(mixture, MergedMixture):
        factors = {name: _folded(low_rank) for name, low_rank in mixture.merged().factors.items()}
    else:
        factors = {
            matrix: _stacked(mixture.bank, matrix, values)
            for site in mixture.sites
            for matrix in site.matrices
            if (values := _at_matrix(mixture.bank, matrix, weights[site.name], renormalize)).any()
        }
    return {name: low_rank for name, low_rank in factors.items() if low_rank.A.any() and low_rank.B.any()}


def limited(
    factors: Mapping[str, LowRank], rank: int | None = None, *, progress: Progress | None = None
) -> tuple[dict[str, LowRank], dict[str, float]]:
    """(factors of at most `rank`, ‖ΔW − ΔW'‖/‖ΔW‖ of each matrix), in the Frobenius norm; exact without a rank.

    The rank is never larger than the matrix allows: a larger one is reduced without error.
    """
    found, errors = {}, {}
    for done, (name, low_rank) in enumerate(factors.items(), start=1):
        A, B = low_rank.A.flatten(1), low_rank.B
        full = min(A.shape[1], len(B))
        wanted = full if rank is None else min(rank, full)
        errors[name] = 0.0
        if low_rank.rank > wanted:
            A, B, errors[name] = truncated(A, B, wanted)
        found[name] = LowRank(A.reshape(-1, *low_rank.A.shape[1:]), B, 1.0)
        if progress is not None:
            progress("factors", done, len(factors))
    return found, errors


def _at_matrix(bank: ExpertBank, matrix: str, values: Tensor, renormalize: bool) -> Tensor:
    """[N], the weights at one matrix of a site, 0 for experts that do not adapt it."""
    present = torch.zeros(len(bank))
    present[list(bank.present(matrix))] = 1.0
    return rescale(values, present) if renormalize else values * present


def _stacked(bank: ExpertBank, matrix: str, values: Tensor) -> LowRank:
    chosen = [i for i in bank.present(matrix) if values[i] != 0]
    parts = [_folded(bank.experts[i].factors[matrix]) for i in chosen]
    A, B = cat([(part.A, part.B) for part in parts], values[chosen])
    return LowRank(A, B, 1.0)


def _folded(low_rank: LowRank) -> LowRank:
    """The same update in float64 with scaling 1."""
    return LowRank(low_rank.A.cpu().double(), low_rank.scaling * low_rank.B.cpu().double(), 1.0)
