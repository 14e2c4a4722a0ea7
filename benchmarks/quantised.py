"""Mixtures on quantised bases against PEFT on the same base, for every quantiser that is installed here.

    python benchmarks/quantised.py                      # on CUDA if there is one; --device cpu for a first look

The base is a small random Llama (for mxfp4, a GPT-OSS). Columns, each a norm of a difference relative to the norm:

peft      the weighted sum of two LoRAs, by mole and by PEFT
true      the same by mole, and what float32 gives on the dequantised weights; in brackets PEFT's distance from it
gated     one LoRA under learned gates, which must be that LoRA, by mole and by PEFT
dense     a layer's output, and its input times the weight that `BaseWeights.dense` reads
restored  whether logits and fingerprint are those of before, bit for bit
again     whether the base has the same fingerprint when it is loaded again

A quantiser that cannot run here has the reason in its row.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from molecli import attach
from molecli.bases.quantised import settled
from molecli.bases.weights import BaseWeights
from molecli.functional.fingerprint import fingerprint, same_base
from molecli.mixture.layout import adaptable_matrices

WEIGHTS = {"a": 0.7, "b": -0.4}
RANKS = {"a": 8, "b": 4}
IDS = torch.randint(3, 500, (2, 24), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Row:
    """A quantiser: its configuration for a compute type; `folder` makes another base than the Llama."""

    name: str
    config: Callable[[torch.dtype], Any]
    folder: Callable[[Path], Path] | None = None


def bitsandbytes(dtype: torch.dtype, **settings: Any) -> Any:
    import_module("bitsandbytes")
    return transformers.BitsAndBytesConfig(bnb_4bit_compute_dtype=dtype, **settings)


def torchao(name: str, **settings: Any) -> Any:
    module = import_module("torchao.quantization")
    return transformers.TorchAoConfig(getattr(module, name)(**settings))


def quanto(weights: str) -> Any:
    import_module("optimum.quanto")
    return transformers.QuantoConfig(weights=weights)


ROWS = (
    Row("unquantised", lambda dtype: None),
    Row("bitsandbytes nf4", lambda d: bitsandbytes(d, load_in_4bit=True, bnb_4bit_quant_type="nf4")),
    Row(
        "bitsandbytes nf4, double",
        lambda d: bitsandbytes(d, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    ),
    Row("bitsandbytes int8", lambda d: bitsandbytes(d, load_in_8bit=True)),
    Row("torchao int8", lambda d: torchao("Int8WeightOnlyConfig")),
    Row("torchao int4", lambda d: torchao("Int4WeightOnlyConfig", group_size=32)),
    Row("torchao float8", lambda d: torchao("Float8WeightOnlyConfig")),
    Row("torchao int8, dynamic", lambda d: torchao("Int8DynamicActivationInt8WeightConfig")),
    Row("quanto int8", lambda d: quanto("int8")),
    Row("quanto int4", lambda d: quanto("int4")),
    Row("fp8, fine-grained", lambda d: transformers.FineGrainedFP8Config()),
    Row("fp8, dequantised", lambda d: None, lambda root: fp8_folder(root)),
    Row("mxfp4", lambda d: None, lambda root: mxfp4_folder(root)),
)


def llama_folder(root: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    return _saved(transformers.LlamaForCausalLM(config), root / "llama")


def fp8_folder(root: Path, side: int = 128) -> Path:
    """The Llama as a checkpoint in float8 with a scale per block; its loading may dequantise it."""
    folder = llama_folder(root / "fp8")

    def packed(name: str, value: Tensor) -> dict[str, Tensor]:
        if not name.endswith("proj.weight"):
            return {name: value.bfloat16()}
        rows, columns = value.shape
        blocks = value.view(rows // side, side, columns // side, side)
        scale = blocks.abs().amax((1, 3)) / 448
        whole = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn).view(rows, columns)
        return {name: whole, f"{name}_scale_inv": scale}

    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [side, side]}
    return _rewritten(folder, packed, config | {"dequantize": True})


def mxfp4_folder(root: Path) -> Path:
    """A GPT-OSS whose experts are in mxfp4, with random bits."""
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        vocab_size=512, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=256,
        pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    folder = _saved(transformers.GptOssForCausalLM(config).bfloat16(), root / "mxfp4")

    def packed(name: str, value: Tensor) -> dict[str, Tensor]:
        if not name.endswith(("gate_up_proj", "down_proj")):
            return {name: value}
        experts, d_in, d_out = value.shape
        blocks = torch.randint(0, 256, (experts, d_out, d_in // 32, 16), dtype=torch.uint8)
        return {f"{name}_blocks": blocks, f"{name}_scales": torch.full(blocks.shape[:3], 122, dtype=torch.uint8)}

    return _rewritten(folder, packed, {"quant_method": "mxfp4"})


def _saved(model: Any, folder: Path) -> Path:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)
    return folder


def _rewritten(folder: Path, change: Callable[[str, Tensor], dict[str, Tensor]], config: dict[str, Any]) -> Path:
    tensors: dict[str, Tensor] = {}
    for name, value in load_file(folder / "model.safetensors").items():
        tensors |= change(name, value)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": config}))
    return folder


def make_loras(model: Any, root: Path) -> dict[str, str]:
    """Two LoRAs on all linear layers but the experts, written by PEFT."""
    folders = {}
    for seed, (name, rank) in enumerate(RANKS.items()):
        config = peft.LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=list(adaptable_matrices(model)), task_type="CAUSAL_LM"
        )
        adapted: Any = peft.get_peft_model(copy.deepcopy(model), config)
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in adapted.named_parameters():
            if "lora_" in key:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        adapted.save_pretrained(root / name)
        folders[name] = str(root / name)
    return folders


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS.to(model.device)).logits.float().cpu()


def through_peft(model: Any, loras: dict[str, str], weights: dict[str, float]) -> Tensor:
    first, *others = weights
    adapted: Any = peft.PeftModel.from_pretrained(model, loras[first], adapter_name=first)
    for name in others:
        adapted.load_adapter(loras[name], adapter_name=name)
    adapted.add_weighted_adapter(list(weights), list(weights.values()), "sum", combination_type="cat")
    adapted.set_adapter("sum")
    found = logits(adapted)
    adapted.unload()
    return found


def true_model(folder: Path, model: Any) -> Any:
    """The model on the CPU in float32, with what the quantised weights stand for. None if they cannot be read."""
    twin = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    weights = BaseWeights(model)
    for name in adaptable_matrices(model):
        twin.get_submodule(name).weight.data = weights.dense(name).cpu()
    for name, parameter in twin.named_parameters():
        if name.removesuffix(".weight") not in adaptable_matrices(model):
            parameter.data = model.get_parameter(name).data.float().cpu()
    return twin.eval()


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def measured(row: Row, dtype: torch.dtype, device: str, root: Path) -> list[str]:
    folder = (row.folder or llama_folder)(root / row.name.replace(" ", "_"))

    def load() -> Any:
        options = {} if row.config(dtype) is None else {"quantization_config": row.config(dtype)}
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, device_map={"": device}, **options
        )
        return settled(model, dtype).eval().requires_grad_(False)

    plain = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(folder), dtype=torch.float32
    )
    model, loras = load(), make_loras(plain, root / f"loras-{row.name}")
    assert adaptable_matrices(model) == adaptable_matrices(plain), "other matrices"
    before, made, matrix = logits(model), fingerprint(model), "model.layers.0.self_attn.q_proj"
    with attach(model, loras=loras, mode="linear", weights=WEIGHTS):
        ours = logits(model)
    with attach(model, loras={"a": loras["a"]}, mode="gated"):
        gated = logits(model)
    restored = torch.equal(logits(model), before) and fingerprint(model) == made
    again = same_base(fingerprint(load()), made)
    x = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = model.get_submodule(matrix)(x.to(device, dtype)).float().cpu()
    bias = getattr(model.get_submodule(matrix), "bias", None)
    dense = x.to(dtype).float() @ BaseWeights(model).dense(matrix).cpu().T + (0 if bias is None else bias.float().cpu())
    true = through_peft(true_model(folder, model), loras, WEIGHTS)
    theirs, one = through_peft(load(), loras, WEIGHTS), through_peft(load(), loras, {"a": 1.0})
    return [
        f"{apart(ours, theirs):.1e}", f"{apart(ours, true):.1e} ({apart(theirs, true):.1e})",
        f"{apart(gated, one):.1e}", f"{apart(y, dense):.1e}", str(restored), str(again),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="")
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    arguments = parser.parse_args()
    half = "bfloat16" if arguments.device != "cpu" else "float32"
    dtype = getattr(torch, arguments.dtype or half)
    transformers.logging.set_verbosity_error()
    line = "{:26} {:9} {:19} {:9} {:9} {:9} {}"
    print(f"{arguments.device}, {dtype}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(line.format("base", "peft", "true", "gated", "dense", "restored", "again"))
    for row in ROWS:
        if arguments.only not in row.name:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            try:
                print(line.format(row.name, *measured(row, dtype, arguments.device, Path(scratch))), flush=True)
            except Exception as error:  # a missing package, a missing kernel, no support for the device
                print(f"{row.name:26} {type(error).__name__}: {str(error).splitlines()[0][:120]}", flush=True)


if __name__ == "__main__":
    main()
