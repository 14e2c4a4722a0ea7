"""A LoRA's modules find their matrix in the base, or an error says why they cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from molecli.adapters import LoraSpec, coverage, place, read_info


def info_of(file: Path, *modules: str) -> Any:
    shapes = {"down": (2, 4), "up": (4, 2)}
    save_file({f"{m}.lora_{mark}.weight": torch.ones(shape) for m in modules for mark, shape in shapes.items()}, file)
    return read_info(LoraSpec("x", str(file)))


def square(*names: str) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys(names, (4, 4))


@pytest.mark.parametrize(
    ("module", "matrix"),
    [
        ("lora_unet_mid_block_attentions_0_proj_in", "unet.mid_block.attentions.0.proj_in"),
        ("lora_unet_middle_block_1_proj_in", "unet.mid_block.attentions.0.proj_in"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", "text_encoder.encoder.layers.0.mlp.fc1"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1", "text_encoder.encoder.layers.0.mlp.fc1"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1", "text_encoder_2.text_model.encoder.layers.0.mlp.fc1"),
        ("lora_te2_text_projection", "text_encoder_2.text_projection"),
        ("text_encoder.text_model.encoder.layers.0.mlp.fc1", "text_encoder.encoder.layers.0.mlp.fc1"),
        ("text_encoder_2.encoder.layers.0.mlp.fc1", "text_encoder_2.text_model.encoder.layers.0.mlp.fc1"),
        ("mid_block.attentions.0.proj_in", "unet.mid_block.attentions.0.proj_in"),
        ("text_projection", "text_encoder_2.text_projection"),
    ],
)
def test_every_spelling_finds_its_matrix(module: str, matrix: str, tmp_path: Path) -> None:
    base = square(
        "unet.mid_block.attentions.0.proj_in",
        "text_encoder.encoder.layers.0.mlp.fc1",
        "text_encoder_2.text_model.encoder.layers.0.mlp.fc1",
        "text_encoder_2.text_projection",
    )
    info = info_of(tmp_path / "x.safetensors", module)
    placed = place(info, base)
    assert placed.matrices == {matrix: (4, 4)}
    assert f"{module}.lora_down.weight" == placed.adapted[matrix].keys.A
    assert place(placed, base) == placed


def test_a_base_that_has_text_model_in_its_own_names(tmp_path: Path) -> None:
    # As in transformers 4.
    base = square("unet.conv", "text_encoder.text_model.encoder.layers.0.mlp.fc1")
    info = info_of(tmp_path / "x.safetensors", "lora_te_text_model_encoder_layers_0_mlp_fc1")
    assert list(place(info, base).matrices) == ["text_encoder.text_model.encoder.layers.0.mlp.fc1"]


def test_underscores_that_could_be_two_matrices(tmp_path: Path, explained: Any) -> None:
    file = tmp_path / "x.safetensors"
    info = info_of(file, "lora_unet_a_b_c")
    message = f"x ({file}): 'lora_unet_a_b_c' could mean 'unet.a.b_c' or 'unet.a_b.c' in this base. "
    message += "Convert it to the diffusers layout."
    explained(lambda: place(info, square("unet.a.b_c", "unet.a_b.c")), 3, message)
    assert coverage(info, square("unet.a.b_c", "unet.a_b.d")).matched == ("unet.a.b_c",)


def test_two_names_of_one_matrix(tmp_path: Path, explained: Any) -> None:
    file = tmp_path / "x.safetensors"
    info = info_of(file, "lora_unet_middle_block_1_proj_in", "lora_unet_mid_block_attentions_0_proj_in")
    message = f"x ({file}): 'lora_unet_mid_block_attentions_0_proj_in' and 'lora_unet_middle_block_1_proj_in' both "
    message += "adapt 'unet.mid_block.attentions.0.proj_in'. Leave one of them out of the file."
    explained(lambda: place(info, square("unet.mid_block.attentions.0.proj_in")), 3, message)


def test_a_language_models_names_stay(tmp_path: Path) -> None:
    info = info_of(tmp_path / "x.safetensors", "decoder.q", "lora_unet_mid_block")
    assert place(info, square("decoder.q", "mid.block")) == info
