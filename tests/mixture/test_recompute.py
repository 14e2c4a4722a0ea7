"""Gradient checkpointing: gates get the same gradients, also if a generation runs before the backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from molecli.errors import RunError
from tests.helpers.language_bases import LLAMA, prompts, random_base, random_mixture

IDS, MASK = prompts()
LABELS = IDS.masked_fill(torch.arange(9) < 5, -100)
T5 = {
    "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0,
    "dropout_rate": 0.0,
}  # fmt: skip
BASES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "llama": (LLAMA, ("q_proj", "v_proj", "up_proj")),
    "t5": (T5, ("q", "v", "wi")),
}


def passed(model: Any, ids: Tensor = IDS, mask: Tensor = MASK) -> Tensor:
    labels = LABELS[: len(ids)] if not model.config.is_encoder_decoder else ids[:, :4].contiguous()
    loss: Tensor = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
    return loss


def gradients(model: Any, mixture: Any, *, generate: bool = False) -> dict[str, Tensor]:
    parameters = mixture.named_parameters()
    for parameter in parameters.values():
        parameter.grad = None
    with mixture:
        loss = passed(model.train())
        if generate:
            model.eval().generate(input_ids=IDS[:1, 3:], max_new_tokens=3, min_new_tokens=3, do_sample=False)
            model.train()
        loss.backward()
    return {name: parameter.grad.clone() for name, parameter in parameters.items() if parameter.grad is not None}


@pytest.mark.parametrize("generate", [False, True])
@pytest.mark.parametrize(
    "gate", [{}, {"pool": "running"}, {"granularity": "network"}, {"pool": "token", "granularity": "matrix"}]
)
@pytest.mark.parametrize("kind", BASES)
def test_layers_computed_again_give_the_same_gradients(kind: str, gate: dict[str, Any], generate: bool) -> None:
    settings, ends = BASES[kind]
    model = random_base(kind, seq2seq=kind == "t5", **settings)
    mixture = random_mixture(model, ends, **gate)
    expected = gradients(model, mixture)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    found = gradients(model, mixture, generate=generate)
    assert found.keys() == expected.keys() == mixture.named_parameters().keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()) + 1e-7)


def test_reentrant_checkpoints_give_the_same_gradients_or_are_refused() -> None:
    model = random_base("llama", **LLAMA)
    expected = gradients(model, random_mixture(model, BASES["llama"][1]))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    for generate in (False, True):
        found = gradients(model, random_mixture(model, BASES["llama"][1]), generate=generate)
        assert all(torch.allclose(found[name], expected[name], rtol=1e-4, atol=1e-6) for name in expected)
    with pytest.raises(RunError, match="a gate that several layers share would get no gradient from them"):
        gradients(model, random_mixture(model, BASES["llama"][1], granularity="network"))


def test_two_passes_before_one_backward_pass_are_refused() -> None:
    model = random_base("llama", **LLAMA)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    with random_mixture(model, BASES["llama"][1]):
        both = passed(model) + passed(model, IDS[:1], MASK[:1])
        with pytest.raises(RunError, match="several passes were made before this backward pass"):
            both.backward()
        passed(model).backward()  # one after the other
        passed(model).backward()
    with random_mixture(model, BASES["llama"][1], mode="linear"):
        (passed(model) + passed(model, IDS[:1], MASK[:1])).backward()
