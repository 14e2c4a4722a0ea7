"""Random language models of any architecture of transformers, with random LoRAs and gates far from even on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from molecli.config import GateConfig
from molecli.experts import Expert, LowRank
from molecli.mixture.build import build_mixture
from molecli.mixture.mixture import Mixture

TOKENS = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip


def random_base(kind: str, *, seq2seq: bool = False, **settings: Any) -> Any:
    """A model of this kind; every matrix is random, so that nothing is zero by its initialisation."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**TOKENS, **settings})
    maker: Any = transformers.AutoModelForSeq2SeqLM if seq2seq else transformers.AutoModelForCausalLM
    model = maker.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.25)
    return model


def random_experts(model: nn.Module, ends: Sequence[str]) -> list[Expert]:
    """Two LoRAs on all linear layers whose names end so."""
    random = torch.Generator().manual_seed(1)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.endswith(tuple(ends))}
    assert layers

    def factors() -> dict[str, LowRank]:
        return {
            name: LowRank(
                0.3 * torch.randn(3, layer.in_features, generator=random),
                0.3 * torch.randn(layer.out_features, 3, generator=random),
                2.0,
            )
            for name, layer in layers.items()
        }

    return [Expert(name, factors()) for name in "ab"]


def random_mixture(model: nn.Module, ends: Sequence[str], *, mode: str = "gated", **gate: Any) -> Mixture:
    """Two LoRAs on the model with random gates, not attached yet; `gate` are fields of GateConfig."""
    made = build_mixture(model, random_experts(model, ends), mode=mode, gate=GateConfig(**gate) if gate else None)
    random = torch.Generator().manual_seed(5)
    for parameter in made.named_parameters().values():
        parameter.data = torch.randn(parameter.shape, generator=random)
    return made


def prompts(rows: int = 2, tokens: int = 9, *, padding: int = 3, seed: int = 3) -> tuple[Tensor, Tensor]:
    """(ids, mask) [rows, tokens]; the first row begins with `padding`."""
    ids = torch.randint(4, 90, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    ids[0, :padding] = mask[0, :padding] = 0
    return ids, mask


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())
