"""What `write_diffusers` and `write_kohya` wrote is loaded by diffusers to the same updates, and read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lora_pipelines import FAMILIES, assert_same_updates, diffusers_deltas, random_factors
from safetensors import safe_open

from molecli.adapters import LoraSpec, read_expert, read_info, with_one_alpha, write_diffusers, write_kohya
from molecli.errors import RunError
from molecli.experts import LowRank


def assert_read_back(source: Path, factors: dict[str, LowRank], matrices: Any) -> None:
    again = read_expert(LoraSpec("x", str(source)), matrices).factors
    assert again.keys() == factors.keys()
    for name, low_rank in factors.items():
        assert torch.equal(low_rank.A, again[name].A)
        assert torch.equal(low_rank.B, again[name].B)
        assert low_rank.scaling == again[name].scaling


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_loads_mixed_ranks_and_alphas(
    family: str, pipeline_of: Any, matrices_in: Any, tmp_path: Path
) -> None:
    factors = random_factors(
        matrices_in(family), matrices_in(family), rank=lambda i: 2 + i % 3, alpha=lambda i: 0.3 + i % 4
    )
    folder = write_diffusers(tmp_path / "x", factors)
    assert_same_updates(factors, diffusers_deltas(pipeline_of(family), folder))
    assert_read_back(folder, factors, matrices_in(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_loads_kohyas_layout(family: str, pipeline_of: Any, matrices_in: Any, tmp_path: Path) -> None:
    # One alpha, since diffusers 0.42 takes the commonest for every attention.
    factors = random_factors(matrices_in(family), matrices_in(family), rank=lambda i: 2 + i % 3, alpha=lambda i: 1.5)
    file = write_kohya(tmp_path / "x.safetensors", factors, matrices_in(family))
    assert_same_updates(factors, diffusers_deltas(pipeline_of(family), file))
    assert_read_back(file, factors, matrices_in(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_with_one_alpha_diffusers_loads_mixed_ranks_and_alphas_from_kohyas_layout(
    family: str, pipeline_of: Any, matrices_in: Any, tmp_path: Path
) -> None:
    factors = random_factors(
        matrices_in(family), matrices_in(family), rank=lambda i: 2 + i % 3, alpha=lambda i: 0.3 + i % 4
    )
    file = write_kohya(tmp_path / "x.safetensors", with_one_alpha(factors), matrices_in(family))
    with safe_open(file, "pt") as opened:
        assert len({float(opened.get_tensor(key)) for key in opened.keys() if key.endswith(".alpha")}) == 1  # noqa: SIM118
    assert_same_updates(factors, diffusers_deltas(pipeline_of(family), file))


@pytest.mark.parametrize("family", FAMILIES)
def test_kohyas_layout_keeps_every_alpha(family: str, matrices_in: Any, tmp_path: Path) -> None:
    factors = random_factors(
        matrices_in(family), matrices_in(family), rank=lambda i: 2 + i % 3, alpha=lambda i: 0.25 + i % 4
    )
    file = write_kohya(tmp_path / "x.safetensors", factors, matrices_in(family))
    assert_read_back(file, factors, matrices_in(family))


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("sd1", {"lora_unet_down_blocks_0_attentions_0_proj_in", "lora_te_text_model_encoder_layers_0_mlp_fc1"}),
        ("sd2", {"lora_unet_down_blocks_0_attentions_0_proj_in", "lora_te_text_model_encoder_layers_0_mlp_fc1"}),
        (
            "sdxl",
            {
                "lora_unet_input_blocks_4_1_proj_in",
                "lora_unet_input_blocks_3_0_op",
                "lora_unet_label_emb_0_0",
                "lora_te1_text_model_encoder_layers_0_mlp_fc1",
                "lora_te2_text_model_encoder_layers_0_mlp_fc1",
                "lora_te2_text_projection",
            },
        ),
    ],
)
def test_kohyas_names_are_those_of_the_family(
    family: str, expected: set[str], matrices_in: Any, tmp_path: Path
) -> None:
    factors = random_factors(matrices_in(family), matrices_in(family))
    file = write_kohya(tmp_path / "x.safetensors", factors, matrices_in(family))
    with safe_open(file, "pt") as opened:
        keys = set(opened.keys())
    assert {f"{name}.{part}" for name in expected for part in ("lora_down.weight", "lora_up.weight", "alpha")} <= keys
    assert len(keys) == 3 * len(factors)


def test_a_part_of_a_base_needs_the_whole_bases_names(matrices_in: Any, tmp_path: Path) -> None:
    name = "unet.up_blocks.1.attentions.0.proj_in"
    factors = random_factors(matrices_in("sdxl"), [name])
    file = write_kohya(tmp_path / "x.safetensors", factors, matrices_in("sdxl"))
    with safe_open(file, "pt") as opened:
        assert "lora_unet_output_blocks_3_1_proj_in.alpha" in set(opened.keys())
    assert_read_back(file, factors, matrices_in("sdxl"))


def test_the_base_is_remembered(matrices_in: Any, tmp_path: Path) -> None:
    factors = random_factors(matrices_in("sd1"), ["unet.conv_in"])
    told = {"base_model_name_or_path": "org/base"}
    assert (
        read_info(LoraSpec("x", str(write_diffusers(tmp_path / "x", factors, metadata=told)))).base_model == "org/base"
    )
    file = write_kohya(tmp_path / "y.safetensors", factors, matrices_in("sd1"), metadata=told)
    assert read_info(LoraSpec("x", str(file))).base_model == "org/base"


def test_types_are_kept_and_shared_memory_is_copied(matrices_in: Any, tmp_path: Path) -> None:
    names = ["unet.mid_block.resnets.0.conv1", "unet.mid_block.resnets.1.conv1"]
    stack = torch.randn(8, 16, 3, 3, dtype=torch.bfloat16)
    up = torch.randn(16, 8, dtype=torch.bfloat16)
    factors = {n: LowRank(stack[4 * i : 4 * i + 4], up[:, 4 * i : 4 * i + 4], 0.5) for i, n in enumerate(names)}
    folder = write_diffusers(tmp_path / "x", factors)
    assert_read_back(folder, factors, matrices_in("sd1"))
    assert read_expert(LoraSpec("x", str(folder)), matrices_in("sd1")).factors[names[0]].A.dtype == torch.bfloat16


def test_a_full_folder_gives_way_on_demand_only(matrices_in: Any, tmp_path: Path) -> None:
    first = random_factors(matrices_in("sd1"), ["unet.conv_in"])
    write_diffusers(tmp_path / "x", first)
    second = random_factors(matrices_in("sd1"), ["unet.conv_out"])
    with pytest.raises(RunError, match="cannot be written"):
        write_diffusers(tmp_path / "x", second)
    assert_read_back(tmp_path / "x", first, matrices_in("sd1"))
    write_diffusers(tmp_path / "x", second, replace=True)
    assert_read_back(tmp_path / "x", second, matrices_in("sd1"))
