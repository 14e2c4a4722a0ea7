"""Language models in multimodal ones: PEFT's own result, each row as alone, generation as in training, or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from molecli.bases.language import outside_text, position_limit
from molecli.config import GateConfig
from molecli.errors import UsageError
from molecli.mixture.attach import attach

TEXT = {
    "vocab_size": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
PICTURE = {"image_size": 28, "patch_size": 14}
QWEN_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
LLAMA4_VISION = {**VISION, **PICTURE, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}
# class -> (model_type, the text part's settings, the vision part's)
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "Gemma3ForConditionalGeneration": ("gemma3", TEXT, {**VISION, **PICTURE}),
    "Mistral3ForConditionalGeneration": (
        "mistral3",
        {"model_type": "mistral", **TEXT},
        {"model_type": "pixtral", "head_dim": 8, **VISION, **PICTURE},
    ),
    "Llama4ForConditionalGeneration": (
        "llama4",
        {**TEXT, "intermediate_size_mlp": 48, "num_local_experts": 2, "num_experts_per_tok": 1},
        LLAMA4_VISION,
    ),
    "Qwen2_5_VLForConditionalGeneration": ("qwen2_5_vl", {**TEXT, "rope_parameters": ROPE}, QWEN_VISION),
    "Qwen3_5ForConditionalGeneration": ("qwen3_5", {**TEXT, **LINEAR_ATTENTION}, QWEN_VISION),
}
IDS = torch.tensor([[0, 0, 9, 23, 40, 7], [8, 12, 61, 33, 18, 5]])
MASK = (IDS != 0).long()
NEW = 4


def build(kind: str) -> Any:
    """A random model, the same each time."""
    model_type, text, vision = MODELS[kind]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, text_config=text, vision_config=vision)
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.2)
    return model


def linear(model: nn.Module, *, text: bool) -> list[str]:
    """Attention projections of the language model, or of the other parts."""
    every = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(("q_proj", "v_proj", "qkv"))
    ]
    return [name for name in every if ("language_model" in name) == text]


@pytest.fixture(params=list(MODELS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def adapters(make_peft_adapter: Callable[..., Any], tmp_path: Path) -> Callable[..., dict[str, str]]:
    def make(model: Any, *, text: bool = True) -> dict[str, str]:
        for seed, name in enumerate("ab"):
            make_peft_adapter(model, tmp_path / name, seed=seed, targets=linear(model, text=text))
        return {name: str(tmp_path / name) for name in "ab"}

    return make


def randomised(mixture: Any) -> None:
    """Gates that differ between inputs."""
    torch.manual_seed(5)
    with torch.no_grad():
        for gate in mixture.gate_modules().values():
            for parameter in gate.parameters():
                parameter.normal_(0, 1)


def logits(model: Any, ids: Tensor, **more: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


def test_the_width_and_the_limit_are_the_language_models(kind: str) -> None:
    assert position_limit(build(kind)) == 128


def test_one_lora_is_pefts(kind: str, adapters: Any) -> None:
    model = build(kind)
    loras = adapters(model)
    plain = logits(model, IDS, attention_mask=MASK)
    with attach(model, loras={"a": loras["a"]}):
        ours = logits(model, IDS, attention_mask=MASK)
    assert torch.equal(logits(model, IDS, attention_mask=MASK), plain)
    theirs = logits(peft.PeftModel.from_pretrained(build(kind), loras["a"]).eval(), IDS, attention_mask=MASK)
    real = MASK.bool()
    torch.testing.assert_close(ours[real], theirs[real], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ours[real], plain[real], atol=1e-2)


@pytest.mark.parametrize("granularity", ["network", "block", "layer", "matrix"])
def test_gates_of_a_batch_are_those_of_each_row_and_stay_in_generation(
    kind: str, granularity: Any, adapters: Any
) -> None:
    model = build(kind)
    with attach(model, loras=adapters(model), mode="gated", gate=GateConfig(granularity=granularity)) as mixture:
        randomised(mixture)
        together = logits(model, IDS, attention_mask=MASK)
        assert any(not torch.allclose(value[0], value[1], atol=1e-3) for value in mixture.gates().values())
        alone = logits(model, IDS[:1, 2:])
        torch.testing.assert_close(together[:1, 2:], alone, rtol=1e-4, atol=1e-4)
        out = model.generate(
            input_ids=IDS,
            attention_mask=MASK,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        mask = torch.cat([MASK, torch.ones(2, NEW, dtype=torch.long)], 1)
        labels = out.sequences.clone()
        labels[:, : IDS.shape[1]] = -100
        taught = logits(model, out.sequences, attention_mask=mask, labels=labels, use_cache=False)
    torch.testing.assert_close(torch.stack(out.logits, 1), taught[:, IDS.shape[1] - 1 : -1], rtol=1e-4, atol=1e-4)


def test_gates_are_refused_where_no_prompt_is_read(kind: str, adapters: Any) -> None:
    model = build(kind)
    loras = adapters(model, text=False)
    first = linear(model, text=False)[0]
    assert outside_text(model, linear(model, text=True)) == []
    with pytest.raises(UsageError) as error:
        attach(model, loras=loras, mode="gated")
    assert str(error.value) == (
        f"--mode gated: gates weigh LoRAs by the prompt, and a LoRA adapts {first}, which does not read the prompt's "
        "tokens. Use LoRAs of the language model alone, or --mode linear."
    )


def test_weights_that_read_nothing_may_be_anywhere(kind: str, adapters: Any) -> None:
    model = build(kind)
    loras = adapters(model, text=False)
    for how in ({"mode": "linear"}, {"mode": "soup"}, {"mode": "gated", "gate": GateConfig(input="none")}):
        with attach(model, loras=loras, **how):
            assert logits(model, IDS, attention_mask=MASK).isfinite().all()
