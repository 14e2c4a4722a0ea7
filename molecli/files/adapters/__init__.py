"""Trained LoRAs in files: PEFT folders and single .safetensors, read into experts and written back.

`spec` names them, `source` finds them, `settings` holds what scales them, `info` describes them without their
tensors, `coverage` compares them with a base, `read` and `write` move the factors.
"""

from __future__ import annotations

from molecli.files.adapters.coverage import Coverage, check_coverage, coverage
from molecli.files.adapters.info import AdapterInfo, read_info
from molecli.files.adapters.read import read_expert
from molecli.files.adapters.source import resolve_source
from molecli.files.adapters.write import write_peft
from molecli.files.lora_spec import LoraLike, LoraSpec, check_distinct, parse_lora, parse_loras

__all__ = [
    "AdapterInfo",
    "Coverage",
    "LoraLike",
    "LoraSpec",
    "check_coverage",
    "check_distinct",
    "coverage",
    "parse_lora",
    "parse_loras",
    "read_expert",
    "read_info",
    "resolve_source",
    "write_peft",
]
