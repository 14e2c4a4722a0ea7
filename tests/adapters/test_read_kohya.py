"""A LoRA in kohya's layout is read to the updates that diffusers computes, SDXL's original block names included."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_pipelines import FAMILIES, assert_same_updates, dense, diffusers_deltas, random_factors
from safetensors.torch import save_file

from molecli.adapters import LoraSpec, read_expert, read_info
from molecli.adapters.blocks import original_names
from molecli.experts import LowRank

CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "conv_in", "conv_out")


def kohya_file(
    file: Path, factors: Mapping[str, LowRank], *, sdxl: bool = False, originals: Any = None, alphas: bool = True
) -> Path:
    """`factors` under underscored names; `originals` maps paths in the UNet to others."""
    starts = {"unet": "lora_unet_", "text_encoder": "lora_te1_" if sdxl else "lora_te_", "text_encoder_2": "lora_te2_"}
    tensors = {}
    for name, low_rank in factors.items():
        component, _, path = name.partition(".")
        path = (originals or {}).get(path, path)
        if component == "text_encoder":
            path = f"text_model.{path}"
        key = starts[component] + path.replace(".", "_")
        up = low_rank.B.reshape(*low_rank.B.shape, *[1] * (low_rank.A.ndim - 2))
        tensors |= {f"{key}.lora_down.weight": low_rank.A, f"{key}.lora_up.weight": up}
        if alphas:
            tensors[f"{key}.alpha"] = torch.tensor(low_rank.scaling * low_rank.rank)
    save_file(tensors, file, metadata={"ss_sd_model_name": "v1-5-pruned.safetensors"})
    return file


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_of_a_pipeline(family: str, pipeline_of: Any, matrices_in: Any, tmp_path: Path) -> None:
    # Ranks differ, and alpha does where LoCon's convolutions have their own. Where the alpha of an attention or of a
    # text encoder is not the commonest one, diffusers 0.42 drops it, and add_embedding under its own name altogether:
    # test_every_alpha_is_that_of_its_matrix compares with the definition.
    names = [name for name in matrices_in(family) if "add_embedding" not in name]
    factors = random_factors(
        matrices_in(family),
        names,
        rank=lambda i: 2 + i % 3,
        alpha=lambda i: 1.0 if names[i].startswith("unet.") and names[i].endswith(CONVOLUTIONS) else 3.0,
    )
    file = kohya_file(tmp_path / "x.safetensors", factors, sdxl=family == "sdxl")
    expert = read_expert(LoraSpec("x", str(file)), matrices_in(family))
    assert list(expert.factors) == names
    assert_same_updates(expert.factors, diffusers_deltas(pipeline_of(family), file))


def test_sdxl_under_the_original_block_names(pipeline_of: Any, matrices_in: Any, tmp_path: Path) -> None:
    matrices = matrices_in("sdxl")
    originals = original_names(name.removeprefix("unet.") for name in matrices if name.startswith("unet."))
    factors = random_factors(matrices, matrices, rank=lambda i: 2 + i % 3, alpha=lambda i: 2.0)
    file = kohya_file(tmp_path / "x.safetensors", factors, sdxl=True, originals=originals)
    assert not any("down_blocks" in name for name in read_info(LoraSpec("x", str(file))).matrices)
    expert = read_expert(LoraSpec("x", str(file)), matrices)
    assert list(expert.factors) == list(matrices)
    assert_same_updates(expert.factors, diffusers_deltas(pipeline_of("sdxl"), file))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_alpha_is_that_of_its_matrix(family: str, matrices_in: Any, tmp_path: Path) -> None:
    factors = random_factors(
        matrices_in(family), matrices_in(family), rank=lambda i: 2 + i % 3, alpha=lambda i: 1.0 + i % 4
    )
    file = kohya_file(tmp_path / "x.safetensors", factors, sdxl=family == "sdxl")
    expert = read_expert(LoraSpec("x", str(file)), matrices_in(family))
    assert_same_updates(expert.factors, {name: dense(low_rank) for name, low_rank in factors.items()})


def test_without_alphas_the_scaling_is_one(pipeline_of: Any, matrices_in: Any, tmp_path: Path) -> None:
    names = [name for name in matrices_in("sd1") if "attn2" in name]
    factors = random_factors(matrices_in("sd1"), names, rank=lambda i: 2 + i % 3, alpha=lambda i: 2.0 + i % 3)
    file = kohya_file(tmp_path / "x.safetensors", factors, alphas=False)
    expert = read_expert(LoraSpec("x", str(file)), matrices_in("sd1"))
    assert {low_rank.scaling for low_rank in expert.factors.values()} == {1.0}
    assert_same_updates(expert.factors, diffusers_deltas(pipeline_of("sd1"), file))


def test_a_loras_own_rank_and_alpha_are_the_commonest(matrices_in: Any, tmp_path: Path) -> None:
    names = [name for name in matrices_in("sd1") if "attn2" in name]
    factors = random_factors(
        matrices_in("sd1"), names, rank=lambda i: 2 if i == 0 else 4, alpha=lambda i: 9.0 if i == 0 else 1.0
    )
    info = read_info(LoraSpec("x", str(kohya_file(tmp_path / "x.safetensors", factors))))
    assert (info.rank, info.alpha, info.base_model) == (4, 1.0, "v1-5-pruned.safetensors")


def test_a_configuration_of_another_lora_beside_it_is_left_alone(matrices_in: Any, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 64, "lora_alpha": 1}')
    factors = random_factors(matrices_in("sd1"), [name for name in matrices_in("sd1") if "attn2" in name])
    info = read_info(LoraSpec("x", str(kohya_file(tmp_path / "x.safetensors", factors))))
    assert (info.rank, info.alpha) == (4, 4.0)
