"""What `engine_cost.py` times: one frozen Llama with random weights, alone, under mole, and under PEFT.

Hosts share only the base's weights, so that all of them can exist at the same time and rounds can interleave them.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from molecli.adapters.write import write_peft
from molecli.config import GateConfig
from molecli.experts import Expert, LowRank
from molecli.functional.gating import balance_loss
from molecli.mixture.build import build_mixture

BALANCE = 0.01


@dataclass(frozen=True)
class Shape:
    """A Llama and the work on it; all its linear layers except the head are adapted."""

    layers: int
    width: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int
    rank: int
    batch: int
    tokens: int
    decode_tokens: int

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """{matrix: (d_out, d_in)} of one layer."""
        kv = self.width // self.heads * self.kv_heads
        attention = {"q_proj": self.width, "k_proj": kv, "v_proj": kv, "o_proj": self.width}
        return {f"self_attn.{name}": (d_out, self.width) for name, d_out in attention.items()} | {
            "mlp.gate_proj": (self.ffn, self.width),
            "mlp.up_proj": (self.ffn, self.width),
            "mlp.down_proj": (self.width, self.ffn),
        }

    def floor(self, experts: int) -> float:
        """The multiplications of a forward pass with stacked experts, divided by those of the base."""
        dense = sum(d_out * d_in for d_out, d_in in self.matrices.values()) + 2 * self.tokens * self.width
        low_rank = experts * self.rank * sum(d_out + d_in for d_out, d_in in self.matrices.values())
        return 1 + self.layers * low_rank / (self.layers * dense + self.width * self.vocab)


SHAPES = {
    "smol": Shape(30, 576, 1536, 9, 3, 49152, rank=8, batch=4, tokens=64, decode_tokens=32),
    "engine": Shape(16, 2048, 5504, 16, 16, 32000, rank=16, batch=8, tokens=512, decode_tokens=32),
    "tiny": Shape(2, 32, 64, 4, 2, 64, rank=2, batch=2, tokens=8, decode_tokens=4),
}


@dataclass
class Host:
    """A model that can be timed.

    loss: builds the graph of one training step; clear: drops its gradients; extra_bytes: memory besides the base.
    """

    name: str
    experts: int
    model: nn.Module
    batch: dict[str, Tensor]
    loss: Callable[[], Tensor] | None = None
    extra_bytes: int = 0
    clear: Callable[[], None] = lambda: None

    def forward(self) -> Tensor:
        """Logits of the batch."""
        with torch.no_grad():
            return self.model(input_ids=self.batch["input_ids"], use_cache=False).logits

    def step(self) -> None:
        """Forward and backward to the trained parameters, without the optimiser (for all hosts)."""
        assert self.loss is not None
        self.loss().backward()
        self.clear()

    def prefill(self) -> None:
        """Runs the prompt into a new cache; called before each `decode`."""
        with torch.no_grad():
            self._cache = self.model(input_ids=self.batch["input_ids"], use_cache=True).past_key_values

    def decode(self, tokens: int) -> None:
        """Greedy tokens, one at a time, with the cache from `prefill`."""
        token = self.batch["input_ids"][:, -1:]
        with torch.no_grad():
            for _ in range(tokens):
                logits = self.model(input_ids=token, past_key_values=self._cache, use_cache=True).logits
                token = logits[:, -1:].argmax(-1)
        del self._cache


def make_model(shape: Shape, *, device: str, dtype: torch.dtype, seed: int) -> nn.Module:
    """The frozen base."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.width,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.tokens + shape.decode_tokens,
        tie_word_embeddings=True,
        use_cache=False,  # X-LoRA refuses a model that caches by default
    )
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config)
    return model.to(dtype).eval().requires_grad_(False)


def make_batch(shape: Shape, *, device: str, seed: int) -> dict[str, Tensor]:
    """Random tokens, the second half of each sequence scored."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, shape.vocab, (shape.batch, shape.tokens), generator=generator)
    labels = ids.clone()
    labels[:, : shape.tokens // 2] = -100
    return {"input_ids": ids.to(device), "labels": labels.to(device)}


def make_experts(shape: Shape, count: int, *, dtype: torch.dtype, seed: int) -> list[Expert]:
    """Random LoRAs named 0, 1, ..: X-LoRA's loader requires these names."""
    generator = torch.Generator().manual_seed(seed)

    def random(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns, generator=generator) / columns**0.5).to(dtype)

    experts = []
    for i in range(count):
        factors = {
            f"model.layers.{layer}.{matrix}": LowRank(random(shape.rank, d_in), 0.1 * random(d_out, shape.rank), 2.0)
            for layer in range(shape.layers)
            for matrix, (d_out, d_in) in shape.matrices.items()
        }
        experts.append(Expert(str(i), factors, rank=shape.rank, alpha=2.0 * shape.rank))
    return experts


