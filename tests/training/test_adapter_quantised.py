"""A new LoRA on quantised layers: its gradient is that on the true weights, or the layer is refused by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from packed import KINDS, pack, unpacked
from torch import Tensor, nn

from molecli.bases.causal import Causal
from molecli.config import AdapterConfig
from molecli.errors import UsageError
from molecli.protocols import Example
from molecli.training.adapter import adapted, trained_parameters

EXAMPLES = [Example("letters", f"say {letter}", letter.upper() * 2) for letter in "abcd"]


def gradients(backbone: Any) -> dict[str, Tensor]:
    """The gradients of a fresh LoRA whose B is not zero."""
    with adapted(backbone, AdapterConfig(rank=2), seed=0) as model:
        parameters = trained_parameters(model)
        assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        total, _ = backbone.token_loss(backbone.collate(EXAMPLES))
        total.backward()
        found = {name: parameter.grad for name, parameter in parameters.items()}
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in found.values())
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("kind", ["Columns", "Blocks8"])
def test_it_learns_through_quantised_layers(tiny_llama: Any, kind: str) -> None:
    model, twin = copy.deepcopy(tiny_llama.model), copy.deepcopy(tiny_llama.model)
    pack(model, kind, head=model.lm_head)
    for name, layer in model.named_modules():
        if type(layer).__name__ in KINDS:
            twin.get_submodule(name).weight = nn.Parameter(unpacked(layer), requires_grad=False)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    found, expected = (gradients(Causal(host, tiny_llama.tokenizer, "tiny")) for host in (model, twin))
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items() if value.dtype is torch.uint8)


def test_a_layer_that_peft_cannot_adapt_is_named(tiny_llama: Any) -> None:
    pack(tiny_llama.model, "Buffers", head=tiny_llama.model.lm_head)
    backbone = Causal(tiny_llama.model, tiny_llama.tokenizer, "tiny")
    with pytest.raises(UsageError) as caught, adapted(backbone, AdapterConfig(rank=2), seed=0):
        pass
    assert str(caught.value) == (
        "adapter.targets: PEFT has no LoRA layer for a Buffers. Leave it out, or use an unquantised base."
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_keeps_the_gradient_after_a_pass_without(tiny_folder: Any, bits: int) -> None:
    """On processors with AVX512-BF16 a pass without gradients would put the 4-bit layers in a form that has none."""
    pytest.importorskip("bitsandbytes")
    import transformers

    from molecli.bases.quantised import settled

    config = transformers.BitsAndBytesConfig(
        load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_compute_dtype=torch.float32
    )
    folder = tiny_folder("llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    backbone = Causal(settled(model, torch.float32), tokenizer, "tiny")
    first = gradients(backbone)
    with torch.no_grad():
        backbone.token_loss(backbone.collate(EXAMPLES))
    for name, gradient in gradients(backbone).items():
        torch.testing.assert_close(gradient, first[name])
