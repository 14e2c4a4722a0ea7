"""Experts compute where, and in the type in which, the base's layers do, wherever their weights are between calls."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from gates import close, randomise
from pipeline_shapes import SHAPES
from tiny_pipelines import make_expert
from torch import Tensor, nn

from molecli.adapters import write_diffusers
from molecli.bases.pipeline import PipelineModules, pipeline_matrices
from molecli.experts import Expert
from molecli.functional.fingerprint import fingerprint, same_base
from molecli.functional.wrapped import device_of
from molecli.mixture.attach import attach
from molecli.mixture.build import build_mixture
from molecli.mixture.layout import adaptable_matrices
from molecli.mixture.mixture import Mixture

CPU = torch.device("cpu")
MODES = ("linear", "nla", "gated", "ties", "composite")


def sequential(pipe: Any) -> None:
    """As `enable_sequential_cpu_offload`, with the CPU as the device that computes: weights are on meta in between."""
    for part in modules(pipe):
        accelerate.cpu_offload(part, execution_device=CPU)


def grouped(pipe: Any, kind: str = "leaf_level", **settings: Any) -> None:
    pipe.unet.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type=kind, **settings)


def by_block(pipe: Any) -> None:
    grouped(pipe, "block_level", num_blocks_per_group=1)


def by_model(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def modules(pipe: Any) -> list[nn.Module]:
    return [part for part in pipe.components.values() if isinstance(part, nn.Module)]


def made(pipe: Any, mode: str) -> Mixture:
    matrices = pipeline_matrices(PipelineModules(pipe))
    experts = [make_expert(name, matrices, seed=i, scale=0.1) for i, name in enumerate("ab")]
    mixture = build_mixture(PipelineModules(pipe), experts, mode=mode)
    if mixture.named_parameters():
        randomise(mixture, sharpness=1.0)
    return mixture


def drawn(shape: str, mode: str, change: Callable[[Any], None], *, inside: bool) -> Tensor:
    pipe, call = SHAPES[shape]()
    if not inside:
        change(pipe)
    with made(pipe, mode):
        if inside:
            change(pipe)
        return call(pipe)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change", [sequential, grouped, by_block, by_model])
def test_offloaded_weights_change_nothing(change: Callable[[Any], None], mode: str) -> None:
    expected = drawn("sd", mode, lambda pipe: None, inside=False)
    for inside in (False, True):
        assert torch.equal(drawn("sd", mode, change, inside=inside), expected)


def cast(pipe: Any) -> None:
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def rounded(pipe: Any) -> None:
    """The values that the casting stores, in float32."""
    shown, _ = SHAPES["sd"]()
    cast(shown)
    for name, module in shown.unet.named_modules():
        if any(p.dtype == torch.float8_e4m3fn for p in module.parameters(recurse=False)):
            for parameter in pipe.unet.get_submodule(name).parameters(recurse=False):
                parameter.data = parameter.data.to(torch.float8_e4m3fn).float()


@pytest.mark.parametrize("mode", MODES)
def test_weights_stored_in_eight_bits_compute_in_their_own_type(mode: str) -> None:
    expected = drawn("sd", mode, rounded, inside=False)
    for inside in (False, True):
        assert close(drawn("sd", mode, cast, inside=inside), expected, 1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_a_pipeline_can_change_its_type_after_experts_are_attached(mode: str) -> None:
    def halved(pipe: Any) -> None:
        pipe.to(torch.bfloat16)

    assert torch.equal(drawn("sd", mode, halved, inside=True), drawn("sd", mode, halved, inside=False))


def test_autocast_is_that_of_diffusers_own_loras(tmp_path: Path) -> None:
    pipe, call = SHAPES["sd"]()
    other, _ = SHAPES["sd"]()
    expert = make_expert("a", pipeline_matrices(PipelineModules(pipe)), scale=0.1)
    folder = str(write_diffusers(tmp_path, expert.factors))
    other.load_lora_weights(folder, adapter_name="a")
    with torch.autocast("cpu", torch.bfloat16):
        expected = call(other)
        with attach(pipe, loras={"a": folder}, mode="linear"):
            found = call(pipe)
    assert close(found, expected, 3e-2)  # bfloat16 has 8 bits
    assert found.dtype == expected.dtype


@pytest.mark.parametrize("mode", ["linear", "nla", "composite"])
def test_experts_follow_the_unet_to_the_device_of_the_call(mode: str) -> None:
    """The meta device stands for an accelerator, to which the hook moves the UNet for its call."""
    pipe, _ = SHAPES["sd"]()
    accelerate.cpu_offload_with_hook(pipe.unet, "meta")
    with made(pipe, mode):
        text = torch.zeros(2, 16, 16)
        assert pipe.unet(torch.zeros(2, 4, 8, 8), torch.tensor(5), encoder_hidden_states=text).sample.is_meta


def test_gates_stay_the_same_parameters_when_they_move() -> None:
    pipe, call = SHAPES["sd"]()
    mixture = made(pipe, "gated")
    before = mixture.named_parameters()
    with mixture:
        call(pipe)
        pipe.to(torch.float64)
        call(pipe)
    assert all(mixture.named_parameters()[name] is parameter for name, parameter in before.items())


def test_a_composition_finds_its_base_offloaded_or_stored_in_eight_bits() -> None:
    pipe, _ = SHAPES["sd"]()
    own = fingerprint(PipelineModules(pipe))
    for change in (sequential, grouped, cast):
        other, _ = SHAPES["sd"]()
        change(other)
        assert same_base(own, fingerprint(PipelineModules(other)))
        assert same_base(fingerprint(PipelineModules(other)), own)
    another, _ = SHAPES["sd"]()
    for parameter in another.unet.parameters():
        parameter.data.mul_(1.5)
    cast(another)
    assert not same_base(own, fingerprint(PipelineModules(another)))


# -- language models -------------------------------------------------------------------------------------------------


def llama(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)


def text_experts(model: Any) -> list[Expert]:
    return [make_expert(name, adaptable_matrices(model), seed=i, scale=0.3) for i, name in enumerate("ab")]


PROMPT = torch.tensor([[0, 0, 5, 9, 11], [3, 7, 2, 8, 1]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


@pytest.mark.parametrize("mode", ["linear", "gated", "ties"])
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_a_dispatched_language_model_is_the_same(mode: str, where: str, tmp_path: Path) -> None:
    def completed(model: Any) -> Tensor:
        mixture = build_mixture(model, text_experts(model), mode=mode)
        if mixture.named_parameters():
            randomise(mixture, sharpness=1.0)
        with mixture:
            return model.generate(
                input_ids=PROMPT, attention_mask=MASK, max_new_tokens=6, do_sample=False, pad_token_id=0,
                output_logits=True, return_dict_in_generate=True,
            ).logits[-1]  # fmt: skip

    expected, model = completed(llama()), llama()
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": where if i else "cpu" for i in range(3)}
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device=CPU)
    else:
        accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path))
    assert any(parameter.is_meta for parameter in model.parameters())
    assert device_of(model) == CPU
    assert torch.equal(completed(model), expected)
    assert same_base(fingerprint(model), fingerprint(llama()))
