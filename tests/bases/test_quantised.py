"""Quantised checkpoints: loaded as transformers wants them, in the asked type, or refused with what is missing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from molecli.bases.loading import load_backbone, load_skeleton
from molecli.config import BaseConfig
from molecli.errors import MismatchError, RunError, UsageError
from molecli.functional.fingerprint import fingerprint, same_base
from molecli.mixture.layout import adaptable_matrices

IDS = torch.arange(10, 22)[None]
BLOCK = 16


def rewritten(source: Path, folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]], **config: Any) -> Path:
    """A copy of a base with other tensors and a `quantization_config`."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    file = folder / "config.json"
    stated = json.loads(file.read_text()) | {"quantization_config": config}
    file.write_text(json.dumps(stated))
    return folder


def logits(backbone: Any) -> torch.Tensor:
    with torch.no_grad():
        return backbone.model(IDS).logits.float()


@pytest.fixture
def fp8(tiny_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """A Llama in float8 with a scale per block, as DeepSeek and Qwen publish theirs; the rest in bfloat16."""

    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        out = {}
        for name, value in tensors.items():
            if not name.endswith("proj.weight"):
                out[name] = value.bfloat16()
                continue
            rows, columns = value.shape
            blocks = value.view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
            scale = blocks.abs().amax((1, 3)) / 448
            out[name] = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn).view(rows, columns)
            out[f"{name}_scale_inv"] = scale
        return out

    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    return rewritten(tiny_folder("llama"), tmp_path / "fp8", change, **config)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fp8_is_dequantised_where_there_is_no_kernel(fp8: Path, tiny_folder: Callable[..., Path], dtype: str) -> None:
    with pytest.warns(UserWarning, match=f"its fp8 weights are dequantised to {dtype}"):
        backbone = load_backbone(BaseConfig(id=str(fp8), dtype=dtype), "cpu")
    assert {str(parameter.dtype) for parameter in backbone.model.parameters()} == {f"torch.{dtype}"}
    plain = logits(load_backbone(BaseConfig(id=str(tiny_folder("llama"))), "cpu"))
    distance = float((logits(backbone) - plain).norm() / plain.norm())
    assert 1e-3 < distance < 0.3


def test_a_fingerprint_is_the_same_at_every_loading_and_fits_the_skeleton(fp8: Path) -> None:
    base = BaseConfig(id=str(fp8))
    with pytest.warns(UserWarning, match="dequantised"):
        backbones = [load_backbone(base, "cpu") for _ in range(2)]
    assert backbones[0].fingerprint() == backbones[1].fingerprint()
    skeleton = load_skeleton(base)
    assert same_base(fingerprint(skeleton), backbones[0].fingerprint())
    assert adaptable_matrices(skeleton) == backbones[0].matrices()


