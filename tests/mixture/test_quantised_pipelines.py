"""Pipelines whose UNet and text encoder are quantised: equal to diffusers' own LoRA, left as they were, loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gates import close
from packed import dense_twin, pack
from safetensors.torch import save_file
from torch import Tensor

from molecli.bases.loading import load_backbone
from molecli.config import BaseConfig
from molecli.mixture.attach import attach
from molecli.mixture.layout import adaptable_matrices, host_of


@pytest.fixture(scope="module")
def picture_lora(make_pipeline: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A LoRA in diffusers' layout on the attention of the UNet and of the text encoder."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, shape in adaptable_matrices(host_of(make_pipeline("sd"))).items():
        if name.rpartition(".")[2] in ("to_q", "to_v", "q_proj") and len(shape) == 2:
            tensors[f"{name}.lora_A.weight"] = torch.randn(4, shape[1], generator=generator) * 0.3
            tensors[f"{name}.lora_B.weight"] = torch.randn(shape[0], 4, generator=generator) * 0.3
    file = tmp_path_factory.mktemp("pictures") / "lora.safetensors"
    save_file(tensors, file)
    return str(file)


def drawn(pipe: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.from_numpy(pipe("a cat", num_inference_steps=2, generator=generator, output_type="np").images)


def draws_like_diffusers(pipe: Any, plain: Any, lora: str) -> None:
    """The quantised pipeline has the matrices of the plain one, equals diffusers' own LoRA and is left as it was."""
    pipe.set_progress_bar_config(disable=True)
    found, expected = adaptable_matrices(host_of(pipe)), adaptable_matrices(host_of(plain))
    assert list(found.items()) == list(expected.items())
    before = drawn(pipe)
    with attach(pipe, loras={"a": lora}, mode="linear"):
        ours = drawn(pipe)
    assert torch.equal(drawn(pipe), before)
    assert not close(ours, before, 1e-3)
    pipe.load_lora_weights(lora)
    assert close(ours, drawn(pipe), 1e-4)


@pytest.mark.parametrize("kind", ["Columns", "Buffers"])
def test_a_pipeline_with_a_packed_unet_and_text_encoder(
    tiny_sd: Any, make_pipeline: Any, picture_lora: str, kind: str
) -> None:
    width = 16 if kind == "Columns" else 8
    for part in (tiny_sd.unet, tiny_sd.text_encoder):
        pack(part, kind, multiple=width)
    if kind == "Columns":  # PEFT has a layer for it
        return draws_like_diffusers(tiny_sd, make_pipeline("sd"), picture_lora)
    twins = make_pipeline("sd")
    for name in ("unet", "text_encoder"):
        twins.register_modules(**{name: dense_twin(getattr(tiny_sd, name))})
    for pipe in (tiny_sd, twins):
        pipe.set_progress_bar_config(disable=True)
    with attach(tiny_sd, loras={"a": picture_lora}, mode="linear"):
        found = drawn(tiny_sd)
    twins.load_lora_weights(picture_lora)
    assert close(found, drawn(twins), 1e-4)


def test_a_pipeline_of_torchao_is_drawn_and_saved_and_loaded(
    make_pipeline: Any, pipeline_folder: Callable[..., Path], picture_lora: str, tmp_path: Path
) -> None:
    ao = pytest.importorskip("torchao.quantization")
    import diffusers
    import transformers

    folder, config = str(pipeline_folder("sd")), ao.Int8WeightOnlyConfig()
    unet = diffusers.UNet2DConditionModel.from_pretrained(
        folder, subfolder="unet", torch_dtype=torch.float32, quantization_config=diffusers.TorchAoConfig(config)
    )
    text = transformers.CLIPTextModel.from_pretrained(
        folder, subfolder="text_encoder", dtype=torch.float32, quantization_config=transformers.TorchAoConfig(config)
    )
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        folder, unet=unet, text_encoder=text, safety_checker=None
    )  # fmt: skip
    pipe.save_pretrained(tmp_path / "saved")
    draws_like_diffusers(pipe, make_pipeline("sd"), picture_lora)
    pipe.unload_lora_weights()
    loaded = load_backbone(BaseConfig(id=str(tmp_path / "saved")), "cpu")
    again = load_backbone(BaseConfig(id=str(tmp_path / "saved")), "cpu")
    assert loaded.fingerprint() == again.fingerprint()
    loaded.pipe.set_progress_bar_config(disable=True)  # type: ignore[attr-defined]
    assert close(drawn(loaded.pipe), drawn(pipe), 1e-4)  # type: ignore[attr-defined]
