"""From a model, its experts and a method to a mixture that can be attached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from molecli.backbones.hosting import Mixture
from molecli.backbones.layouts import layout_of
from molecli.compose import gated, get_method, linear, nla, single
from molecli.experts import Expert, ExpertBank
from molecli.files.recipe import GateConfig


def build_mixture(
    model: nn.Module,
    experts: Sequence[Expert],
    *,
    mode: str,
    gate: GateConfig | None = None,
    weights: Mapping[str, float] | None = None,
    only: str | None = None,
) -> Mixture:
    """The experts on `model`, composed by `mode`, not attached yet; fresh gates are uniform.

    `weights` are the users' coefficients by expert name, 1 where not given. Raises: UsageError, MismatchError.
    """
    get_method(mode)
    bank, layout = ExpertBank(experts), layout_of(model)
    matrices = layout.in_order(bank.matrices)
    if mode == "gated":
        config = gate or GateConfig()
        sites = layout.sites(matrices, config.granularity, per_token=config.pool == "token")
        gates = gated.build_gates(config, bank, sites, seq2seq=layout.seq2seq, memory_width=layout.memory_width)
        renormalize = config.absent == "renormalize"
        return Mixture(model, bank, sites, gates, streams=layout.streams(), renormalize_absent=renormalize)
    sites = layout.sites(matrices, "network", per_token=False)
    fixed = _fixed_gate(mode, bank, weights or {}, only)
    return Mixture(model, bank, sites, {site.name: fixed for site in sites}, streams=layout.streams())


def _fixed_gate(mode: str, bank: ExpertBank, weights: Mapping[str, float], only: str | None) -> nn.Module:
    for name in weights:
        bank.index(name)  # an unknown name is an error
    values = torch.tensor([float(weights.get(name, 1.0)) for name in bank.names])
    if mode == "linear":
        return linear.gate(values)
    if mode == "nla":
        return nla.gate(values)
    return single.gate(values, None if only is None else bank.index(only))
