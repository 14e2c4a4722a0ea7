"""Experts on matrices that a module reads itself, without a linear layer: routed experts' fused weights, and routers.

Only the module's own code knows how it uses such a weight, so its output cannot be corrected afterwards. Inside the
module's forward, and nowhere else, its parameters are replaced by

    W + Σ_i g_i ΔW_i

which is exact for weights g that are the same for every input. The parameters themselves are never written to.
For weights that depend on the input see `gated_experts`.

Contents: Held; FusedModule; StackedUpdate, stacked_updates; fused_in; check_same.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from molecli.bases.fused import FusedPlace, fused_places
from molecli.errors import RunError, UsageError
from molecli.experts import ExpertBank, LowRank
from molecli.functional.gating import rescale
from molecli.functional.tensor_version import Stamp, stamp
from molecli.mixture.site_state import HostedSite

# The adapted matrices of one module: their places and their sites.
Held = Mapping[str, tuple[FusedPlace, HostedSite]]
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class FusedModule:
    """The adapted parameters of one module; `values(site)` gives a site's weights [N] in the current pass, None: off.

    matrices: the adapted ones with their places and sites. renormalize: experts that lack a matrix leave their share
    to the others. kept: the sums are kept until they change; otherwise each call computes them.
    Raises: UsageError if the parameters are not there as plain numbers.
    """

    def __init__(
        self,
        module: nn.Module,
        matrices: Held,
        bank: ExpertBank,
        values: Callable[[HostedSite], Tensor | None],
        *,
        renormalize: bool = False,
        kept: bool = True,
    ) -> None:
        self.module, self.values, self.renormalize, self.kept = module, values, renormalize, kept
        self.sites = list({id(site): site for _, site in matrices.values()}.values())
        self.updates = stacked_updates(module, matrices, self.sites, bank)
        self._own: dict[str, nn.Parameter | None] = {}
        self._known: tuple[Stamp, dict[str, Tensor]] | None = None

    def attach(self) -> list[RemovableHandle]:
        """Hooks that replace the parameters at the start of the module's forward and put them back at its end."""
        return [
            self.module.register_forward_pre_hook(self._enter),
            self.module.register_forward_hook(self._leave, always_call=True),
        ]

    def restore(self) -> None:
        """Puts the very same parameters back, also if a forward was left without its end."""
        for name, parameter in self._own.items():
            self.module._parameters[name] = parameter
        self._own = {}

    def forget(self) -> None:
        """Drops the replacements: other experts are masked now."""
        self._known = None

    def _enter(self, module: nn.Module, args: Any) -> None:
        check_same(module, self.module)
        self.restore()
        values = [value for site in self.sites if (value := self.values(site)) is not None]
        if values:
            device = next(iter(self.updates.values())).B.device
            replaced = self._replaced(torch.stack([value.to(device) for value in values]))
            self._own = {name: module._parameters[name] for name in replaced}
            # As in torch.func.functional_call: the order of the parameters stays.
            module._parameters.update(replaced)  # type: ignore[arg-type]

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.restore()

    def _replaced(self, values: Tensor) -> dict[str, Tensor]:
        """parameter -> its replacement for the sites' weights [sites, N]."""
        own = [getattr(self.module, name) for name in self.updates]
        learning = torch.is_grad_enabled() and (values.requires_grad or any(weight.requires_grad for weight in own))
        now = stamp([*own, *(tensor for site in self.sites for tensor in site.tensors)])
        if self._known is not None and not learning and self._known[0] == now:
            return self._known[1]
        self._known = None  # its memory is free for the new one
        # Later passes may have gradients, for which tensors of the inference mode are useless.
        with torch.inference_mode(False), torch.set_grad_enabled(learning):
            replaced = {
                name: update.added(weight, values, renormalize=self.renormalize)
                for (name, update), weight in zip(self.updates.items(), own, strict=True)
            }
        if self.kept and not learning:
            self._known = now, replaced
        return replaced


def fused_in(model: nn.Module, matrices: Collection[str]) -> dict[str, FusedPlace]:
    """The places of those of the `matrices` that no layer of the model holds."""
    return {matrix: place for matrix, place in fused_places(model).items() if matrix in matrices}


