"""Trained LoRAs in files: PEFT's, diffusers' and kohya's layouts, read into experts and written back; SVDiff's shifts.

`lora_spec` names them and `source` finds them. `keys` knows the layouts' tensor names, `settings` and `metadata` what
scales them; `info` describes a LoRA without its factors. `place` gives it a base's names (`blocks`: the names of the
original Stable Diffusion code), `coverage` and `architecture` compare it with the base. `read` and the three `write`
modules move the factors; `svdiff` and `shifted` do the same for shifts of the base's singular values.
"""

from __future__ import annotations

from molecli.adapters.coverage import Coverage, check_coverage, coverage
from molecli.adapters.info import AdapterInfo, read_info
from molecli.adapters.place import place
from molecli.adapters.read import read_expert
from molecli.adapters.source import resolve_source
from molecli.adapters.svdiff import Origin, write_svdiff
from molecli.adapters.weights import Shape
from molecli.adapters.write import write_peft
from molecli.adapters.write_diffusers import write_diffusers
from molecli.adapters.write_kohya import with_one_alpha, write_kohya
from molecli.files.lora_spec import LoraLike, LoraSpec, check_distinct, parse_lora, parse_loras

__all__ = [
    "AdapterInfo",
    "Coverage",
    "LoraLike",
    "LoraSpec",
    "Origin",
    "Shape",
    "check_coverage",
    "check_distinct",
    "coverage",
    "parse_lora",
    "parse_loras",
    "place",
    "read_expert",
    "read_info",
    "resolve_source",
    "with_one_alpha",
    "write_diffusers",
    "write_kohya",
    "write_peft",
    "write_svdiff",
]