def base_host(model: nn.Module, batch: dict[str, Tensor]) -> Host:
    """The base alone; its backward pass goes through the activations to the embedded tokens."""
    model = _sharing(model)

    def loss() -> Tensor:
        embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()  # type: ignore[operator]
        return model(inputs_embeds=embedded, labels=batch["labels"], use_cache=False).loss

    return Host("base", 0, model, batch, loss)


def mole_host(
    model: nn.Module, batch: dict[str, Tensor], experts: Sequence[Expert], gate: GateConfig, name: str
) -> Host:
    """Gated by mole; its step trains the gates, with the balance loss."""
    model = _sharing(model)
    mixture = build_mixture(model, experts, mode="gated", gate=gate)
    mixture.attach()
    parameters = list(mixture.named_parameters().values())

    def loss() -> Tensor:
        task = model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss
        return task + BALANCE * balance_loss(mixture.stacked_gates().mean((0, 1)))

    def clear() -> None:
        for parameter in parameters:
            assert parameter.grad is not None, "a gate without a gradient would make the step look cheap"
            parameter.grad = None

    return Host(name, len(experts), model, batch, loss, _bytes_of(experts, model), clear)


def peft_host(model: nn.Module, batch: dict[str, Tensor], experts: Sequence[Expert]) -> Host:
    """PEFT's LoraModel with every adapter active: their sum, each in its own pass (no gates, so no step)."""
    import peft

    model = _sharing(model)
    config = peft.LoraConfig(r=experts[0].rank, lora_alpha=experts[0].alpha, target_modules=_leaves(experts))  # type: ignore[arg-type]
    tuner = peft.LoraModel(model, config, experts[0].name)
    for expert in experts[1:]:
        tuner.peft_config[expert.name] = replace(config)
        tuner.inject_adapter(model, expert.name)
    with torch.no_grad():
        for expert in experts:
            for matrix, factor in expert.factors.items():
                layer: Any = model.get_submodule(matrix)
                layer.lora_A[expert.name].weight.copy_(factor.A)
                layer.lora_B[expert.name].weight.copy_(factor.B)
    tuner.set_adapter([expert.name for expert in experts])
    return Host("PEFT, all adapters active", len(experts), model.eval(), batch, None, _bytes_of(experts, model))


def xlora_host(
    model: nn.Module, batch: dict[str, Tensor], experts: Sequence[Expert], folder: Path, *, cast: bool
) -> Host:
    """PEFT's X-LoRA with its own classifier: two passes; its step trains the classifier.

    PEFT keeps adapters in float32; `cast` converts them to the base's dtype, which is faster.
    """
    import peft

    model = _sharing(model)
    task = "CAUSAL_LM"
    paths = {e.name: str(write_peft(folder / e.name, e.factors, "-", task_type=task, replace=True)) for e in experts}
    width: int = model.config.hidden_size  # type: ignore[union-attr,assignment]
    config = peft.XLoraConfig(task_type=task, hidden_size=width, adapters=paths)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, config).eval()  # type: ignore[arg-type]
    dtype = next(model.parameters()).dtype
    named = dict(wrapped.named_parameters())
    trained = [parameter for name, parameter in named.items() if "classifier" in name]

    def freeze() -> None:
        for name, parameter in named.items():
            parameter.requires_grad_("classifier" in name)

    for parameter in named.values() if cast else ():
        parameter.data = parameter.data.to(dtype)
    freeze()
    # PEFT calls this between the passes; some releases freeze the classifier too, which then trains nothing.
    wrapped.base_model._maybe_freeze_all_adapters = freeze  # type: ignore[assignment,union-attr]

    def loss() -> Tensor:
        return wrapped(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss

    def clear() -> None:
        assert any(parameter.grad is not None for parameter in trained)
        for parameter in trained:
            parameter.grad = None

    stored = next(parameter.dtype for name, parameter in named.items() if ".lora_A." in name)
    name = "PEFT X-LoRA" if dtype == torch.float32 else f"PEFT X-LoRA, adapters in {str(stored)[6:]}"
    wider = stored.itemsize // dtype.itemsize
    return Host(name, len(experts), wrapped, batch, loss, wider * _bytes_of(experts, model), clear)


def _sharing(model: nn.Module) -> nn.Module:
    """A copy of the modules on the same tensors."""
    tensors: Iterable[Tensor] = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _bytes_of(experts: Sequence[Expert], model: nn.Module) -> int:
    width = next(model.parameters()).element_size()
    return width * sum(f.A.numel() + f.B.numel() for e in experts for f in e.factors.values())


def _leaves(experts: Sequence[Expert]) -> list[str]:
    return sorted({matrix.rpartition(".")[2] for matrix in experts[0].factors})
