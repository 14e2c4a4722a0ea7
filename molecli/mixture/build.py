"""Makes a mixture of a model, its experts and a method, with one builder for each family of methods.

Contents: build_mixture, sum_of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor, nn

from molecli.bases.fused import FusedPlace
from molecli.bases.weights import BaseWeights
from molecli.catalog.methods import SUM, Family, Method, check_runs_on, get_method
from molecli.config import GateConfig, MethodConfig
from molecli.config.method import share_of
from molecli.errors import UsageError
from molecli.experts import Expert, ExpertBank, Merged
from molecli.functional.wrapped import device_of
from molecli.mixture.branching import Branching
from molecli.mixture.fused_experts import fused_in
from molecli.mixture.gated_experts import gated_kind, with_entries
from molecli.mixture.layout import blocks_of, layout_of
from molecli.mixture.merged import MergedMixture, merge_experts
from molecli.mixture.mixture import Mixture
from molecli.mixture.streams import Layout
from molecli.protocols import Granularity, Progress, Site


def build_mixture(
    model: nn.Module,
    experts: Sequence[Expert],
    *,
    mode: str,
    gate: GateConfig | None = None,
    weights: Mapping[str, float] | None = None,
    only: str | None = None,
    method: MethodConfig | None = None,
    triggers: Mapping[str, str] | None = None,
    kinds: Mapping[str, str] | None = None,
    branches_at_once: int | None = None,
    progress: Progress | None = None,
) -> Mixture:
    """The experts on `model`, composed by `mode`, not attached yet; new gates start as `gate.init_std` says.

    weights: the user's coefficients by expert name, 1 by default. triggers, kinds: by expert name, for the modes that
    act on the denoising steps. A merge is computed when it is first needed. Raises: UsageError, MismatchError.
    """
    row, config, layout = get_method(mode), method or MethodConfig(), layout_of(model)
    check_runs_on(row.name, layout.kind)
    bank = ExpertBank(experts if config.layers is None else _within(experts, layout, config.layers))
    asked = Asked(
        row, model, bank, layout, gate or GateConfig(), config, _values(bank, weights or {}),
        None if only is None else bank.index(only), triggers or {}, kinds or {}, branches_at_once, progress,
    )  # fmt: skip
    return _BUILDERS[row.family](asked)


def sum_of(model: nn.Module, experts: Sequence[Expert], weights: Mapping[str, float] | None = None) -> Mixture:
    """The weighted sum of the experts; for a single one, the LoRA as it was trained, times its weight."""
    return build_mixture(model, experts, mode=SUM, weights=weights)


@dataclass(frozen=True)
class Asked:
    """The arguments of a builder; `own` [N]: the user's coefficients, `only`: the index of the only expert."""

    row: Method
    model: nn.Module
    bank: ExpertBank
    layout: Layout
    gate: GateConfig
    config: MethodConfig
    own: Tensor
    only: int | None
    triggers: Mapping[str, str]
    kinds: Mapping[str, str]
    branches_at_once: int | None
    progress: Progress | None

    @property
    def values(self) -> Tensor:
        """[N], the experts' weights: the user's coefficients times `method.scale`."""
        return self.own * self.config.scale

    def sites(self, granularity: Granularity = "network", *, per_token: bool = False) -> list[Site]:
        """The gate sites over all matrices that an expert adapts."""
        return self.layout.sites(self.layout.in_order(self.bank.matrices), granularity, per_token=per_token)


def _gated(asked: Asked) -> Mixture:
    settings, layout, build = asked.gate, asked.layout, asked.row.load()
    sites = asked.sites(settings.granularity, per_token=settings.pool == "token")

    def gates_at(sites: Sequence[Site]) -> dict[str, nn.Module]:
        built: dict[str, nn.Module] = build(
            settings, asked.bank, sites, seq2seq=layout.seq2seq, memory_width=layout.memory_width
        )
        return built

    gates = gates_at(sites)
    if not all(gate.constant for gate in gates.values()):
        fused = _check_inside(asked)
        if fused:
            sites = with_entries(sites, fused)
            gates = gates_at(sites)
    renormalize = settings.absent == "renormalize"
    return Mixture(asked.model, asked.bank, sites, gates, streams=layout.streams(), renormalize_absent=renormalize)


