"""A naive mixture to hold the engine to: every expert's output is materialised, one expert at a time.

Nothing here is shared with the engine but the gates' parameters: the factors are read with safetensors and json, and the
gates are recomputed from their definition (MoLE, Eq. 9-12).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from molecli.experts import Expert, LowRank

PREFIX = "base_model.model."


def read_naively(folder: Path, name: str) -> Expert:
    """A PEFT folder as an expert, for LoRAs with one rank and alpha."""
    config = json.loads((folder / "adapter_config.json").read_text())
    scaling = config["lora_alpha"] / (config["r"] ** (0.5 if config.get("use_rslora") else 1))
    tensors = load_file(folder / "adapter_model.safetensors")
    factors = {}
    for key, A in tensors.items():
        if key.endswith(".lora_A.weight"):
            matrix = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            factors[matrix] = LowRank(A, tensors[key.replace("lora_A", "lora_B")], scaling)
    return Expert(name, factors, str(folder), name * 8, config["r"], config["lora_alpha"])


class NaiveMixture:
    """y = W x + Σ_i g_i(x) · s_i B_i (A_i x), one hook per matrix and one loop over the experts.

    `gate_of(site, x, outputs)` gives [B, T, N] or [B, N] or [N]; the value is kept for the site's other matrices.
    """

    def __init__(self, model: nn.Module, experts: list[Expert], sites: Any, gate_of: Any) -> None:
        self.model, self.experts, self.sites, self.gate_of = model, experts, sites, gate_of
        self.values: dict[str, Tensor] = {}
        self.handles: list[Any] = []

    def __enter__(self) -> NaiveMixture:
        modules = dict(self.model.named_modules())
        self.handles.append(self.model.register_forward_pre_hook(lambda *_: self.values.clear()))
        for site in self.sites:
            for matrix in site.matrices:
                self.handles.append(modules[matrix].register_forward_hook(self._hook(site, matrix)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def outputs(self, matrix: str, x: Tensor) -> Tensor:
        """[B, T, N, d_out]: every expert's own contribution; zero where it does not adapt the matrix."""
        d_out = next(e.factors[matrix].B.shape[0] for e in self.experts if matrix in e.factors)
        rows = []
        for expert in self.experts:
            factor = expert.factors.get(matrix)
            if factor is None:
                rows.append(x.new_zeros(*x.shape[:-1], d_out))
            else:
                rows.append(factor.scaling * ((x @ factor.A.T.to(x)) @ factor.B.T.to(x)))
        return torch.stack(rows, dim=-2)

    def _hook(self, site: Any, matrix: str) -> Any:
        def hook(_: nn.Module, args: Any, y: Tensor) -> Tensor:
            x = args[0]
            if site.name not in self.values:
                entry = torch.cat([self.outputs(m, x) for m in site.entry.matrices], dim=-1)
                self.values[site.name] = self.gate_of(site, x, entry)
            g = self.values[site.name]
            g = g[:, None] if g.dim() == 2 else g
            return y + (g.unsqueeze(-1) * self.outputs(matrix, x)).sum(-2)

        return hook
