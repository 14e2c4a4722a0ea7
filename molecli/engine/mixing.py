"""From a model, its experts and a method to a mixture that can be attached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from molecli.backbones.hosting import Mixture
from molecli.backbones.sites import make_sites
from molecli.compose import gated, get_method, linear, nla, single
from molecli.experts import Expert, ExpertBank
from molecli.files.recipe import GateConfig
from molecli.protocols import Site


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
    bank = ExpertBank(experts)
    seq2seq = bool(getattr(model.config, "is_encoder_decoder", False))
    matrices = in_model_order(model, bank)
    if mode == "gated":
        config = gate or GateConfig()
        sites = gate_sites(matrices, config, seq2seq=seq2seq)
        gates = gated.build_gates(config, bank, sites, seq2seq=seq2seq, memory_width=hidden_size(model))
        return Mixture(model, bank, sites, gates, seq2seq=seq2seq, renormalize_absent=config.absent == "renormalize")
    sites = make_sites(matrices, "network", seq2seq=seq2seq, per_token=False)
    fixed = _fixed_gate(mode, bank, weights or {}, only)
    return Mixture(model, bank, sites, {site.name: fixed for site in sites}, seq2seq=seq2seq)


def in_model_order(model: nn.Module, bank: ExpertBank) -> list[str]:
    """The adapted matrices in the order of the model, which is that of its forward pass; unknown ones last."""
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    return sorted(bank.matrices, key=lambda matrix: order.get(matrix, len(order)))


def hidden_size(model: Any) -> int:
    """Width of the encoder's output, which the gates of a seq2seq decoder read as the prompt."""
    return int(getattr(model.config, "d_model", None) or model.config.hidden_size)


def gate_sites(matrices: Sequence[str], config: GateConfig, *, seq2seq: bool) -> list[Site]:
    """The sites a gate configuration makes of `matrices` (for plans)."""
    return make_sites(matrices, config.granularity, seq2seq=seq2seq, per_token=config.pool == "token")


def _fixed_gate(mode: str, bank: ExpertBank, weights: Mapping[str, float], only: str | None) -> nn.Module:
    for name in weights:
        bank.index(name)  # an unknown name is an error
    values = torch.tensor([float(weights.get(name, 1.0)) for name in bank.names])
    if mode == "linear":
        return linear.gate(values)
    if mode == "nla":
        return nla.gate(values)
    return single.gate(values, None if only is None else bank.index(only))