def _check_inside(asked: Asked) -> Mapping[str, FusedPlace]:
    """Checks that weights can depend on the prompt's tokens wherever a LoRA adapts the model; returns the places that
    no layer holds. Raises: UsageError."""
    outside = asked.layout.outside(asked.bank.matrices)
    if outside:
        what = (
            f"gates weigh LoRAs by the prompt, and a LoRA adapts {outside[0]}, which does not read the prompt's tokens"
        )
        raise UsageError(f"--mode {asked.row.name}", what, f"Use LoRAs of the language model alone, or --mode {SUM}.")
    fused = fused_in(asked.model, asked.bank.matrices)
    adapted: dict[str, set[str]] = {}
    for place in fused.values():
        adapted.setdefault(place.module, set()).add(place.parameter)
    for module, parameters in adapted.items():
        if gated_kind(asked.model.get_submodule(module), parameters) is None:
            raise _only_fixed(asked, f"{module}.{min(parameters)}")
    return fused


def _only_fixed(asked: Asked, matrix: str) -> UsageError:
    """The error for weights by input at a matrix where only fixed ones are exact."""
    what = f"its weights depend on the input, and a LoRA adapts {matrix}, which is no linear layer: there only weights "
    what += "that are the same for all tokens are possible"
    remedy = f"Use --mode {SUM}, a merge, or gates that do not read the input (gate.input: none)."
    return UsageError(f"--mode {asked.row.name}", what, remedy)


def _summed(asked: Asked) -> Mixture:
    sites, fixed = asked.sites(), asked.row.load()(asked.values, asked.only)
    gates = {site.name: fixed for site in sites}
    return Mixture(asked.model, asked.bank, sites, gates, streams=asked.layout.streams())


def _merged(asked: Asked) -> Mixture:
    """The experts merged into one LoRA by the method."""
    merge, factors = asked.row.load(), asked.row.part("coefficients")
    own = asked.own
    if factors is not None:
        own = own * torch.tensor(factors(asked.config, asked.bank.names))
    device, base = device_of(asked.model), BaseWeights(asked.model)

    @cache
    def there() -> ExpertBank:
        """The experts on the base's device, since a search merges them again and again."""
        return asked.bank.to(device)

    def merged(weights: Sequence[float], kept: Sequence[int]) -> Merged:
        return merge_experts(
            there(), merge, weights, asked.config, base=base, kept=kept, device=device, progress=asked.progress
        )

    return MergedMixture(asked.model, asked.bank, asked.sites(), merged, own.tolist(), streams=asked.layout.streams())


def _branching(asked: Asked) -> Mixture:
    make = asked.row.load()
    acting = make(asked.bank.names, asked.values, asked.config, triggers=asked.triggers, kinds=asked.kinds)
    streams = asked.layout.streams()
    return Branching(
        asked.model, asked.bank, asked.sites(), acting, streams=streams, branches_at_once=asked.branches_at_once
    )


def _through_peft(asked: Asked) -> Mixture:
    """The experts, hosted by PEFT."""
    from molecli.mixture.peft_routed import routed, weighed_at  # which imports PEFT

    fused = fused_in(asked.model, asked.bank.matrices)
    if fused:
        raise _only_fixed(asked, next(iter(fused)))
    width = asked.layout.memory_width
    assert width is not None
    config = asked.row.load()(asked.config, asked.bank, width=width, seq2seq=asked.layout.seq2seq)
    sites = asked.sites(weighed_at(config), per_token=True)
    return routed(asked.model, asked.bank, sites, config, asked.values, streams=asked.layout.streams())


_BUILDERS: Mapping[Family, Callable[[Asked], Mixture]] = {
    "gates": _gated,
    "sums": _summed,
    "merges": _merged,
    "outputs": _branching,
    "peft": _through_peft,
}


def _within(experts: Sequence[Expert], layout: Layout, share: str) -> list[Expert]:
    """The experts with only their factors in that share of the model's blocks, those whose middle lies in it.

    So adjacent shares have no block in common and miss none. Raises: UsageError if no factor is left.
    """
    (low, high), blocks = share_of(share), blocks_of(layout)
    inside = {m for i, block in enumerate(blocks) if low <= (i + 0.5) / len(blocks) < high for m in block}
    if high >= 1:  # the output head comes after all blocks
        inside |= {m for one in experts for m in one.factors} - {m for block in blocks for m in block}
    kept = [replace(one, factors={m: f for m, f in one.factors.items() if m in inside}) for one in experts]
    if not any(one.factors for one in kept):
        part = f"from {100 * low:g} to {100 * high:g}% of the depth"
        what = f"no LoRA adapts anything {part}, and the base has {len(blocks)} blocks"
        raise UsageError("method.layers", what, "Write a wider share, such as 0-50.")
    return kept


def _values(bank: ExpertBank, weights: Mapping[str, float]) -> Tensor:
    """[N], the user's coefficients."""
    for name in weights:
        bank.index(name)  # an unknown name is an error
    return torch.tensor([float(weights.get(name, 1.0)) for name in bank.names])
