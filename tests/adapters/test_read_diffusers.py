"""A LoRA in a layout of diffusers, today's or an older one, is read to the updates that diffusers computes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers
from lora_pipelines import COMPONENTS, FAMILIES, assert_same_updates, dense, diffusers_deltas, random_factors
from safetensors.torch import load_file, save_file
from torch import Tensor

from molecli.adapters import LoraSpec, check_coverage, read_expert, read_info
from molecli.experts import LowRank

FILE = "pytorch_lora_weights.safetensors"
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CLIP = ["q_proj", "k_proj", "v_proj", "out_proj"]
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"to_q": 2, "k_proj": 3}, "alpha_pattern": {r"attn2\.to_k": 1, "q_proj": 5}},
    "convolutions": {"target_modules": [*ATTENTION, "proj_in", "conv1", "conv_shortcut", "time_emb_proj", "ff.net.2"]},
}


def trained(pipeline: Any, folder: Path, *, metadata: bool = True, **settings: Any) -> Path:
    """What diffusers' training scripts save for a LoRA of every component, with random factors."""
    pipeline = copy.deepcopy(pipeline)
    torch.manual_seed(1)
    layers, modules = {}, {}
    for component in COMPONENTS:
        model = getattr(pipeline, component, None)
        if model is None:
            continue
        targets = ATTENTION if component == "unet" else [*CLIP, "fc1"]
        model.add_adapter(peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": targets, **settings}))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        layers[f"{component}_lora_layers"] = peft.get_peft_model_state_dict(model)
        modules[component] = model
        settings.pop("target_modules", None)
    told = _collate_lora_metadata(modules) if metadata else {}
    type(pipeline).save_lora_weights(str(folder), **layers, **told)
    return folder


@pytest.mark.parametrize(
    ("settings", "family"),
    [("plain", "sdxl"), ("rslora", "sd2"), ("patterns", "sd1"), *(("convolutions", family) for family in FAMILIES)],
)
def test_what_diffusers_training_saves(
    settings: str, family: str, pipeline_of: Any, matrices_in: Any, tmp_path: Path
) -> None:
    folder = trained(pipeline_of(family), tmp_path / "x", **SETTINGS[settings])
    expert = read_expert(LoraSpec("x", str(folder)), matrices_in(family))
    assert_same_updates(expert.factors, diffusers_deltas(pipeline_of(family), folder))
    assert (expert.rank, expert.alpha) == (4, 6.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_that_tells_no_alpha_means_scaling_one(
    family: str, pipeline_of: Any, matrices_in: Any, tmp_path: Path
) -> None:
    folder = trained(pipeline_of(family), tmp_path / "x", metadata=False, rank_pattern={"to_q": 2})
    expert = read_expert(LoraSpec("x", str(folder)), matrices_in(family))
    assert_same_updates(expert.factors, diffusers_deltas(pipeline_of(family), folder))
    assert {low_rank.scaling for low_rank in expert.factors.values()} == {1.0}
    assert {low_rank.rank for low_rank in expert.factors.values()} == {2, 4}


def old(factors: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """The layout between: q_proj.lora_linear_layer.down in CLIP, to_q.lora.down in the UNet."""
    found: dict[str, Tensor] = {}
    for component in COMPONENTS:
        part = {
            f"{name}.lora_{mark}.weight": getattr(low_rank, mark)
            for name, low_rank in factors.items()
            if name.startswith(f"{component}.")
            for mark in "AB"
        }
        found |= convert_state_dict_to_diffusers(part) if part else {}
    return {("text_encoder.text_model." + k[13:] if k.startswith("text_encoder.") else k): t for k, t in found.items()}


def oldest(factors: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """The first layout: attn1.processor.to_q_lora.down in the UNet, self_attn.to_q_lora.down in CLIP."""
    names = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out", "to_out.0": "to_out"}
    found = {}
    for name, low_rank in factors.items():
        key = name.replace("text_encoder.encoder", "text_encoder.text_model.encoder")
        for new, first in names.items():
            key = f"{key.removesuffix(new)}{first}" if key.endswith(new) else key
        key = key.replace(".attn1.", ".attn1.processor.").replace(".attn2.", ".attn2.processor.")
        found |= {f"{key}_lora.down.weight": low_rank.A, f"{key}_lora.up.weight": low_rank.B}
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", [old, oldest])
def test_the_older_layouts(
    layout: Callable[..., dict[str, Tensor]], family: str, pipeline_of: Any, matrices_in: Any, tmp_path: Path
) -> None:
    names = [name for name in matrices_in(family) if name.endswith((*ATTENTION, *CLIP))]
    factors = random_factors(matrices_in(family), names, rank=lambda i: 2 + i % 3, alpha=lambda i: 2.0 + i % 3)
    save_file(layout(factors), tmp_path / FILE)
    expert = read_expert(LoraSpec("x", str(tmp_path)), matrices_in(family))
    assert_same_updates(expert.factors, diffusers_deltas(pipeline_of(family), tmp_path))


def test_keys_of_the_first_scripts_name_no_component(matrices_in: Any, tmp_path: Path) -> None:
    names = [name for name in matrices_in("sd1") if name.startswith("unet.") and name.endswith((*ATTENTION,))]
    factors = random_factors(matrices_in("sd1"), names)
    save_file({key.removeprefix("unet."): t for key, t in oldest(factors).items()}, tmp_path / FILE)
    expert = read_expert(LoraSpec("x", str(tmp_path)), matrices_in("sd1"))
    assert_same_updates(expert.factors, {name: dense(low_rank) for name, low_rank in factors.items()})


def test_alphas_beside_the_factors_are_honoured(matrices_in: Any, tmp_path: Path) -> None:
    names = [name for name in matrices_in("sd1") if name.endswith((*ATTENTION, *CLIP))]
    factors = random_factors(matrices_in("sd1"), names, alpha=lambda i: 1.0 + i % 4)
    tensors = {f"{n}.lora_{mark}.weight": getattr(f, mark) for n, f in factors.items() for mark in "AB"}
    tensors |= {f"{n}.alpha": torch.tensor(f.scaling * f.rank) for n, f in factors.items()}
    save_file(tensors, tmp_path / "x.safetensors")
    expert = read_expert(LoraSpec("x", str(tmp_path)), matrices_in("sd1"))
    assert_same_updates(expert.factors, {name: dense(low_rank) for name, low_rank in factors.items()})


def test_a_prefix_that_peft_leaves_is_removed(matrices_in: Any, tmp_path: Path) -> None:
    names = [name for name in matrices_in("sd1") if name.endswith("to_q")]
    factors = random_factors(matrices_in("sd1"), names)
    keys = {n: n.replace("unet.", "unet.base_model.model.") for n in names}
    save_file({f"{keys[n]}.lora_{m}.weight": getattr(f, m) for n, f in factors.items() for m in "AB"}, tmp_path / FILE)
    expert = read_expert(LoraSpec("x", str(tmp_path)), matrices_in("sd1"))
    assert_same_updates(expert.factors, {name: dense(low_rank) for name, low_rank in factors.items()})


@pytest.mark.parametrize("stored", ["linear", "convolution"])
def test_a_1x1_convolution_and_a_linear_layer_are_the_same(stored: str, matrices_in: Any, tmp_path: Path) -> None:
    # proj_in is a convolution in SD 1.x and linear in SD 2.x; LoRAs store it either way.
    family = "sd1" if stored == "linear" else "sd2"
    name = "unet.mid_block.attentions.0.proj_in"
    a, b = torch.randn(4, 16), torch.randn(16, 4)
    if stored == "convolution":
        a, b = a[..., None, None], b[..., None, None]
    save_file({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, tmp_path / FILE)
    low_rank = read_expert(LoraSpec("x", str(tmp_path)), matrices_in(family)).factors[name]
    assert low_rank.A.shape == (4, *matrices_in(family)[name][1:])
    assert low_rank.B.shape == (16, 4)
    assert torch.equal(dense(low_rank).flatten(), (b.flatten(1) @ a.flatten(1)).flatten())


def test_a_convolutions_factors_have_its_kernel(matrices_in: Any, tmp_path: Path) -> None:
    name = "unet.mid_block.resnets.0.conv1"
    factors = random_factors(matrices_in("sd1"), [name])
    b = factors[name].B[..., None, None]
    save_file({f"{name}.lora_A.weight": factors[name].A, f"{name}.lora_B.weight": b}, tmp_path / FILE)
    info = read_info(LoraSpec("x", str(tmp_path)))
    assert info.matrices == {name: (16, 16, 3, 3)}
    low_rank = read_expert(LoraSpec("x", str(tmp_path)), matrices_in("sd1")).factors[name]
    assert (low_rank.A.shape, low_rank.B.shape) == ((4, 16, 3, 3), (16, 4))


def test_coverage_is_told_by_component(pipeline_of: Any, matrices_in: Any, tmp_path: Path) -> None:
    folder = trained(pipeline_of("sdxl"), tmp_path / "x")
    file = folder / FILE
    tensors = load_file(file)
    extra = {f"unet.elsewhere.lora_{mark}.weight": torch.ones(4, 4) for mark in "AB"}
    save_file(tensors | extra, file)
    found = check_coverage(read_info(LoraSpec("x", str(folder))), matrices_in("sdxl"), allow_partial=True)
    assert found.unmatched == ("unet.elsewhere",)
    # 5 matrices in each of 2 layers; 8 in each of 17 transformer blocks
    assert found.components == {"text_encoder": (10, 10), "text_encoder_2": (10, 10), "unet": (136, 137)}
    assert set(found.info.ranks) == set(found.matched) | set(found.unmatched)


def test_a_text_encoders_patterns_may_say_text_model(matrices_in: Any, tmp_path: Path) -> None:
    # Written under a release of transformers whose CLIP has its layers there.
    name = "text_encoder.encoder.layers.0.self_attn.q_proj"
    stored = name.replace("encoder.layers", "text_model.encoder.layers")
    pattern = '{"^text_model.encoder.layers.0.self_attn.q_proj": 12}'
    text = f'{{"text_encoder.r": 4, "text_encoder.lora_alpha": 4, "text_encoder.alpha_pattern": {pattern}}}'
    tensors = {f"{stored}.lora_A.weight": torch.ones(4, 16), f"{stored}.lora_B.weight": torch.ones(16, 4)}
    save_file(tensors, tmp_path / FILE, metadata={"lora_adapter_metadata": text})
    expert = read_expert(LoraSpec("x", str(tmp_path)), matrices_in("sd1"))
    assert {n: f.scaling for n, f in expert.factors.items()} == {name: 3.0}
