"""A naive mixture to hold the engine to: every expert's output is materialised, one expert at a time.

Nothing here is shared with the engine but the gates' parameters: the factors are read with safetensors and json, and
the gates are recomputed from their definition (MoLE, Eq. 9-12).
"""

from __future__ import annotations

import json
from collections.abc import Callable
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


class NaiveGate:
    """The gate from its definition, on materialised outputs, with the mixture's own parameters (MoLE, Eq. 9-11).

    `memory` gives the encoder's output, which the gates of a seq2seq decoder read as the prompt.
    """

    def __init__(
        self, mixture: Any, batch: dict[str, Tensor], config: dict[str, Any], memory: Callable[[], Tensor]
    ) -> None:
        self.mixture, self.batch, self.config, self.memory = mixture, batch, config, memory
        self.causal = "encoder" not in {site.stream for site in mixture.sites}

    def __call__(self, site: Any, x: Tensor, outputs: Tensor) -> Tensor:
        gate = self.mixture.gate_modules()[site.name]
        if self.config["input"] == "none":
            logits = gate.logits
        elif self.config["input"] == "hidden" or self.config["normalize"] == "standardize":
            logits = self._feature_logits(gate, self._features(site, gate, x))
        else:
            logits = self._output_logits(gate.head, self._pooled(outputs, gate.pool, self._weight(site, gate, x)))
        return torch.softmax(logits / gate.log_temperature.exp(), -1)

    def _weight(self, site: Any, gate: Any, x: Tensor) -> Tensor:
        """[B, T], the positions that the pool is over."""
        if site.stream in ("encoder", "memory"):
            return self.batch["attention_mask"]
        if self.causal:
            prompt = (self.batch["labels"] != -100).cumsum(1) == 0
            return self.batch["attention_mask"] * (prompt if gate.pool == "prompt" else 1)
        first = torch.zeros(x.shape[:2])
        first[:, 0] = 1
        return first if gate.pool == "prompt" else torch.ones(x.shape[:2])

    def _ranks(self, site: Any, x: Tensor) -> Tensor:
        """[B, T, R], x on every expert's A."""
        return torch.cat([x @ self.mixture.bank.stacked(m).A.T for m in site.entry.matrices], -1)

    def _features(self, site: Any, gate: Any, x: Tensor) -> Tensor:
        if self.config["input"] == "experts":
            x = self._ranks(site, x)
        elif gate.pool == "prompt" and site.stream == "decoder" and not self.causal:
            return self._pooled(self.memory(), "mean", self.batch["attention_mask"])
        return self._pooled(x, gate.pool, self._weight(site, gate, x))

    def _pooled(self, values: Tensor, pool: str, weight: Tensor) -> Tensor:
        weight = weight.float().view(*weight.shape, *[1] * (values.dim() - 2))
        if pool == "token":
            return values
        if pool == "running":
            ends = range(1, values.shape[1] + 1)
            sums = [(values[:, :end] * weight[:, :end]).sum(1) for end in ends]
            return torch.stack([s / weight[:, :end].sum(1).clamp_min(1) for s, end in zip(sums, ends, strict=True)], 1)
        return (values * weight).sum(1) / weight.sum(1)

    def _feature_logits(self, gate: Any, f: Tensor) -> Tensor:
        head = gate.head
        if self.config["normalize"] == "standardize":
            f = (f - gate.mean) / gate.std / f.shape[-1] ** 0.5
        elif self.config["normalize"] == "unit":
            f = f / f.norm(dim=-1, keepdim=True)
        if type(head).__name__ == "PerExpertHead":
            count = len(self.mixture.names)
            return torch.stack([(f * head.weight)[..., head.owner == i].sum(-1) for i in range(count)], -1) + head.bias
        W = head.weight if head.down is None else head.weight @ head.down
        return f @ W.T + head.bias

    def _output_logits(self, head: Any, E: Tensor) -> Tensor:
        """E [.., N, D], every expert's pooled output."""
        count, width = E.shape[-2:]
        flat = E.flatten(-2)
        if self.config["normalize"] == "unit":
            flat = flat / flat.norm(dim=-1, keepdim=True)
        if head.down is not None:
            return (flat @ head.down.permute(0, 2, 1).reshape(count * width, -1)) @ head.weight.T
        if self.config["head"] == "per_expert":
            return (flat.view(E.shape) * head.weight[:, 0]).sum(-1)
        return flat @ head.weight.permute(0, 2, 1).reshape(count * width, count)


