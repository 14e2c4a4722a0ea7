"""Gates from their definition (MoLE, Eq. 9-11), one row at a time and one LoRA after the other: what all ways rest on.

Nothing is shared with the engine but the parameters and which matrices share a gate. Contents: NaiveGates.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from molecli.mixture.mixture import Mixture


class NaiveGates:
    """y = W x + Σ_i g_i s_i B_i (A_i x) on the base, for one row without padding and without cache.

    prompt: how many tokens at the beginning are the prompt; length: all of them; memory: those of the encoder, whose
    output is the prompt of an encoder-decoder's decoder.
    """

    def __init__(self, mixture: Mixture, model: Any, *, prompt: int, length: int, memory: int | None = None) -> None:
        self.mixture, self.model = mixture, model
        self.prompt, self.length, self.memory = prompt, length, memory
        self.values: dict[str, Tensor] = {}
        self.encoded: Tensor | None = None
        self.handles: list[Any] = []

    def __enter__(self) -> NaiveGates:
        modules = dict(self.model.named_modules())
        for site in self.mixture.sites:
            for matrix in site.matrices:
                self.handles.append(modules[matrix].register_forward_hook(self._hook(site, matrix)))
        if self.memory is not None:
            self.handles.append(self.model.get_encoder().register_forward_hook(self._keep))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _keep(self, _: nn.Module, __: Any, output: Any) -> None:
        self.encoded = output[0]

    def _hook(self, site: Any, matrix: str) -> Any:
        experts = self.mixture.bank.experts

        def hook(_: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
            x = args[0]
            rows = x.reshape(-1, x.shape[-1])  # one row of tokens, whatever the axes
            if site.name not in self.values:
                self.values[site.name] = self._gate(site, rows)
            g = self.values[site.name]  # [N], or [T, N] and nothing for what the model pads
            if g.dim() == 2 and len(g) < len(rows):
                g = torch.cat([g, g[-1:].expand(len(rows) - len(g), -1)])
            added = torch.zeros_like(y.reshape(len(rows), -1))
            for i, expert in enumerate(experts):
                factor = expert.factors[matrix]
                added += g[..., i, None] * (factor.scaling * ((rows @ factor.A.T) @ factor.B.T))
            return y + added.view_as(y)

        return hook

    def _gate(self, site: Any, rows: Tensor) -> Tensor:
        gate: Any = self.mixture.gate_modules()[site.name]
        encoder = site.stream in ("encoder", "memory")
        tokens = rows[: self.memory if encoder and self.memory else self.length]
        if gate.pool == "token":
            features = tokens
        elif gate.pool == "running":
            features = torch.stack([tokens[: t + 1].mean(0) for t in range(len(tokens))])
        elif self.memory is None:
            features = tokens[: self.prompt].mean(0)
        elif encoder:
            features = tokens.mean(0)
        else:
            assert self.encoded is not None
            features = self.encoded.reshape(-1, self.encoded.shape[-1])[: self.memory].mean(0)
        f = (features - gate.mean) / gate.std / math.sqrt(features.shape[-1])
        return torch.softmax((f @ gate.head.weight.T + gate.head.bias) / gate.log_temperature.exp(), -1)
