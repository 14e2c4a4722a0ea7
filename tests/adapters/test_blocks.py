"""A UNet's modules have the names that the original code of Stable Diffusion gives them."""

from __future__ import annotations

from typing import Any

import pytest
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from lora_pipelines import FAMILIES

from molecli.adapters.blocks import original_names


def paths_of(matrices: Any) -> list[str]:
    return [name.removeprefix("unet.") for name in matrices if name.startswith("unet.")]


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_converts_every_name_back(family: str, pipeline_of: Any, matrices_in: Any) -> None:
    paths = paths_of(matrices_in(family))
    names = original_names(paths)
    assert sorted(names) == sorted(paths)
    checkpoint = {f"model.diffusion_model.{names[path]}.{part}": path for path in paths for part in ("weight", "bias")}
    converted = convert_ldm_unet_checkpoint(checkpoint, dict(pipeline_of(family).unet.config))
    assert {f"{path}.weight": path for path in paths}.items() <= converted.items()


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2", "input_blocks.4.1.transformer_blocks.0.ff.net.2"),
        ("down_blocks.2.attentions.1.proj_in", "input_blocks.8.1.proj_in"),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"),
        ("mid_block.attentions.0.proj_out", "middle_block.1.proj_out"),
        ("mid_block.resnets.1.conv2", "middle_block.2.out_layers.3"),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.2.conv"),
        ("up_blocks.1.attentions.2.proj_out", "output_blocks.5.1.proj_out"),
        ("up_blocks.2.resnets.0.conv_shortcut", "output_blocks.6.0.skip_connection"),
        ("add_embedding.linear_2", "label_emb.0.2"),
    ],
)  # fmt: skip
def test_names_as_sdxls_loras_have_them(path: str, name: str, matrices_in: Any) -> None:
    assert original_names(paths_of(matrices_in("sdxl")))[path] == name


def test_an_upsampler_behind_no_attention(matrices_in: Any) -> None:
    assert original_names(paths_of(matrices_in("sd1")))["up_blocks.0.upsamplers.0.conv"] == "output_blocks.2.1.conv"
