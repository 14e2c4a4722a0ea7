"""One architecture under test: its tiny model, two LoRAs that PEFT wrote for it, and what PEFT computes with them."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import peft
import torch
from gates import randomise
from torch import Tensor

from molecli.config import GateConfig
from molecli.mixture.attach import attach
from molecli.mixture.mixture import Mixture
from tests.conformance.models import Architecture, adapted, build

WEIGHTS = {"a": 0.7, "b": -0.5}
RANKS = {"a": 4, "b": 2}
# name of a mode in the table -> the arguments of `attach`.
FIXED: Mapping[str, Mapping[str, Any]] = {
    "linear": {"mode": "linear", "weights": WEIGHTS},
    "cat": {"mode": "cat", "weights": WEIGHTS},
}
GATED: Mapping[str, Mapping[str, Any]] = {
    f"{pool}/{granularity}": {"mode": "gated", "gate": GateConfig(pool=pool, granularity=granularity)}
    for pool, granularity in (("prompt", "block"), ("prompt", "matrix"), ("running", "block"), ("token", "matrix"))
}
MODES = {**FIXED, **GATED}


class Subject:
    """A row's model, and mixtures on it, each made once."""

    def __init__(self, row: Architecture, folder: Path) -> None:
        self.row, self.folder = row, folder
        self.model = build(row)
        self.matrices = adapted(row, self.model)
        self.loras = {name: self._write(name, seed) for seed, name in enumerate(RANKS)}
        self._mixtures: dict[str, Mixture] = {}

    @property
    def seq2seq(self) -> bool:
        return self.row.kind == "encoder-decoder"

    @contextmanager
    def mixed(self, mode: str) -> Iterator[Mixture]:
        """The model with both LoRAs composed in this mode; gates are far from uniform."""
        if mode not in self._mixtures:
            self._mixtures[mode] = self.anew(mode)
        with self._mixtures[mode] as mixture:
            yield mixture

    def anew(self, mode: str, **changes: Any) -> Mixture:
        """A new mixture with the same gates; `changes` replace arguments of `attach`."""
        model = changes.pop("model", self.model)
        mixture = attach(model, **{"loras": self.loras, **MODES[mode], **changes})
        randomise(mixture)
        return mixture

    @cached_property
    def peft(self) -> Any:
        """PEFT's model with adapters a, b and their weighted sum."""
        first, *others = self.loras
        # A copy, because PEFT puts its layers into the model; of one that no mixture is on.
        adapted: Any = peft.PeftModel.from_pretrained(copy.deepcopy(build(self.row)), self.loras[first], first)
        for name in others:
            adapted.load_adapter(self.loras[name], adapter_name=name)
        adapted.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "sum", combination_type="cat")
        return adapted.eval()

    def by_peft(self, adapter: str, **inputs: Tensor) -> Tensor:
        """The logits of PEFT's model with this adapter."""
        self.peft.set_adapter(adapter)
        with torch.no_grad():
            return self.peft(**inputs).logits

    @cached_property
    def assistant(self) -> Any:
        """A model that proposes tokens: the base, without LoRAs."""
        return build(self.row)

    def base_logits(self, inputs: Mapping[str, Any]) -> Tensor:
        """The logits of the base."""
        with torch.no_grad():
            return self.model(**inputs).logits

    def clean(self) -> bool:
        """Whether the model has no hooks; those that were left are removed, so that other cells are not disturbed."""
        hooks = [
            hooks for module in self.model.modules() for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]
        left = any(hooks)
        for found in hooks:
            found.clear()
        return not left

    def gradients(self, call: Any, *, between: bool) -> Tensor:
        """The gradient of a sum of logits by the outputs of the embeddings, and by all parameters of the gates."""
        batch = {**call.batch(), **call.decoder(2), "use_cache": False}
        seen: list[Tensor] = []

        def hook(_: Any, __: Any, output: Tensor) -> Tensor:
            seen.append(output.detach().requires_grad_())
            return seen[-1]

        parameters = list(self._mixtures[call.mode].named_parameters().values()) if call.mode else []
        embeddings = [module for module in self.model.modules() if isinstance(module, torch.nn.Embedding)]
        handles = [module.register_forward_hook(hook) for module in embeddings]
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                loss = self.model(**batch).logits.log_softmax(-1)[..., 7].sum()
                leaves = list(seen)
                if between:
                    self.model.eval()
                    call.generate(**call.batch())
                    self.model.train()
                found = torch.autograd.grad(loss, [*leaves, *parameters], allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()
        return torch.cat([torch.zeros(1) if g is None else g.flatten() for g in found])

    def _write(self, name: str, seed: int) -> str:
        pattern = "|".join(map(re.escape, self.matrices))
        kind = "SEQ_2_SEQ_LM" if self.seq2seq else "CAUSAL_LM"
        config = peft.LoraConfig(r=RANKS[name], lora_alpha=8, target_modules=f"({pattern})", task_type=kind)
        adapted = peft.get_peft_model(copy.deepcopy(self.model), config)
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in adapted.named_parameters():
            if "lora_" in key:  # B too: a zero B would let every comparison pass
                parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
        adapted.save_pretrained(str(self.folder / name))
        return str(self.folder / name)
