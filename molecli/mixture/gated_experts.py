"""Weights that depend on the input, at routed experts' fused weights and at routers: one weight for each row of x.

    y = W_e x + Σ_i g_i ΔW_ie x          for the routed expert e, and the same for the router's logits

Routed experts of transformers' common interface (`use_experts_implementation`) are computed here, with the module's own
gating and activation; no weight is materialised. A router runs once more with its update added to the one product of
its input and its weight. Modules that do something else are refused. The gate is that of a layer before them.

Contents: GatedExperts, GatedRouter; HostedParameters, host_parameters; gated_kind, with_entries, by_row.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from molecli.bases.fused import FusedPlace
from molecli.catalog.methods import SUM
from molecli.errors import RunError, UsageError
from molecli.experts import ExpertBank
from molecli.mixture.fused_experts import FusedModule, Held, check_same, stacked_updates
from molecli.mixture.site_state import HostedSite
from molecli.mixture.sites import block_of
from molecli.protocols import Group, Site

_IMPLEMENTATION = "molecli_gated"
# Sums of weights and updates that are kept while attached; larger ones would not leave a large model its memory.
KEPT_BYTES = 4 << 30
# The weights [rows, N] of a site for a module's input with that many rows; None: all experts are off.
ByRow = Callable[[HostedSite, int], Tensor | None]


class _Gated:
    """The adapted parameters of one module under one gate."""

    def __init__(
        self, module: nn.Module, matrices: Held, bank: ExpertBank, by_row: ByRow, *, renormalize: bool = False
    ) -> None:
        self.module, self.by_row, self.renormalize = module, by_row, renormalize
        sites = list({id(site): site for _, site in matrices.values()}.values())
        assert len(sites) == 1
        self.site = sites[0]
        self.updates = stacked_updates(module, matrices, sites, bank)

    def restore(self) -> None:
        """Nothing: the module is never changed outside a call."""

    def forget(self) -> None:
        """Nothing: every call computes its weights."""


class _Instead:
    """The configuration of a module with another implementation of its experts; everything else is as it was."""

    def __init__(self, config: Any, gated: GatedExperts, weights: Tensor) -> None:
        self.config, self.gated, self.weights = config, gated, weights
        self._experts_implementation = _IMPLEMENTATION

    def __getattr__(self, name: str) -> Any:
        return getattr(self.config, name)


class GatedExperts(_Gated):
    """The routed experts of one module; inside its forward they are computed by `_forward`."""

    def attach(self) -> list[RemovableHandle]:
        """Hooks around the module's forward."""
        return [
            self.module.register_forward_pre_hook(self._enter, with_kwargs=True),
            self.module.register_forward_hook(self._leave, always_call=True),
        ]

    def restore(self) -> None:
        """The module's own configuration is back, also if a forward was left without its end."""
        config: Any = self.module.config
        if isinstance(config, _Instead):
            self.module.config = config.config

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        check_same(module, self.module)
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        weights = self.by_row(self.site, hidden.shape[0])
        if weights is not None:
            self.restore()
            own: Any = module
            own.config = _Instead(own.config, self, weights)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.restore()

    def product(self, name: str, x: Tensor, weights: Tensor, expert: int) -> Tensor:
        """[n, d_out], the matrix of one routed expert times x [n, d_in], with the LoRAs' update and its bias."""
        module: Any = self.module
        weight = getattr(module, name)[expert]
        bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
        y = F.linear(x, weight.T if module.is_transposed else weight, bias)
        update = self.updates.get(name)
        return y if update is None else y + update.low_rank(x, weights, expert, renormalize=self.renormalize)