def test_published_mxfp4_loads_without_a_gpu(make_tiny: Callable[..., Any], tmp_path: Path) -> None:
    import transformers

    config = transformers.GptOssConfig(
        vocab_size=262, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=512,
        pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.GptOssForCausalLM(config).bfloat16().save_pretrained(tmp_path / "plain")
    make_tiny("llama").tokenizer.save_pretrained(tmp_path / "plain")

    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        out = {}
        for name, value in tensors.items():
            if not name.endswith(("gate_up_proj", "down_proj")):
                out[name] = value
                continue
            experts, d_in, d_out = value.shape
            out[f"{name}_blocks"] = torch.randint(0, 256, (experts, d_out, d_in // 32, 16), dtype=torch.uint8)
            out[f"{name}_scales"] = torch.full((experts, d_out, d_in // 32), 122, dtype=torch.uint8)
        return out

    folder = rewritten(tmp_path / "plain", tmp_path / "mxfp4", change, quant_method="mxfp4")
    with pytest.warns(UserWarning, match="its mxfp4 weights are dequantised to float32"):
        backbone = load_backbone(BaseConfig(id=str(folder)), "cpu")
    assert {parameter.dtype for parameter in backbone.model.parameters()} == {torch.float32}
    assert logits(backbone).isfinite().all()
    assert set(backbone.matrices()) == {
        f"model.layers.{layer}.self_attn.{leaf}_proj" for layer in (0, 1) for leaf in "qkvo"
    }


REFUSED = [
    ({"quant_method": "foo"}, UsageError, 2, "it is quantised by 'foo', which transformers"),
    ({"bits": 3}, UsageError, 2, "it is quantised by 'unknown', which transformers"),
    ({"quant_method": "aqlm"}, RunError, 1, "it is quantised (aqlm), which needs the package aqlm. Run: pip install"),
    ({"quant_method": "vptq"}, RunError, 1, "it is quantised (vptq), which needs the package vptq. Run: pip install"),
    ({"quant_method": "nvfp4"}, RunError, 1, "it is quantised (nvfp4), and cannot be loaded on this machine (Value"),
]


@pytest.mark.parametrize(("config", "kind", "code", "what"), REFUSED)
def test_what_cannot_be_loaded_here_is_named(
    tiny_folder: Callable[..., Path], tmp_path: Path, config: dict[str, Any], kind: Any, code: int, what: str
) -> None:
    folder = rewritten(tiny_folder("llama"), tmp_path / "q", lambda tensors: tensors, **config)
    with pytest.raises(kind) as caught:
        load_backbone(BaseConfig(id=str(folder)), "cpu")
    assert str(caught.value).startswith(f"base {folder}: {what}")
    assert caught.value.exit_code == code


def test_a_missing_library_is_named(
    tiny_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.quantizers import quantizer_bnb_4bit

    monkeypatch.setattr(quantizer_bnb_4bit, "is_bitsandbytes_available", lambda *_: False)
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    folder = rewritten(tiny_folder("llama"), tmp_path / "q", lambda tensors: tensors, **config)
    with pytest.raises(RunError) as caught:
        load_backbone(BaseConfig(id=str(folder)), "cpu")
    assert str(caught.value) == (
        f"base {folder}: it is quantised (bitsandbytes), which needs the package bitsandbytes. "
        "Run: pip install bitsandbytes."
    )


def test_a_damaged_quantised_base_is_called_damaged(fp8: Path) -> None:
    file = fp8 / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(MismatchError, match="damaged or incomplete"):
        load_backbone(BaseConfig(id=str(fp8)), "cpu")


def test_a_type_that_the_method_needs_is_said(fp8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "update_dtype", lambda self, dtype: torch.bfloat16)
    with pytest.warns(UserWarning, match="its quantisation needs bfloat16, so --dtype float32 has no effect"):
        backbone = load_backbone(BaseConfig(id=str(fp8), dtype="float32"), "cpu")
    assert backbone.model.dtype is torch.bfloat16


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bitsandbytes_checkpoints_load_in_the_asked_type(
    tiny_folder: Callable[..., Path], tmp_path: Path, bits: int, dtype: str
) -> None:
    pytest.importorskip("bitsandbytes")
    import transformers

    asked = transformers.BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    source, folder = tiny_folder("llama"), tmp_path / "bnb"
    shutil.copytree(source, folder)
    made = transformers.AutoModelForCausalLM.from_pretrained(source, quantization_config=asked, dtype=torch.float16)
    made.save_pretrained(folder)
    base = BaseConfig(id=str(folder), dtype=dtype)
    backbone, again = load_backbone(base, "cpu"), load_backbone(base, "cpu")
    assert str(backbone.model.dtype) == f"torch.{dtype}"
    assert backbone.fingerprint() == again.fingerprint()
    assert json.loads(backbone.fingerprint())["quantised"] == f"bitsandbytes {bits} bit"
    assert same_base(backbone.fingerprint(), fingerprint(load_skeleton(base)))
    first = logits(backbone)
    assert torch.equal(first, logits(backbone))
    assert torch.equal(first, logits(again))
    assert backbone.fingerprint() == again.fingerprint()


@pytest.mark.parametrize("width", ["4bit", "8bit"])
def test_a_plain_base_is_quantised_while_it_is_loaded(tiny_folder: Callable[..., Path], width: str) -> None:
    pytest.importorskip("bitsandbytes")
    base = BaseConfig(id=str(tiny_folder("llama")), quantize=width)
    backbone, again = load_backbone(base, "cpu"), load_backbone(base, "cpu")
    assert json.loads(backbone.fingerprint())["quantised"] == f"bitsandbytes {width[0]} bit"
    assert backbone.fingerprint() == again.fingerprint()
    assert backbone.matrices() == adaptable_matrices(load_skeleton(base))
    plain = logits(load_backbone(BaseConfig(id=base.id), "cpu"))
    assert 1e-3 < float((logits(backbone) - plain).norm() / plain.norm()) < 1
    assert {p.dtype for p in backbone.model.parameters() if p.is_floating_point()} == {torch.float32}


def test_what_is_quantised_already_or_a_pipeline_is_not_quantised(
    fp8: Path, pipeline_folder: Callable[..., Path]
) -> None:
    with pytest.raises(UsageError) as caught:
        load_backbone(BaseConfig(id=str(fp8), quantize="4bit"), "cpu")
    assert str(caught.value) == f"--quantize: base {fp8} is quantised already (fp8). Leave it out."
    base = BaseConfig(id=str(pipeline_folder("sd")), quantize="8bit")
    for load in (load_backbone, load_skeleton):
        with pytest.raises(UsageError) as caught:
            load(base)
        assert str(caught.value) == (
            f"--quantize: {base.id} is a pipeline, and only language models are quantised while they are loaded. "
            "Save a pipeline with quantised parts, and name that."
        )


def test_quantising_without_the_library_names_it(
    tiny_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.quantizers import quantizer_bnb_8bit

    monkeypatch.setattr(quantizer_bnb_8bit, "is_bitsandbytes_available", lambda *_: False)
    base = BaseConfig(id=str(tiny_folder("llama")), quantize="8bit")
    with pytest.raises(RunError, match="which needs the package bitsandbytes"):
        load_backbone(base, "cpu")
