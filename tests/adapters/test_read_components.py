"""PEFT's folders for parts of a pipeline: one without a component's name, or one for each component."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lora_pipelines import assert_same_updates, pipeline_matrices
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from molecli.adapters import LoraSpec, read_expert, read_info

TARGETS = {"unet": ["to_q", "to_v", "conv1"], "text_encoder": ["q_proj", "fc1"], "text_encoder_2": ["q_proj", "fc1"]}


def adapt(pipeline: Any, component: str, folder: Path, **settings: Any) -> dict[str, Tensor]:
    """ΔW by matrix of the adapter of `component` that PEFT saved in `folder`."""
    torch.manual_seed(2)
    config = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS[component], **settings}
    model = peft.get_peft_model(copy.deepcopy(getattr(pipeline, component)), peft.LoraConfig(**config))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    model.save_pretrained(str(folder))
    modules = model.base_model.model.named_modules()
    return {
        f"{component}.{name}": module.get_delta_weight("default").detach()
        for name, module in modules
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


@pytest.mark.parametrize(
    ("family", "component"), [("sd1", "unet"), ("sd2", "text_encoder"), ("sdxl", "text_encoder_2"), ("sdxl", "unet")]
)
def test_a_folder_of_one_component(
    family: str, component: str, pipeline_of: Any, matrices_in: Any, tmp_path: Path
) -> None:
    deltas = adapt(pipeline_of(family), component, tmp_path, rank_pattern={"to_q": 2}, alpha_pattern={"fc1": 3})
    assert_same_updates(read_expert(LoraSpec("x", str(tmp_path)), matrices_in(family)).factors, deltas)


@pytest.mark.parametrize("wrapped", ["_orig_mod.", "module.", "_fsdp_wrapped_module."])
def test_a_component_saved_while_it_was_wrapped(
    wrapped: str, pipeline_of: Any, matrices_in: Any, tmp_path: Path
) -> None:
    deltas = adapt(pipeline_of("sd1"), "unet", tmp_path, rank_pattern={"to_q": 2})
    file, start = tmp_path / "adapter_model.safetensors", "base_model.model."
    save_file({key.replace(start, start + wrapped): tensor for key, tensor in load_file(file).items()}, file)
    assert_same_updates(read_expert(LoraSpec("x", str(tmp_path)), matrices_in("sd1")).factors, deltas)


def test_a_folder_for_each_component(pipeline_of: Any, matrices_in: Any, tmp_path: Path) -> None:
    deltas = adapt(pipeline_of("sdxl"), "unet", tmp_path / "unet", r=3)
    deltas |= adapt(pipeline_of("sdxl"), "text_encoder", tmp_path / "text_encoder", use_rslora=True)
    deltas |= adapt(pipeline_of("sdxl"), "text_encoder_2", tmp_path / "text_encoder_2")
    expert = read_expert(LoraSpec("x", str(tmp_path)), matrices_in("sdxl"))
    assert_same_updates(expert.factors, deltas)
    info = read_info(LoraSpec("x", str(tmp_path)))
    assert (info.path, info.rank, expert.sha256) == (tmp_path, 3, info.sha256)


def test_a_changed_part_changes_the_hash(pipeline_of: Any, tmp_path: Path) -> None:
    adapt(pipeline_of("sd1"), "unet", tmp_path / "unet")
    adapt(pipeline_of("sd1"), "text_encoder", tmp_path / "text_encoder")
    before = read_info(LoraSpec("x", str(tmp_path))).sha256
    adapt(pipeline_of("sd1"), "text_encoder", tmp_path / "text_encoder", target_modules=["k_proj"])
    after = read_info(LoraSpec("x", str(tmp_path))).sha256
    shutil.rmtree(tmp_path / "text_encoder")
    assert len({before, after, read_info(LoraSpec("x", str(tmp_path))).sha256}) == 3


def test_a_name_that_two_encoders_have(pipeline_of: Any, tmp_path: Path, explained: Any) -> None:
    pipeline = copy.copy(pipeline_of("sdxl"))
    pipeline.text_encoder = copy.deepcopy(pipeline.text_encoder_2)
    adapt(pipeline, "text_encoder_2", tmp_path)
    message = f"x ({tmp_path / 'adapter_model.safetensors'}): it does not say whether it adapts text_encoder or "
    message += "text_encoder_2, and it fits both. Put it into a subfolder with the name of the right one, such as "
    message += "text_encoder/."
    explained(lambda: read_expert(LoraSpec("x", str(tmp_path)), pipeline_matrices(pipeline)), 3, message)