@dataclass(frozen=True)
class StackedUpdate:
    """All experts at the E matrices of one parameter (E = 1 for a parameter [., .]), padded to one rank R with zeros.

    A: [E, R, d_in]; B: [E, d_out, R] in float32 with the scalings; owner: [E, R], the expert of each rank; site: [E],
    the index of each matrix's site; present: [E, N], which experts adapt it.
    """

    A: Tensor
    B: Tensor
    owner: Tensor
    site: Tensor
    present: Tensor
    transposed: bool

    def added(self, weight: Tensor, values: Tensor, *, renormalize: bool) -> Tensor:
        """The parameter `weight` with the update for the sites' weights [sites, N]."""
        by_matrix = values.to(self.present)[self.site]
        by_matrix = rescale(by_matrix, self.present) if renormalize else by_matrix
        # Weighted in float32 before the cast, as everywhere.
        B = (self.B * by_matrix.gather(1, self.owner).unsqueeze(1)).to(weight.dtype)
        left, right = (self.A.mT, B.mT) if self.transposed else (B, self.A)
        return torch.baddbmm(weight.view(len(left), *weight.shape[-2:]), left, right).view_as(weight)

    def low_rank(self, x: Tensor, weights: Tensor, at: int, *, renormalize: bool) -> Tensor:
        """[n, d_out], the update of matrix `at` for x [n, d_in], with the experts' weights [n, N] for each row."""
        if renormalize:
            weights = rescale(weights, self.present[at].to(weights))
        u = (x @ self.A[at].to(x.dtype).T) * weights.to(x)[:, self.owner[at]]
        return u @ self.B[at].to(x.dtype).T


def stacked_updates(
    module: nn.Module, matrices: Held, sites: Sequence[HostedSite], bank: ExpertBank
) -> dict[str, StackedUpdate]:
    """parameter -> the experts at its matrices. Raises: UsageError if it is not there as plain numbers."""
    by_parameter: dict[str, dict[str, tuple[FusedPlace, HostedSite]]] = {}
    for matrix, (place, site) in matrices.items():
        by_parameter.setdefault(place.parameter, {})[matrix] = place, site
    return {name: _stacked(getattr(module, name), held, sites, bank) for name, held in by_parameter.items()}


def _stacked(weight: Tensor, held: Held, sites: Sequence[HostedSite], bank: ExpertBank) -> StackedUpdate:
    first = next(iter(held))
    _check_plain(first, weight)
    transposed = held[first][0].transposed
    count = weight.shape[0] if weight.dim() == 3 else 1
    d_out, d_in = held[first][0].shape
    rank = max(sum(bank.experts[i].factors[matrix].rank for i in bank.present(matrix)) for matrix in held)
    A = torch.zeros(count, rank, d_in, device=weight.device, dtype=weight.dtype)
    B = torch.zeros(count, d_out, rank, device=weight.device)
    owner = torch.zeros(count, rank, dtype=torch.long)
    site, present = torch.zeros(count, dtype=torch.long), torch.zeros(count, len(bank))
    for matrix, (place, of) in held.items():
        at, start = place.expert or 0, 0
        site[at] = next(i for i, one in enumerate(sites) if one is of)
        for i in bank.present(matrix):
            factor: LowRank = bank.experts[i].factors[matrix]
            ranks = slice(start, start + factor.rank)
            A[at, ranks], B[at, :, ranks] = factor.A.to(A), factor.B.to(B) * factor.scaling
            owner[at, ranks], present[at, i] = i, 1.0
            start += factor.rank
    device = weight.device
    return StackedUpdate(A, B, owner.to(device), site.to(device), present.to(device), transposed)


def check_same(module: nn.Module, hosting: nn.Module) -> None:
    """Raises: RunError in a copy of the module, whose parameters are others (as in DataParallel)."""
    if module is not hosting:
        what = "it runs in a copy of the module that the LoRAs were attached to"
        raise RunError(type(module).__name__, what, "Call the model itself, without DataParallel.")


def _check_plain(matrix: str, weight: Tensor) -> None:
    if weight.is_meta:
        what = "a LoRA adapts this weight, which is offloaded and not in memory before the model runs"
        raise UsageError(matrix, what, "Load the base without offloading it to the CPU or to disk.")
    if weight.dtype not in _DTYPES:
        what = f"a LoRA adapts this weight, which is stored as {str(weight.dtype).removeprefix('torch.')}"
        raise UsageError(matrix, what, "Load the unquantised base.")
