"""On an accelerator: the same numbers as on the CPU, bf16 included, and several GPUs as one. Run with `-m gpu`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gates import close, randomise
from pipeline_shapes import SHAPES
from reference import read_naively
from safetensors.torch import load_file
from tiny_pipelines import make_expert

from molecli.bases.diffusion import Diffusion
from molecli.bases.pipeline import PipelineModules, pipeline_matrices
from molecli.config import GateConfig
from molecli.mixture.build import build_mixture
from molecli.mixture.mixture import Mixture

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(params=["t5", "llama", "gpt2"])
def hosted(request: pytest.FixtureRequest, tmp_path: Path, make_peft_adapter: Callable[..., Path]) -> Any:
    tiny = request.getfixturevalue(f"tiny_{request.param}")
    folders = [make_peft_adapter(tiny.model, tmp_path / name, seed=i, scale=0.15) for i, name in enumerate("abc")]
    experts = [read_naively(folder, name) for folder, name in zip(folders, "abc", strict=True)]
    ids = torch.randint(6, 200, (2, 8), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    if request.param != "t5":
        batch["labels"][:, :4] = -100
    return tiny.model, experts, batch


def run(model: Any, experts: Any, batch: dict[str, torch.Tensor], device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Logits, gate gradients and generated tokens of gates that are far from uniform; and the masked logits."""
    model = model.to(device=device, dtype=dtype)
    batch = {key: value.to(device) for key, value in batch.items()}
    with build_mixture(model, experts, mode="gated", gate=GateConfig()) as mixture:
        generator = torch.Generator().manual_seed(0)
        for parameter in mixture.named_parameters().values():
            parameter.data = 2 * torch.randn(parameter.shape, generator=generator).to(device)
        out = model(**batch)
        out.loss.backward()
        gradients = [p.grad.cpu() for p in mixture.named_parameters().values() if p.grad is not None]
        ids, mask = batch["input_ids"], batch["attention_mask"]
        tokens = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
        mixture.mask("a", "b", "c")
        masked = model(**batch).logits
    base = model(**batch).logits
    assert torch.equal(masked, base)
    return {"logits": out.logits.detach().float().cpu(), "gradients": gradients, "tokens": tokens.cpu()}


def test_cuda_gives_the_logits_gradients_and_tokens_of_the_cpu(hosted: Any) -> None:
    model, experts, batch = hosted
    expected = run(model, experts, batch, "cpu", torch.float32)
    found = run(model, experts, batch, "cuda", torch.float32)
    torch.testing.assert_close(found["logits"], expected["logits"], atol=2e-3, rtol=2e-3)
    largest = max(float(g.abs().max()) for g in expected["gradients"])
    assert largest > 0
    for ours, theirs in zip(found["gradients"], expected["gradients"], strict=True):
        torch.testing.assert_close(ours, theirs, atol=5e-3 * largest, rtol=1e-2)
    assert torch.equal(found["tokens"], expected["tokens"])


def test_bf16_stays_near_float32(hosted: Any) -> None:
    model, experts, batch = hosted
    expected = run(model, experts, batch, "cpu", torch.float32)["logits"]
    found = run(model, experts, batch, "cuda", torch.bfloat16)["logits"]
    assert float((found - expected).norm() / expected.norm()) < 0.1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_two_gpus_learn_the_gates_of_one(tmp_path: Path) -> None:
    settings = ["-m", "molecli", "compose", "--loras", "a,b", "--set", "evaluate=null", "--set", "train.steps=8"]
    alone, pair = tmp_path / "alone", tmp_path / "pair"
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    float32 = ["--set", "base.dtype=float32"]
    subprocess.run([sys.executable, *settings, *float32, "--output", str(alone)], check=True, timeout=300)
    subprocess.run([sys.executable, *launch, *settings, *float32, "--output", str(pair)], check=True, timeout=300)
    one, two = (load_file(folder / "composition.safetensors") for folder in (alone, pair))
    assert one.keys() == two.keys()
    assert max(float(tensor.abs().max()) for key, tensor in one.items() if key.endswith("head.weight")) > 1e-2
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, atol=2e-4, rtol=1e-3)


# -- pipelines whose weights are elsewhere between calls -------------------------------------------------------------


def on_model(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cuda")


def by_layer(pipe: Any) -> None:
    pipe.enable_sequential_cpu_offload(device="cuda")


def by_group(pipe: Any) -> None:
    pipe.to("cuda")
    pipe.unet.enable_group_offload(
        onload_device=torch.device("cuda"),
        offload_device=torch.device("cpu"),
        offload_type="leaf_level",
        use_stream=True,
    )


def moved(pipe: Any) -> None:
    pipe.to("cuda")


def composed(pipe: Any, mode: str) -> Mixture:
    matrices = pipeline_matrices(PipelineModules(pipe))
    experts = [make_expert(name, matrices, seed=i, scale=0.1) for i, name in enumerate("ab")]
    mixture = build_mixture(PipelineModules(pipe), experts, mode=mode)
    if mixture.named_parameters():
        randomise(mixture, sharpness=1.0)
    return mixture


@pytest.mark.parametrize("mode", ["linear", "gated", "ties", "composite"])
@pytest.mark.parametrize("change", [on_model, by_layer, by_group, moved])
@pytest.mark.parametrize("shape", ["sd", "sdxl"])
def test_an_offloaded_pipeline_draws_as_on_the_cpu(shape: str, change: Callable[[Any], None], mode: str) -> None:
    pipe, call = SHAPES[shape]()
    with composed(pipe, mode):
        expected = call(pipe)
    for inside in (False, True):
        pipe, call = SHAPES[shape]()
        if not inside:
            change(pipe)
        with composed(pipe, mode) as mixture:
            if inside:
                change(pipe)
            assert close(call(pipe).cpu(), expected, 1e-3)
            mixture.mask("a")
            assert not close(call(pipe).cpu(), expected, 1e-3)


def test_a_unet_stored_in_eight_bits_draws_near_the_unrounded_one() -> None:
    pipe, call = SHAPES["sd"]()
    pipe.to("cuda", torch.bfloat16)
    with composed(pipe, "linear"):
        expected = call(pipe)
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    with composed(pipe, "linear"):
        assert close(call(pipe).float(), expected.float(), 0.3)


def test_steps_of_an_offloaded_unet_are_not_recorded() -> None:
    pipe, call = SHAPES["sd"]()
    with composed(pipe, "linear"):
        expected = call(pipe, prompt=["a cat"], num_inference_steps=4, height=16, width=16)
    pipe, _ = SHAPES["sd"]()
    pipe.enable_model_cpu_offload(device="cuda")
    base = Diffusion(pipe)
    with composed(pipe, "linear"):
        drawn = base.generate(["a cat"], seeds=[0], steps=4, guidance=3.0, height=16, width=16, latent=True)
    assert base.device.type == "cuda"
    assert close(drawn[0].cpu(), expected[0], 1e-3)
