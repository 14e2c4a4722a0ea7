"""The columns about adapter files: the same LoRA under other names, on the output head, on the experts' fused weights.

Contents: FILES.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.conformance.calls import Call, Pairs, Way
from tests.conformance.models import build
from tests.conformance.subject import FIXED, Subject

PREFIX = "base_model.model."


def renamed(subject: Subject, folder: Path, name: Callable[[str], str]) -> dict[str, str]:
    """The subject's LoRAs with other names of modules: copies in `folder`, by LoRA."""
    copies = {}
    for lora, source in subject.loras.items():
        copies[lora] = str(shutil.copytree(source, folder / lora, dirs_exist_ok=True))
        tensors = load_file(Path(source) / "adapter_model.safetensors")
        changed = {PREFIX + name(key.removeprefix(PREFIX)): tensor for key, tensor in tensors.items()}
        save_file(changed, folder / lora / "adapter_model.safetensors")
        config = json.loads((folder / lora / "adapter_config.json").read_text())
        config["target_modules"] = sorted({key.rsplit(".lora_", 1)[0].rsplit(".", 1)[-1] for key in changed})
        (folder / lora / "adapter_config.json").write_text(json.dumps(config))
    return copies


def _before_weight(infix: str) -> Callable[[str], str]:
    return lambda key: key.replace(".lora_A.", f"{infix}.lora_A.").replace(".lora_B.", f"{infix}.lora_B.")


def _inside_layers(wrapper: str) -> Callable[[str], str]:
    """The wrapper's name after each number, as activation checkpointing and FSDP put it around a layer."""
    return lambda key: ".".join(part + f".{wrapper}" * part.isdigit() for part in key.split("."))


WRAPPERS: Mapping[str, Callable[[str], str]] = {
    "module": lambda key: f"module.{key}",
    "orig_mod": lambda key: f"_orig_mod.{key}",
    "doubled": lambda key: PREFIX + key,
    "base_layer": _before_weight(".base_layer"),
    "fsdp": _inside_layers("_fsdp_wrapped_module"),
    "checkpoint": _inside_layers("_checkpoint_wrapped_module"),
    "default": lambda key: key.replace(".weight", ".default.weight"),
}


def wrapper_names(call: Call) -> Pairs:
    """LoRAs that were trained inside wrappers."""
    yield from _same(call, WRAPPERS)


def older_names(call: Call) -> Pairs:
    """LoRAs with the names that the modules had on the bare model, and in transformers 4."""
    subject = call.subject
    bare = f"{subject.model.base_model_prefix}."
    older: dict[str, Callable[[str], str]] = {}
    if all(name.startswith(bare) for name in subject.matrices):
        older["bare"] = lambda key: key.removeprefix(bare)
    if subject.row.kind == "multimodal" and "model.language_model." in subject.matrices[0]:
        older["four"] = lambda key: key.replace("model.language_model.", "language_model.model.")
    if not older:
        raise NotImplementedError("its modules have always had these names")
    yield from _same(call, older)


def _same(call: Call, names: Mapping[str, Callable[[str], str]]) -> Pairs:
    with call.mixed():
        expected = call.plain(call.model)
    for kind, name in names.items():
        with call.mixed(loras=renamed(call.subject, call.subject.folder / kind, name)):
            yield call.plain(call.model), expected


def _pefts(call: Call, kind: str, **settings: Any) -> Pairs:
    """One LoRA with these settings of PEFT's, against PEFT; a single gate is 1."""
    subject = call.subject
    model: Any = build(subject.row)
    config = peft.LoraConfig(r=4, lora_alpha=8, **settings)
    adapted: Any = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(7)
    for key, parameter in adapted.named_parameters():
        if "lora_" in key:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(str(subject.folder / kind))
    expected = call.plain(adapted)
    changes = {"weights": None} if call.mode in FIXED else {}
    with call.mixed(loras={"c": str(subject.folder / kind)}, **changes):
        found = call.plain(call.model)
    yield found, found if call.mode is None else expected


def head(call: Call) -> Pairs:
    """A LoRA that adapts the output head too."""
    subject = call.subject
    module = subject.model.get_output_embeddings()
    if not isinstance(module, nn.Linear):
        raise NotImplementedError("it has no output head of its own")
    name = next(name for name, found in subject.model.named_modules() if found is module)
    yield from _pefts(call, "head", target_modules=[*subject.matrices[:4], name])


def experts(call: Call) -> Pairs:
    """A LoRA on the experts' fused weights of three axes."""
    subject = call.subject
    names = [name for name, parameter in subject.model.named_parameters() if parameter.dim() == 3 and "expert" in name]
    if not names:
        raise NotImplementedError("it has no fused experts")
    parameters = sorted({".".join(name.split(".")[-2:]) for name in names})
    yield from _pefts(call, "experts", target_modules=subject.matrices[:2], target_parameters=parameters)


FEW = ("linear", "prompt/block")
FILES: Mapping[str, Way] = {
    "wrapper_names": Way("names from wrappers", wrapper_names, attaches=True, modes=FEW),
    "older_names": Way("older names", older_names, attaches=True, modes=FEW),
    "head": Way("output head adapted", head, attaches=True, modes=FEW),
    "experts": Way("fused experts adapted", experts, attaches=True, modes=FEW),
}
