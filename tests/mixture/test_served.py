"""A matrix that a pass bypasses is an error; one that was rightly not called, with the module around it, is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from molecli.errors import RunError
from molecli.mixture.attach import attach
from molecli.mixture.build import sum_of
from tests.helpers.tiny_pipelines import attention_only, build_pipeline, close, make_expert

IDS = torch.tensor([[9, 23, 40, 7], [8, 12, 61, 33]])


@pytest.fixture
def lora(make_peft_adapter: Callable[..., Any], tmp_path: Path) -> Callable[..., dict[str, str]]:
    def make(model: Any, *targets: str) -> dict[str, str]:
        make_peft_adapter(model, tmp_path / "a", targets=list(targets))
        return {"a": str(tmp_path / "a")}

    return make


def from_weights(module: nn.Linear) -> Callable[[Tensor], Tensor]:
    """What custom kernels do: the layer's product without a call of the layer."""
    return lambda x: F.linear(x, module.weight, module.bias)


class Unhooked(nn.Module):
    """An MLP that computes its `up_proj` from the weight."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * from_weights(self.up_proj)(x))


@pytest.mark.parametrize("mode", ["linear", "soup", "gated"])
def test_a_layer_computed_from_its_weight_is_named(tiny_llama: Any, lora: Any, mode: str) -> None:
    model = tiny_llama.model
    loras = lora(model, "q_proj", "up_proj")
    block = model.model.layers[0]
    was, block.mlp = block.mlp, Unhooked(block.mlp)
    plain = model(IDS).logits
    with attach(model, loras=loras, mode=mode), pytest.raises(RunError) as error:
        model(IDS)
    count = 2 * len(model.model.layers)
    assert str(error.value) == (
        f"mixture: 1 of the {count} matrices that the LoRAs adapt were bypassed, such as model.layers.0.mlp.up_proj: "
        "the model computed with them in another way than by calling them, so the LoRAs had no effect there. Undo what "
        "replaces these calls (fused layers, custom kernels) and attach again, or adapt other matrices."
    )
    assert torch.equal(model(IDS).logits, plain)
    block.mlp = was
    with attach(model, loras=loras, mode=mode):
        model(IDS)


def test_a_model_whose_layers_are_not_called_at_all_is_an_error(tiny_llama: Any, lora: Any) -> None:
    model = tiny_llama.model
    loras = lora(model, "q_proj")
    model.model.forward = lambda *_, **__: transformers.modeling_outputs.BaseModelOutputWithPast(torch.zeros(2, 4, 32))
    try:
        with attach(model, loras=loras), pytest.raises(RunError, match="without calling any of the"):
            model(IDS)
    finally:
        del model.model.forward


def test_a_layer_that_is_dropped_is_no_error(tiny_llama: Any, lora: Any) -> None:
    model = tiny_llama.model
    loras = lora(model, "q_proj", "up_proj")
    _, *others = model.model.layers
    with attach(model, loras=loras):
        kept = model.model.layers
        model.model.layers = nn.ModuleList(others)
        model(IDS, use_cache=False)
        model.model.layers = kept
        model(IDS, use_cache=False)


def test_cached_keys_of_the_encoder_are_no_error(tiny_t5: Any, lora: Any) -> None:
    model = tiny_t5.model
    with attach(model, loras=lora(model, "k", "v")):
        out = model.generate(IDS, max_new_tokens=4, min_new_tokens=4)
    assert out.shape[1] == 5
    cross = [
        f"decoder.block.{i}.layer.1.EncDecAttention.{leaf}" for i in range(len(model.decoder.block)) for leaf in "kv"
    ]
    with attach(model, loras=lora(model, *cross)):
        model.generate(IDS, max_new_tokens=4, min_new_tokens=4)


def test_the_masked_mixture_asks_nothing_of_the_model(tiny_llama: Any, lora: Any) -> None:
    model = tiny_llama.model
    with attach(model, loras=lora(model, "q_proj")) as mixture:
        mixture.mask("a")
        model(IDS)


# -- pictures --------------------------------------------------------------------------------------------------------


def drawn(pipe: Any) -> Tensor:
    return pipe(
        "a cat", num_inference_steps=2, guidance_scale=3.0, generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images  # fmt: skip


@pytest.mark.parametrize("mode", ["linear", "soup", "gated", "switch", "composite"])
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_fused_projections_are_served(kind: str, mode: str) -> None:
    """diffusers computes queries, keys and values in one layer; in cross-attention keys and values."""
    from molecli.mixture.build import build_mixture
    from molecli.mixture.layout import adaptable_matrices, host_of

    def composed(pipe: Any) -> Tensor:
        model = host_of(pipe)
        matrices = adaptable_matrices(model)
        experts = [
            make_expert("a", matrices, keep=attention_only),
            # One that adapts only some of the layers that are fused.
            make_expert("b", matrices, seed=1, keep=lambda name: name.endswith(("to_v", "to_out.0", "proj_in"))),
        ]
        with build_mixture(model, experts, mode=mode):
            return drawn(pipe)

    pipe = build_pipeline(kind)
    expected = composed(pipe)
    pipe.unet.fuse_qkv_projections()
    assert close(composed(pipe), expected, 1e-5)
    pipe.unet.unfuse_qkv_projections()
    assert torch.equal(composed(pipe), expected)


def test_projections_fused_under_an_attached_mixture_are_an_error() -> None:
    from molecli.mixture.layout import adaptable_matrices, host_of

    pipe = build_pipeline("sd")
    model = host_of(pipe)
    with sum_of(model, [make_expert("a", adaptable_matrices(model), keep=attention_only)]):
        pipe.unet.fuse_qkv_projections()
        with pytest.raises(RunError, match=r"were bypassed, such as unet\.\S+\.attn1\.to_q"):
            drawn(pipe)
