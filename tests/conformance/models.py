"""Tiny random models of the architectures of transformers. Contents: Architecture, build, adapted."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

Kind = Literal["decoder", "experts", "recurrent", "encoder-decoder", "multimodal"]

# Not the language model's: a LoRA there reads no tokens of the prompt.
_NOT_TEXT = re.compile(r"vision|visual|audio|image|projector|connector|aligner|vq|pooler|patch|router|score|per_layer")


@dataclass(frozen=True)
class Architecture:
    """A row.

    name: its `model_type`; kind: the part of the table; settings: of its configuration; cls: the class, by default that
    of the kind's auto class; leave: a pattern of linear layers that PEFT cannot adapt or the model does not call.
    """

    name: str
    kind: Kind
    settings: Mapping[str, Any] = field(default_factory=dict)
    cls: str = ""
    leave: str = ""


def build(row: Architecture) -> Any:
    """A random model, the same at each call, in evaluation mode and frozen."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(row.name, **row.settings)
    auto = "AutoModelForSeq2SeqLM" if row.kind == "encoder-decoder" else "AutoModelForCausalLM"
    model = getattr(transformers, row.cls)(config) if row.cls else getattr(transformers, auto).from_config(config)
    model = model.float().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "conv" not in name:  # so that logits are far from uniform
            parameter.normal_(0, 0.2, generator=generator)
    if (generation := getattr(model, "generation_config", None)) is not None:
        for setting in ("forced_eos_token_id", "forced_bos_token_id", "max_length", "num_beams"):
            setattr(generation, setting, None)
    return model


def adapted(row: Architecture, model: nn.Module) -> list[str]:
    """The linear layers of the language model that the LoRAs of the suite adapt: all but the output head."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    left = re.compile(row.leave) if row.leave else None
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and module is not head
        and not _NOT_TEXT.search(name)
        and not (left and left.search(name))
    ]