class NaivePipelineMixture(NaiveMixture):
    """The same on the UNet and text encoders of a pipeline; convolutions as the dense update of each expert."""

    def __enter__(self) -> NaivePipelineMixture:
        super().__enter__()
        for part in self.model.children():
            self.handles.append(part.register_forward_pre_hook(lambda *_: self.values.clear()))
        self.modules = dict(self.model.named_modules())
        return self

    def outputs(self, matrix: str, x: Tensor) -> Tensor:
        """[B, P, N, d_out], a convolution's positions in rows; [B, N, d_out] of a vector a row."""
        if x.dim() != 4:
            return super().outputs(matrix, x)
        conv = self.modules[matrix]
        maps = []
        for expert in self.experts:
            factor = expert.factors.get(matrix)
            # An expert that is absent contributes zeros of the same size.
            delta = torch.zeros_like(conv.weight) if factor is None else dense(factor.A, factor.B) * factor.scaling
            maps.append(nn.functional.conv2d(x, delta, None, conv.stride, conv.padding, conv.dilation))
        return torch.stack([in_rows(m) for m in maps], dim=-2)

    def _hook(self, site: Any, matrix: str) -> Any:
        def hook(_: nn.Module, args: Any, y: Tensor) -> Tensor:
            x = args[0]
            own = self.outputs(matrix, x)
            if site.name not in self.values:
                entry = torch.cat([self.outputs(m, x) for m in site.entry.matrices], dim=-1)
                self.values[site.name] = self.gate_of(site, x, entry)
            g = self.values[site.name]
            if x.dim() == 2:  # one vector a row has one position
                g = g[:, 0] if g.dim() == 3 else g
            elif g.dim() == 2:
                g = g[:, None]
            added = (g.unsqueeze(-1) * own).sum(-2)
            return y + (added.transpose(1, 2).reshape(y.shape) if y.dim() == 4 else added)

        return hook


class NaivePipelineGate(NaiveGate):
    """The gate from its definition on a pipeline, where every position counts; `model` holds the convolutions."""

    def __init__(self, mixture: Any, model: nn.Module, config: dict[str, Any]) -> None:
        super().__init__(mixture, {}, config, lambda: torch.empty(0))
        self.modules = dict(model.named_modules())
        self.raw = torch.empty(0)

    def __call__(self, site: Any, x: Tensor, outputs: Tensor) -> Tensor:
        self.raw = x
        if x.dim() == 4:
            # Under a stride, a gate sees the mean of what lies under each position of the output.
            stride = self.modules[site.entry.matrices[0]].stride
            x = in_rows(nn.functional.avg_pool2d(x, stride) if stride != (1, 1) else x)
        elif x.dim() == 2:
            x, outputs = x[:, None], outputs[:, None]
        return super().__call__(site, x, outputs)

    def _weight(self, site: Any, gate: Any, x: Tensor) -> Tensor:
        return torch.ones(x.shape[:2])

    def _ranks(self, site: Any, x: Tensor) -> Tensor:
        if self.raw.dim() != 4:
            return super()._ranks(site, x)
        (matrix,) = site.entry.matrices
        conv = self.modules[matrix]
        A = self.mixture.bank.stacked(matrix).A
        return in_rows(nn.functional.conv2d(self.raw, A, None, conv.stride, conv.padding, conv.dilation))


def dense(A: Tensor, B: Tensor) -> Tensor:
    """[c_out, c_in, k_h, k_w] of a convolution's factors, one rank at a time."""
    return torch.stack([B[:, r, None, None, None] * A[r] for r in range(len(A))]).sum(0)


def in_rows(maps: Tensor) -> Tensor:
    """[B, H*W, C] of [B, C, H, W]."""
    return torch.stack([maps[:, :, h, w] for h in range(maps.shape[2]) for w in range(maps.shape[3])], dim=1)
