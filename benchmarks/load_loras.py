"""How long 32 LoRAs of the embedded base take to load, check and attach (copies of the embedded ones).

python benchmarks/load_loras.py
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

from molecli.bases.loading import load_backbone
from molecli.catalog.builtin import builtin_loras
from molecli.config import BaseConfig
from molecli.files.lora_spec import LoraSpec
from molecli.mixture.attach import read_experts
from molecli.mixture.build import build_mixture

COUNT = 32


def main() -> None:
    backbone = load_backbone(BaseConfig(), "cpu")
    with tempfile.TemporaryDirectory() as folder:
        specs = []
        for i, source in zip(range(COUNT), list(builtin_loras().values()) * COUNT, strict=False):
            specs.append(LoraSpec(f"lora{i}", str(shutil.copytree(source, Path(folder) / f"lora{i}"))))
        start_s = time.perf_counter()
        experts = read_experts(backbone.model, specs)
        read_s = time.perf_counter() - start_s
        with build_mixture(backbone.model, experts, mode="gated"):
            attached_s = time.perf_counter() - start_s
    print(f"{COUNT} LoRAs read and checked in {read_s:.2f} s, attached with gates after {attached_s:.2f} s")


if __name__ == "__main__":
    main()
