"""LoRA files: reads the layouts of PEFT, diffusers and kohya into experts, and writes them; also SVDiff's shifts.

`source` finds the files, in a folder with `folder`. `keys` knows the tensor names of the layouts (`prefixes`: of their
parts), `settings` and `metadata` the scaling; `info` describes a LoRA without reading its factors. `place` renames its
matrices to those of a base (`module_names`: those of language models; `blocks`: the names in the original Stable
Diffusion code), `coverage` compares it with the base, `tables` the copies of the base's own weights in its file.
`architecture` tells a LoRA of another kind of base before all this (`families`: by its names). `read` (with `factors`)
and the three `write` modules read and write the factors; `svdiff` and `svdiff_expert` do the same for shifts of the
base's singular values.
"""

from __future__ import annotations

from molecli.adapters.architecture import read_info_for
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
    "read_info_for",
    "resolve_source",
    "with_one_alpha",
    "write_diffusers",
    "write_kohya",
    "write_peft",
    "write_svdiff",
]