def _forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts' output [rows, d], like transformers' implementations, with each row's weights for the LoRAs."""
    gated, by_row = module.config.gated, module.config.weights
    rows, chosen = top_k_index.shape
    order = top_k_index.flatten().argsort(stable=True)
    counts = torch.bincount(top_k_index.flatten(), minlength=module.num_experts).tolist()
    share, up, parts = top_k_weights.flatten(), "gate_up_proj" if module.has_gate else "up_proj", []
    for expert, pairs in enumerate(order.split(counts)):
        if expert >= module.num_experts or not len(pairs):  # an index past the last means another device's expert
            parts.append(hidden_states.new_zeros(len(pairs), hidden_states.shape[1]))
            continue
        weights = by_row[pairs // chosen]
        y = gated.product(up, hidden_states[pairs // chosen], weights, expert)
        y = module._apply_gate(y) if module.has_gate else module.act_fn(y)
        y = gated.product("down_proj", y, weights, expert)
        y = module.post_expert_norm(y) if module.has_post_expert_norm else y
        parts.append(y * share[pairs].unsqueeze(-1))
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return torch.cat(parts)[back].view(rows, chosen, -1).sum(1).to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register(_IMPLEMENTATION, _forward)


class GatedRouter(_Gated):
    """The weight of one router: its output is computed again with the update."""

    def attach(self) -> list[RemovableHandle]:
        """A hook after the module's forward."""
        return [self.module.register_forward_hook(self._again, with_kwargs=True)]

    def _again(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        check_same(module, self.module)
        rows = (args[0] if args else kwargs["hidden_states"]).shape[:-1].numel()
        weights = self.by_row(self.site, rows)
        if weights is None:
            return None

        def update(x: Tensor) -> Tensor:
            flat = x.reshape(-1, x.shape[-1])
            added = self.updates["weight"].low_rank(flat, weights, 0, renormalize=self.renormalize)
            return added.view(*x.shape[:-1], -1)

        with _Adding(type(module).__name__, module.weight, update):  # type: ignore[arg-type]
            return module.forward(*args, **kwargs)


class _Adding(TorchFunctionMode):
    """Inside it `update(x)` is added to the product of x and `weight`. Raises: RunError for any other use of it."""

    _CASTS = (Tensor.to, Tensor.type, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16)

    def __init__(self, kind: str, weight: Tensor, update: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.kind, self.update = kind, update
        self.weights, self.products = [weight], 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not any(part is weight for part in (*args, *(kwargs or {}).values()) for weight in self.weights):
            return result
        if func in self._CASTS:
            self.weights.append(result)
        elif func is F.linear and args[0] is not args[1]:
            self.products += 1
            return result + self.update(args[0]).to(result.dtype)
        elif isinstance(result, Tensor):
            raise self._unknown()
        return result

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)
        if kind is None and self.products != 1:
            raise self._unknown()

    def _unknown(self) -> RunError:
        what = "it does not multiply its weight with its input, and its LoRAs cannot be weighed by the input"
        return RunError(self.kind, what, "Use a mode with fixed weights.")


HostedParameters = FusedModule | GatedExperts | GatedRouter


def host_parameters(
    modules: Mapping[str, nn.Module],
    sites: Iterable[HostedSite],
    fused: Mapping[str, FusedPlace],
    bank: ExpertBank,
    fixed: Callable[[HostedSite], Tensor | None],
    rows: ByRow,
    *,
    renormalize: bool,
) -> list[HostedParameters]:
    """The experts at the parameters that no layer holds, module by module; weights come from `fixed` or `rows`."""
    held: dict[str, dict[str, tuple[FusedPlace, HostedSite]]] = {}
    for site in sites:
        for matrix in site.site.matrices:
            if matrix in fused and bank.present(matrix):
                held.setdefault(fused[matrix].module, {})[matrix] = fused[matrix], site
    found: list[HostedParameters] = []
    kept = _bytes(modules, held) <= KEPT_BYTES
    for name, matrices in held.items():
        module = modules[name]
        if all(site.gate.constant for _, site in matrices.values()):
            found.append(FusedModule(module, matrices, bank, fixed, renormalize=renormalize, kept=kept))
        else:
            kind = gated_kind(module, {place.parameter for place, _ in matrices.values()})
            assert kind is not None  # others are refused when the mixture is built
            found.append(kind(module, matrices, bank, rows, renormalize=renormalize))
    return found


def _bytes(modules: Mapping[str, nn.Module], held: Mapping[str, Held]) -> int:
    """The size of the adapted parameters."""
    names = {(module, place.parameter) for module, matrices in held.items() for place, _ in matrices.values()}
    return sum(getattr(modules[module], parameter).nbytes for module, parameter in names)


def gated_kind(module: nn.Module, parameters: Collection[str]) -> type[GatedExperts | GatedRouter] | None:
    """How weights that depend on the input are possible at these parameters of the module; None if they are not."""
    common = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "_apply_gate", "num_experts")
    if all(hasattr(module, name) for name in common):
        up = "gate_up_proj" if module.has_gate else "up_proj"
        return GatedExperts if set(parameters) <= {up, "down_proj"} else None
    return GatedRouter if set(parameters) == {"weight"} and module.weight.dim() == 2 else None  # type: ignore[operator]


def with_entries(sites: Sequence[Site], fused: Mapping[str, FusedPlace]) -> list[Site]:
    """The sites, with routed experts and routers under the gate of the last site before them.

    A gate reads the input of a layer, and they are none. Raises: UsageError if there is no site before them.
    """
    found: list[Site] = []
    for site in sites:
        apart = [group for group in site.groups if group.matrices[0] in fused]
        layers = [group for group in site.groups if group.matrices[0] not in fused]
        before = [group for group in layers if not _beside(group.matrices[0], apart, fused)]
        if not apart or (before and site.groups[0] is before[0]):
            found.append(replace(site, groups=(*layers, *apart)))
            continue
        first = apart[0].matrices[0]
        at = max((i for i, one in enumerate(found) if one.stream == apart[0].stream), default=None)
        if at is None:
            what = f"the gate of {first} has nothing to read: the LoRAs adapt no linear layer before it"
            raise UsageError(site.name, what, f"Use --mode {SUM}, a merge, or gates that do not read the input.")
        found[at] = replace(found[at], groups=(*found[at].groups, *apart))
        if layers:
            found.append(replace(site, groups=tuple(layers)))
    return found


def _beside(layer: str, apart: Sequence[Group], fused: Mapping[str, FusedPlace]) -> bool:
    """Whether the layer is in the same part of the block as one of the fused groups: it may run after them."""
    modules = {fused[group.matrices[0]].module for group in apart}
    parts = {module.rpartition(".")[0] for module in modules}
    blocks = {block_of(module) for module in modules}
    return any(layer.startswith(f"{part}.") for part in (parts - blocks) | modules)


def by_row(value: Tensor, rows: int, tokens: int, where: str) -> Tensor:
    """A gate's value [N], [b, N] or [B, T, N] for each of a module's `rows`; the pass has that many `tokens`.

    Raises: RunError if the module does not read every token of the pass once, in their order.
    """
    if value.dim() == 1:
        return value.expand(rows, -1)
    flat = value if value.dim() == 2 else value.flatten(0, 1)
    if rows != tokens or rows % len(flat):
        what = f"its input has {rows} rows and the pass {tokens} tokens, so a row's weights are unknown"
        raise RunError(where, what, "Use a mode with fixed weights.")
    return flat.repeat_interleave(rows // len(flat), dim=0)
