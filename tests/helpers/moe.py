"""Tiny random mixture-of-experts language models, LoRAs on their routed experts, and what PEFT computes with those.

MOES                    model_type -> (its configuration, what a LoRA is asked to adapt)
moe(kind)               a random model in eval mode
peft_logits(...)        the logits with a LoRA, by PEFT
by_hand(...)            the logits with updates added to the weights
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

from molecli.bases.fused import fused_places

IDS = torch.tensor([[5, 9, 23, 40, 7, 61], [8, 12, 61, 33, 18, 4]])
_SMALL = {
    "vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 32,
    "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}  # fmt: skip
_LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "head_dim": 8, "n_group": 1, "topk_group": 1,
}  # fmt: skip
_FUSED = ["experts.gate_up_proj", "experts.down_proj"]
_LINEAR = ["q_proj", "gate_proj", "up_proj", "down_proj"]
MOES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen3_moe": (
        {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        {"targets": "all-linear"},
    ),
    "mixtral": ({"num_local_experts": 4}, {"targets": ["q_proj", "w1", "w2", "w3", "gate"]}),
    "olmoe": ({"num_experts": 4, "num_experts_per_tok": 2}, {"targets": _LINEAR}),
    "gpt_oss": (
        {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
        {"targets": ["q_proj"], "target_parameters": [*_FUSED, "router.weight"]},
    ),
    "deepseek_v3": (
        _LATENT | {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1}
        | {"first_k_dense_replace": 1},
        {"targets": "all-linear"},
    ),
    "llama4_text": (
        {"head_dim": 8, "num_local_experts": 4, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 1},
        {"targets": ["q_proj"], "target_parameters": [*_FUSED, "router.weight"]},
    ),
    "granitemoe": (
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        {"targets": ["q_proj"], "target_parameters": [*_FUSED, "router.weight"]},
    ),
    "jetmoe": (
        {"num_local_experts": 4, "kv_channels": 8},
        {"targets": [], "target_parameters": ["input_linear.weight", "output_linear.weight"]},
    ),
    "nemotron_h": (
        {
            "head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1,
            "moe_shared_expert_intermediate_size": 16, "topk_group": 1, "layers_block_type": ["attention", "moe"],
            "ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 1,
        },
        {"targets": ["q_proj"], "target_parameters": ["experts.up_proj", "experts.down_proj"]},
    ),
}  # fmt: skip


def moe(kind: str) -> Any:
    """A random model with visible weights, in eval mode and frozen."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**_SMALL, **MOES[kind][0]})
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.2)
    return model


@torch.no_grad()
def peft_logits(model: nn.Module, folder: str | Path, ids: Tensor = IDS) -> Tensor:
    """The logits of a copy of the model with the LoRA, loaded by PEFT."""
    logits: Tensor = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).eval()(input_ids=ids).logits
    return logits


@torch.no_grad()
def by_hand(model: nn.Module, updates: Mapping[str, Tensor], ids: Tensor = IDS) -> Tensor:
    """The logits of a copy of the model with ΔW [d_out, d_in] added to the matrices of those names."""
    changed: Any = copy.deepcopy(model)
    places = fused_places(changed)
    for name, update in updates.items():
        weight = places[name].weight(changed) if name in places else changed.get_submodule(name).weight.detach()
        weight += update
    logits: Tensor = changed(input_ids=ids).logits
    return logits


def relative(ours: Tensor, theirs: Tensor) -> float:
    """‖ours − theirs‖ / ‖theirs‖."""
    return float((ours - theirs).double().norm() / theirs.double().norm())
