"""Every weights file of a LoRA's folder is read, refused or named: a part is never dropped."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lora_pipelines import assert_same_updates, random_factors
from refusals import refused
from safetensors.torch import save_file

from molecli.adapters import LoraSpec, read_expert, read_info
from molecli.adapters.source import lora_files, weights_files

PEFT, DIFFUSERS = "adapter_model.safetensors", "pytorch_lora_weights.safetensors"


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


@pytest.mark.parametrize("unet", [DIFFUSERS, PEFT, "style.safetensors", f"default/{PEFT}", f"style/{DIFFUSERS}"])
@pytest.mark.parametrize("encoder", [PEFT, "te.safetensors"])
def test_each_component_has_its_own_layout(unet: str, encoder: str, tmp_path: Path) -> None:
    touch(tmp_path, f"unet/{unet}", f"text_encoder/{encoder}", "notes.txt")
    there = lora_files(tmp_path)
    assert there.files == {"unet": tmp_path / "unet" / unet, "text_encoder": tmp_path / "text_encoder" / encoder}
    assert there.unread == ()


@pytest.mark.parametrize(
    ("there", "what"),
    [
        ([PEFT, f"unet/{PEFT}"], f"it has weights at its top ({PEFT}) and in unet/"),
        ([DIFFUSERS, "text_encoder/te.safetensors"], f"it has weights at its top ({DIFFUSERS}) and in text_encoder/"),
        ([f"unet/{PEFT}", f"te/{PEFT}"], f"its te/{PEFT} belongs to none of the parts"),
        ([f"unet/{PEFT}", f"text_encoder_one/{DIFFUSERS}"], "its text_encoder_one/"),
        ([f"unet/{PEFT}", "text_encoder/adapter_model.bin"], "it is a pickle"),
        ([f"text_encoder/{PEFT}", "unet/diffusion_pytorch_model.safetensors"], "its unet/ holds diffusion_pytorch_mod"),
        ([f"text_encoder/{PEFT}", "unet/lora.pt"], "its unet/ holds lora.pt, which is no LoRA by its name"),
        ([f"text_encoder/{PEFT}", "unet/a.safetensors", "unet/b.safetensors"], "it has 2 .safetensors files: a.safe"),
        (["te/lora.safetensors"], f"it has no {PEFT}. Name the folder that holds the LoRA, such as"),
    ],
)
def test_parts_that_cannot_be_told_are_refused(there: list[str], what: str, tmp_path: Path) -> None:
    refused(lambda: weights_files(touch(tmp_path, *there)), 2, what)


@pytest.mark.parametrize(
    ("there", "unread"),
    [
        ([PEFT, DIFFUSERS, "other.safetensors"], ["other.safetensors", DIFFUSERS]),
        ([DIFFUSERS, "sks_emb.safetensors"], ["sks_emb.safetensors"]),
        ([PEFT, f"math/{PEFT}"], [f"math/{PEFT}"]),
        ([PEFT, "unet/diffusion_pytorch_model.safetensors"], ["unet/diffusion_pytorch_model.safetensors"]),
        ([f"unet/{PEFT}", "vae/diffusion_pytorch_model.safetensors"], ["vae/diffusion_pytorch_model.safetensors"]),
        # Copies, a training's earlier steps and gates
        ([PEFT, "adapter_model.bin", f"checkpoint-50/{PEFT}", "composition.safetensors", "training_args.bin"], []),
    ],
)
def test_files_beside_those_that_are_read_are_named(there: list[str], unread: list[str], tmp_path: Path) -> None:
    found = lora_files(touch(tmp_path, *there)).unread
    assert [file.relative_to(tmp_path).as_posix() for file in found] == unread


def test_a_warning_says_what_is_not_read(tmp_path: Path) -> None:
    for name in (DIFFUSERS, "more.safetensors"):
        save_file({f"unet.mid_block.to_q.lora_{m}.weight": torch.ones(2, 2) for m in "AB"}, tmp_path / name)
    with pytest.warns(UserWarning, match=r"x: 1 other weights file\(s\) in .* are not read: more.safetensors"):
        read_info(LoraSpec("x", str(tmp_path)))


def test_a_matrix_in_two_files_is_refused(tmp_path: Path) -> None:
    for part in ("unet", "text_encoder"):
        (tmp_path / part).mkdir()
        factors = {f"unet.mid_block.to_q.lora_{m}.weight": torch.ones(2, 2) for m in "AB"}
        save_file(factors, tmp_path / part / DIFFUSERS)
    refused(lambda: read_info(LoraSpec("x", str(tmp_path))), 3, "two of its files adapt 'unet.mid_block.to_q'")


def test_parts_that_diffusers_and_peft_saved(pipeline_of: Any, matrices_in: Any, tmp_path: Path) -> None:
    # unet.save_lora_adapter writes diffusers' file name with bare keys, text_encoder.save_pretrained PEFT's.
    pipeline = copy.deepcopy(pipeline_of("sdxl"))
    deltas = {}
    for part, targets in {"unet": ["to_q", "conv1"], "text_encoder": ["q_proj"], "text_encoder_2": ["fc1"]}.items():
        model = getattr(pipeline, part)
        model.add_adapter(peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, target_modules=targets))
        save = model.save_lora_adapter if part == "unet" else model.save_pretrained
        deltas |= {
            f"{part}.{name}": module.get_delta_weight("default").detach()
            for name, module in model.named_modules()
            if isinstance(module, peft.tuners.lora.LoraLayer)
        }
        save(str(tmp_path / part))
    assert (tmp_path / "unet" / DIFFUSERS).is_file()
    assert_same_updates(read_expert(LoraSpec("x", str(tmp_path)), matrices_in("sdxl")).factors, deltas)


def test_on_the_hub_a_part_of_another_name_is_downloaded_too(tmp_path: Path, monkeypatch: Any) -> None:
    from fnmatch import fnmatch

    from molecli.adapters import resolve_source

    stored = [f"text_encoder/{PEFT}", "unet/style.safetensors", "vae/diffusion_pytorch_model.safetensors"]

    def snapshot(repository: str, *, allow_patterns: list[str]) -> str:
        touch(tmp_path, *(name for name in stored if any(fnmatch(name, p) for p in allow_patterns)))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda self, repository: list(stored))
    assert set(weights_files(resolve_source(LoraSpec("x", "org/lora")))) == {"unet", "text_encoder"}
    assert not (tmp_path / "vae").exists()
    stored[1] = "unet/adapter_model.bin"
    refused(lambda: resolve_source(LoraSpec("x", "org/other")), 2, "org/other/unet/adapter_model.bin: it is a pickle")


def test_a_configuration_for_everything_counts_for_each_component(matrices_in: Any, tmp_path: Path) -> None:
    # PEFT around a whole pipeline: names and patterns begin with the component, or do not.
    names = [name for name in matrices_in("sd1") if name.startswith("unet.") and name.endswith("attn1.to_q")]
    patterns = {"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q": 8, "^up_blocks.1.*": 2}

    def alpha(i: int) -> float:
        return 8 if "mid_block" in names[i] else 2 if "up_blocks.1" in names[i] else 4

    factors = random_factors(matrices_in("sd1"), names, alpha=alpha)
    tensors = {f"base_model.model.{n}.lora_{m}.weight": getattr(f, m) for n, f in factors.items() for m in "AB"}
    save_file(tensors, tmp_path / PEFT)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "alpha_pattern": patterns}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    found = read_expert(LoraSpec("x", str(tmp_path)), matrices_in("sd1")).factors
    assert {n: f.scaling for n, f in found.items()} == {n: f.scaling for n, f in factors.items()}
