"""torch.compile before attaching and while attached: the results are those of the model that was never compiled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from molecli.config import GateConfig
from molecli.mixture.attach import attach
from molecli.mixture.build import build_mixture
from molecli.mixture.layout import adaptable_matrices, host_of
from tests.helpers.gates import randomise
from tests.helpers.tiny_pipelines import attention_only, build_pipeline, close, make_expert

IDS = torch.tensor([[0, 0, 9, 23, 40, 7], [8, 12, 61, 33, 18, 5]])
MASK = (IDS != 0).long()


def whole(model: Any) -> None:
    model.compile(backend="eager")


def forward(model: Any) -> None:
    model.forward = torch.compile(model.forward, backend="eager")


def blocks(model: Any) -> None:
    for layer in model.model.layers:
        layer.compile(backend="eager")


@pytest.fixture
def loras(make_peft_adapter: Callable[..., Any], tiny_llama: Any, tmp_path: Path) -> dict[str, str]:
    for seed, name in enumerate("ab"):
        make_peft_adapter(tiny_llama.model, tmp_path / name, seed=seed, targets=["q_proj", "up_proj"])
    return {name: str(tmp_path / name) for name in "ab"}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=MASK).logits


def mixed(model: Any, loras: dict[str, str], mode: str, then: Callable[[Any], None] | None = None) -> list[Tensor]:
    """The logits with all experts, without one, and with all again."""
    with attach(model, loras=loras, mode=mode) as mixture:
        randomise(mixture)
        if then is not None:
            then(model)
        found = [logits(model)]
        mixture.mask("a")
        found.append(logits(model))
        mixture.mask()
        return [*found, logits(model)]


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("mode", "compile", "when"),
    [
        ("linear", whole, "before"),
        ("linear", blocks, "while"),
        *(
            pytest.param(mode, compile, when, marks=SLOW)
            for mode in ("linear", "gated")
            for compile in (whole, forward, blocks)
            for when in ("before", "while")
        ),
    ],
)
def test_compiled_models_compute_the_mixture(
    make_tiny: Any, loras: dict[str, str], mode: str, compile: Any, when: str
) -> None:
    model = make_tiny("llama").model
    plain, expected = logits(model), mixed(model, loras, mode)
    if when == "before":
        compile(model)
        torch.testing.assert_close(logits(model), plain)
    found = mixed(model, loras, mode, compile if when == "while" else None)
    for ours, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(model), plain)
    torch._dynamo.reset()


@SLOW
@pytest.mark.parametrize("pool", ["prompt", "running", "token"])
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compiled_generation(make_tiny: Any, loras: dict[str, str], pool: Any, backend: str) -> None:
    model = make_tiny("llama").model

    def generated(compiled: Any) -> Tensor:
        with attach(model, loras=loras, mode="gated", gate=GateConfig(pool=pool)) as mixture:
            randomise(mixture)
            return compiled.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=5, do_sample=False)

    expected = generated(model)
    assert torch.equal(generated(torch.compile(model, backend=backend)), expected)
    torch._dynamo.reset()


@SLOW
@pytest.mark.parametrize("mode", ["linear", "soup", "gated", "switch", "composite"])
@pytest.mark.parametrize("how", ["whole", "wrapped", "blocks", "while"])
def test_compiled_unets(mode: str, how: str) -> None:
    def composed(pipe: Any, then: bool = False) -> Tensor:
        model = host_of(pipe)
        matrices = adaptable_matrices(model)
        experts = [make_expert(name, matrices, seed=seed, keep=attention_only) for seed, name in enumerate("ab")]
        with build_mixture(model, experts, mode=mode):
            if then:
                pipe.unet.compile(backend="eager")
            return drawn(pipe)

    pipe = build_pipeline("sd")
    plain, expected = drawn(pipe), composed(pipe)
    if how == "whole":
        pipe.unet.compile(backend="eager")
    elif how == "wrapped":
        pipe.unet = torch.compile(pipe.unet, backend="eager")
    elif how == "blocks":
        pipe.unet.compile_repeated_blocks(backend="eager")
    assert close(drawn(pipe), plain, 1e-5)
    assert close(composed(pipe, how == "while"), expected, 1e-5)
    assert close(drawn(pipe), plain, 1e-5)
    torch._dynamo.reset()


def drawn(pipe: Any) -> Tensor:
    return pipe(
        "a cat", num_inference_steps=2, guidance_scale=3.0, generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images  # fmt: skip
