"""A new LoRA on a mixture-of-experts base: exactly the layers asked for, in a folder that PEFT loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from moe import IDS, moe, peft_logits, relative

from molecli.adapters import LoraSpec, read_expert
from molecli.bases.causal import Causal
from molecli.config import AdapterConfig, BaseConfig
from molecli.mixture.attach import attach
from molecli.mixture.layout import adaptable_matrices
from molecli.text.train_lora import write_adapter
from molecli.training.adapter import adapted, left_out, trained_parameters


@pytest.mark.parametrize("kind", ["deepseek_v3", "llama4_text", "gpt_oss"])
def test_all_linear_is_all_linear_layers_and_peft_loads_it(kind: str, tmp_path: Path, tiny_llama: Any) -> None:
    model = moe(kind)
    backbone = Causal(model, tiny_llama.tokenizer)
    base = model(input_ids=IDS).logits
    with adapted(backbone, AdapterConfig(rank=2), seed=0) as trained:
        for parameter in trained_parameters(trained).values():
            parameter.data.normal_(0, 0.3)
        with torch.no_grad():
            wanted = trained(input_ids=IDS).logits
        write_adapter(trained, tmp_path, BaseConfig(id="x"))
    assert torch.equal(model(input_ids=IDS).logits, base)
    expert = read_expert(LoraSpec("x", str(tmp_path)), adaptable_matrices(model))
    assert set(expert.factors) == set(backbone.matrices())
    assert relative(wanted, base) > 0.1
    assert relative(peft_logits(model, tmp_path), wanted) < 1e-5
    with torch.no_grad(), attach(model, loras={"x": str(tmp_path)}):
        assert relative(model(input_ids=IDS).logits, wanted) < 1e-5


def test_dropout_on_a_layer_that_peft_takes_for_an_experts_is_refused(tiny_llama: Any, explained: Any) -> None:
    backbone = Causal(moe("deepseek_v3"), tiny_llama.tokenizer)
    config = AdapterConfig(rank=2, dropout=0.1)
    explained(
        lambda: adapted(backbone, config, seed=0).__enter__(),
        2,
        "adapter.dropout: PEFT takes model.layers.0.mlp.gate_proj for a layer of routed experts, unless it is adapted "
        "without dropout. Write 0, or leave that layer out of --targets.",
    )
    with adapted(backbone, config, seed=0, targets=["model.layers.0.self_attn.q_b_proj"]):
        pass


def test_what_all_linear_leaves_out_is_said(tiny_llama: Any) -> None:
    model = moe("gpt_oss")
    count = 2 * 4 * (32 * 48 + 24 * 32)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert left_out(model, "all-linear") == (
        "all-linear leaves out the weights of the routed experts, which have no linear layers (such as "
        f"model.layers.0.mlp.experts.down_proj): {count:,} of the base's {total:,} parameters"
    )
    assert left_out(model, "q_proj") is None
    assert left_out(tiny_llama.model, "all-linear") is None
