"""From a model, its experts and a method to a mixture that can be attached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor, nn

from molecli.backbones.branching import Branching
from molecli.backbones.hosting import Mixture
from molecli.backbones.layouts import Layout, blocks_of, layout_of
from molecli.backbones.merged import MergedMixture
from molecli.backbones.pipeline import PipelineModules
from molecli.backbones.streams import Streams
from molecli.backbones.weights import BaseWeights
from molecli.compose import Method, get_method, linear, nla, pem, single
from molecli.compose.output import output_method
from molecli.engine.merging import Told, merge_experts
from molecli.errors import UsageError
from molecli.experts import Expert, ExpertBank, Merged
from molecli.files.recipe import GateConfig, MethodConfig
from molecli.files.recipe.method import share_of
from molecli.protocols import Site


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
    told: Told | None = None,
) -> Mixture:
    """The experts on `model`, composed by `mode`, not attached yet; fresh gates start as `gate.init_std` says.

    `weights` are the users' coefficients by expert name, 1 where not given; `method`, `triggers` and `kinds` (by expert
    name) are for the modes that act on the denoising steps; `method.layers` holds for all. Methods that merge do so
    when they are first needed, and `told` hears how far they are. Raises: UsageError, MismatchError.
    """
    chosen, config = get_method(mode), method or MethodConfig()
    layout = layout_of(model)
    bank = ExpertBank(experts if config.layers is None else _within(experts, layout, config.layers))
    matrices = layout.in_order(bank.matrices)
    if chosen.through_peft:
        return _through_peft(chosen, model, bank, layout, _values(bank, weights or {}) * config.scale, config)
    if chosen.level == "site":
        settings = gate or GateConfig()
        sites = layout.sites(matrices, settings.granularity, per_token=settings.pool == "token")
        gates = chosen.load()(settings, bank, sites, seq2seq=layout.seq2seq, memory_width=layout.memory_width)
        renormalize = settings.absent == "renormalize"
        return Mixture(model, bank, sites, gates, streams=layout.streams(), renormalize_absent=renormalize)
    sites = layout.sites(matrices, "network", per_token=False)
    own = _values(bank, weights or {})
    if chosen.merges:
        return _merged(chosen, model, bank, sites, own, config, layout.streams(), told)
    values = own * config.scale
    if chosen.level == "output":
        acting = output_method(chosen.name, bank.names, values, config, triggers=triggers, kinds=kinds)
        return Branching(model, bank, sites, acting, streams=layout.streams(), branches_at_once=branches_at_once)
    fixed = _fixed_gate(chosen.name, bank, values, only)
    return Mixture(model, bank, sites, {site.name: fixed for site in sites}, streams=layout.streams())


def _within(experts: Sequence[Expert], layout: Layout, share: str) -> list[Expert]:
    """The experts with their factors in that share of the model's blocks alone: those whose middle lies in it.

    So shares that follow one another divide the blocks among them. Raises: UsageError where no factor is left.
    """
    (low, high), blocks = share_of(share), blocks_of(layout)
    inside = {m for i, block in enumerate(blocks) if low <= (i + 0.5) / len(blocks) < high for m in block}
    kept = [replace(one, factors={m: f for m, f in one.factors.items() if m in inside}) for one in experts]
    if not any(one.factors for one in kept):
        part = f"from {100 * low:g} to {100 * high:g}% of the depth"
        what = f"no LoRA adapts anything {part}, and the base has {len(blocks)} blocks"
        raise UsageError("method.layers", what, "Write a wider share, such as 0-50.")
    return kept


def _values(bank: ExpertBank, weights: Mapping[str, float]) -> Tensor:
    """[N], the users' coefficients."""
    for name in weights:
        bank.index(name)  # an unknown name is an error
    return torch.tensor([float(weights.get(name, 1.0)) for name in bank.names])


def check_pictures(mode: str, where: str = "--mode") -> None:
    """Nothing, where `mode` composes a diffusion pipeline too. Raises: UsageError."""
    if mode != "base" and get_method(mode).through_peft:
        what = "PEFT routes in language models alone, and the base is a diffusion pipeline"
        raise UsageError(f"{where} {mode}", what, "Write gated, linear, composite or another that draws.")


def _through_peft(
    chosen: Method, model: nn.Module, bank: ExpertBank, layout: Layout, values: Tensor, config: MethodConfig
) -> Mixture:
    """The experts where PEFT hosts them; `values` [N] are for the method that learns nothing."""
    if isinstance(model, PipelineModules):
        check_pictures(chosen.name)
    from molecli.backbones.peft_hosting import ArrowMixture, XLoraMixture  # which imports PEFT

    width = layout.memory_width
    assert width is not None
    found = chosen.load()(config, bank, width=width, seq2seq=layout.seq2seq)
    apart = not chosen.trained or config.layerwise_scalings
    sites = layout.sites(layout.in_order(bank.matrices), "matrix" if apart else "network", per_token=True)
    if chosen.trained:
        return XLoraMixture(model, bank, sites, found, streams=layout.streams())
    return ArrowMixture(model, bank, sites, found, values, streams=layout.streams())


def _merged(
    chosen: Method,
    model: nn.Module,
    bank: ExpertBank,
    sites: Sequence[Site],
    own: Tensor,
    config: MethodConfig,
    streams: Streams,
    told: Told | None,
) -> MergedMixture:
    """The experts as the one LoRA that `chosen` makes of them."""
    if chosen.name == "pem":
        own = own * torch.tensor(pem.coefficients(config.expression, bank.names))
    device, base = next(model.parameters()).device, BaseWeights(model)

    @cache
    def there() -> ExpertBank:
        """The experts beside the base: a search merges them again and again."""
        return bank.to(device)

    def merge(weights: Sequence[float], kept: Sequence[int]) -> Merged:
        return merge_experts(there(), chosen.load(), weights, config, base=base, kept=kept, device=device, told=told)

    return MergedMixture(model, bank, sites, merge, own.tolist(), streams=streams)


def _fixed_gate(mode: str, bank: ExpertBank, values: Tensor, only: str | None) -> nn.Module:
    if mode == "linear":
        return linear.gate(values)
    if mode == "nla":
        return nla.gate(values)
    return single.gate(values, None if only is None else bank.index(only))
