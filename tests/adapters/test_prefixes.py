"""LoRAs under the prefixes of other programs give the updates of their factors; other families are named by them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_pipelines import FAMILIES, assert_same_updates, dense, diffusers_deltas, random_factors
from refusals import refused
from safetensors.torch import save_file

from molecli.adapters import LoraSpec, read_expert
from molecli.adapters.blocks import original_names
from molecli.adapters.prefixes import without_prefix
from molecli.experts import LowRank

# Prefixes of the UNet, of the first and of the second text encoder
PREFIXES = {
    "lora_unet.": ("lora_unet.", "lora_te1.text_model.", "lora_te2.text_model."),
    "diffusion_model.": (
        "diffusion_model.",
        "text_encoders.clip_l.transformer.text_model.",
        "text_encoders.clip_g.transformer.text_model.",
    ),
    "model.diffusion_model.": (
        "model.diffusion_model.",
        "conditioner.embedders.0.transformer.text_model.",
        "conditioner.embedders.1.transformer.text_model.",
    ),
    "base_model.model.unet.": (
        "base_model.model.unet.",
        "base_model.model.text_encoder.text_model.",
        "base_model.model.text_encoder_2.text_model.",
    ),
    "clip_l.": ("unet.", "clip_l.text_model.", "clip_g.text_model."),
}
MARKS = {"lora_down": "A", "lora_up": "B"}


def prefixed(
    factors: Mapping[str, LowRank], prefixes: tuple[str, str, str], originals: Mapping[str, str]
) -> dict[str, torch.Tensor]:
    starts = dict(zip(("unet", "text_encoder", "text_encoder_2"), prefixes, strict=True))
    found = {}
    for name, low_rank in factors.items():
        component, _, path = name.partition(".")
        key = starts[component] + originals.get(path, path).removeprefix("text_model.")
        found |= {f"{key}.{mark}.weight": getattr(low_rank, half) for mark, half in MARKS.items()}
        found[f"{key}.alpha"] = torch.tensor(low_rank.scaling * low_rank.rank)
    return found


@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_under_every_prefix(
    family: str, prefix: str, original: bool, matrices_in: Any, tmp_path: Path
) -> None:
    matrices = matrices_in(family)
    factors = random_factors(matrices, matrices, rank=lambda i: 2 + i % 3, alpha=lambda i: 1.0 + i % 4)
    originals = original_names(n.removeprefix("unet.") for n in matrices if n.startswith("unet."))
    file = tmp_path / "x.safetensors"
    save_file(prefixed(factors, PREFIXES[prefix], originals if original else {}), file)
    expert = read_expert(LoraSpec("x", str(file)), matrices)
    assert_same_updates(expert.factors, {name: dense(low_rank) for name, low_rank in factors.items()})


def test_what_diffusers_reads_too(pipeline_of: Any, matrices_in: Any, tmp_path: Path) -> None:
    # The dotted names of kohya's and diffusers' UNet, as diffusers understands them.
    names = [n for n in matrices_in("sd1") if n.startswith("unet.") and n.endswith(("to_q", "to_v"))]
    factors = random_factors(matrices_in("sd1"), names)
    tensors = {f"base_model.model.{n}.lora_{h}.weight": getattr(f, h) for n, f in factors.items() for h in "AB"}
    plain = {key.removeprefix("base_model.model."): tensor for key, tensor in tensors.items()}
    (tmp_path / "theirs").mkdir()
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    save_file(plain, tmp_path / "theirs" / "pytorch_lora_weights.safetensors")
    expert = read_expert(LoraSpec("x", str(tmp_path / "pytorch_lora_weights.safetensors")), matrices_in("sd1"))
    assert_same_updates(expert.factors, diffusers_deltas(pipeline_of("sd1"), tmp_path / "theirs"))


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        (
            "conditioner.embedders.1.model.transformer.resblocks.3.mlp.c_fc",
            "text_encoder_2.encoder.layers.3.mlp.fc1",
        ),
        (
            "cond_stage_model.model.transformer.resblocks.0.attn.out_proj",
            "text_encoder.encoder.layers.0.self_attn.out_proj",
        ),
        (
            "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc2",
            "text_encoder.text_model.encoder.layers.0.mlp.fc2",
        ),
        ("transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_attn"),
        ("diffusion_model.double_blocks.0.img_attn.qkv", "diffusion_model.double_blocks.0.img_attn.qkv"),
        ("clip_model.layers.0", "clip_model.layers.0"),
    ],
)
def test_names_of_the_original_code(stored: str, name: str) -> None:
    assert without_prefix(stored) == name


# Another architecture comes before every other complaint

FAMILIES_BY_NAME = {
    "transformer.single_transformer_blocks.0.attn.to_q": "FLUX",
    "diffusion_model.double_blocks.0.img_attn.qkv": "FLUX",
    "lora_unet_single_blocks_0_linear1": "FLUX",
    "lora_unet_joint_blocks_0_x_block_attn_proj": "Stable Diffusion 3",
    "transformer.transformer_blocks.0.img_mlp.net.2": "Qwen-Image",
    "diffusion_model.layers.0.attention.to_q": "Z-Image or Lumina",
    "diffusion_model.blocks.0.cross_attn.k": "Wan, a video model",
    "lora_unet_blocks_0_self_attn_q": "Wan, a video model",
    "lora_prior_unet_blocks_0_attn": "Stable Cascade",
    "unet.down_blocks.0.motion_modules.0.temporal_transformer.proj_in": "AnimateDiff (it adapts motion modules)",
    "down_blocks.0.attentions.0.temporal_transformer_blocks.0.attn1.to_q": "Stable Video Diffusion",
    "lora_te3_encoder_block_0_layer_0_SelfAttention_q": "a model with a T5 encoder",
    "transformer.transformer_blocks.0.attn.to_q": "a model with a transformer in place of the UNet",
    "diffusion_model.transformer_blocks.0.attn1.to_q": "a model with a transformer in place of the UNet",
}
PAIRS: list[Callable[[str], dict[str, torch.Tensor]]] = [
    # PEFT's names with no alpha; half a pair; a kind that is not read
    lambda name: {f"{name}.lora_{m}.weight": torch.ones(2, 2) for m in "AB"},
    lambda name: {f"{name}.lora_A.weight": torch.ones(2, 2)},
    lambda name: {f"{name}.lokr_w1": torch.ones(2, 2)},
]


@pytest.mark.parametrize("name", FAMILIES_BY_NAME)
def test_a_wrong_family_is_said_before_anything_else(name: str, matrices_in: Any, tmp_path: Path) -> None:
    for i, tensors in enumerate(PAIRS):
        file = tmp_path / f"{i}.safetensors"
        save_file(tensors(name), file)
        refused(
            lambda file=file: read_expert(LoraSpec("x", str(file)), matrices_in("sd1"), allow_partial=True),
            3,
            f"it was made for {FAMILIES_BY_NAME[name]}",
        )


def test_a_wrong_width_is_said_before_a_missing_alpha(matrices_in: Any, tmp_path: Path) -> None:
    name = next(n for n in matrices_in("sdxl") if n.endswith("attn2.to_k")).removeprefix("unet.")
    shape = matrices_in("sdxl")[f"unet.{name}"]
    file = tmp_path / "adapter_model.safetensors"
    tensors = {f"{name}.lora_A.weight": torch.ones(4, shape[1]), f"{name}.lora_B.weight": torch.ones(shape[0], 4)}
    save_file(tensors, file)
    message = "it was made for another UNet: its UNet reads text embeddings of width 40, this base's 16"
    refused(lambda: read_expert(LoraSpec("x", str(tmp_path)), matrices_in("sd1")), 3, message)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 8}))
    refused(lambda: read_expert(LoraSpec("x", str(tmp_path)), matrices_in("sd1")), 3, message)


def test_a_second_encoder_under_another_prefix_is_sdxls(matrices_in: Any, tmp_path: Path) -> None:
    for i, start in enumerate(("text_encoders.clip_g.transformer.", "lora_te2.", "text_encoder_2.")):
        file = tmp_path / f"{i}.safetensors"
        save_file({f"{start}text_model.encoder.layers.0.mlp.fc1.lora_A.weight": torch.ones(2, 24)}, file)
        refused(lambda file=file: read_expert(LoraSpec("x", str(file)), matrices_in("sd1")), 3, "it was made for SDXL")


def test_pipelines_of_other_kinds_on_a_language_model(matrices: Any, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file(PAIRS[0]("diffusion_model.double_blocks.0.img_attn.qkv"), file)
    refused(lambda: read_expert(LoraSpec("x", str(file)), matrices), 3, "it was made for a diffusion pipeline")


def test_a_unet_without_a_component_on_a_language_model(matrices: Any, tmp_path: Path) -> None:
    save_file(PAIRS[0]("mid_block.attentions.0.transformer_blocks.0.attn1.to_q"), tmp_path / "x.safetensors")
    read = lambda: read_expert(LoraSpec("x", str(tmp_path / "x.safetensors")), matrices)  # noqa: E731
    refused(read, 3, "it was made for a diffusion pipeline, and this base is a language model")


def test_a_language_models_lora_on_a_pipeline_is_said_before_its_alpha(matrices_in: Any, tmp_path: Path) -> None:
    save_file(PAIRS[0]("base_model.model.model.layers.0.mlp.up_proj"), tmp_path / "x.safetensors")
    read = lambda: read_expert(LoraSpec("x", str(tmp_path / "x.safetensors")), matrices_in("sd1"))  # noqa: E731
    refused(read, 3, "it was made for another base: this one lacks all its 1 matrices, such as 'model.layers.0.mlp")


def test_another_shape_is_said_before_the_alpha(matrices_in: Any, tmp_path: Path) -> None:
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    save_file(PAIRS[0](name), tmp_path / "x.safetensors")
    read = lambda: read_expert(LoraSpec("x", str(tmp_path / "x.safetensors")), matrices_in("sd1"))  # noqa: E731
    refused(read, 3, f"'unet.{name}' is 2x2 in the LoRA and 16x16 in this base")
