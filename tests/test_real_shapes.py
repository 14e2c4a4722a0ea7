"""Three LoRAs composed on a pipeline of Stable Diffusion 1.5's shape at 512x512, in bf16, with the memory printed.

Random weights, a step or two: minutes on CPU and about 4 GiB of memory. Run with `-m slow`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from molecli.adapters import write_diffusers
from molecli.config import MethodConfig
from molecli.mixture.attach import attach

pytestmark = pytest.mark.slow
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
GIB = 2**30
# The saved pipeline and its LoRAs.
DISK = 3 * GIB


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The pipeline, folders of three rank-16 LoRAs on its attention, and a counter of live bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        from image_hosts import make_experts
        from image_pipelines import SHAPES, build_pipeline
        from live_bytes import LiveBytes
    pipe = build_pipeline(SHAPES["sd15"], device="cpu", dtype=torch.bfloat16, seed=0)
    experts = make_experts(pipe, 3, rank=16, parts=["attention"], seed=0)
    folder = tmp_path_factory.mktemp("loras")
    loras = {expert.name: str(write_diffusers(folder / expert.name, expert.factors)) for expert in experts}
    return SimpleNamespace(pipe=pipe, loras=loras, live=LiveBytes)


@pytest.mark.parametrize(("mode", "steps"), [("linear", 1), ("gated", 1), ("switch", 2), ("composite", 1)])
def test_three_loras_compose_at_512(sd15: Any, mode: str, steps: int, capsys: pytest.CaptureFixture[str]) -> None:
    method = MethodConfig(tau=1) if mode == "switch" else None
    with attach(sd15.pipe, loras=sd15.loras, mode=mode, method=method) as mixture, sd15.live() as live:
        latents = sd15.pipe(
            "a cat and a dog by the sea", num_inference_steps=steps, height=512, width=512, output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).images  # fmt: skip
    weights = sum(p.numel() * p.element_size() for part in (sd15.pipe.unet, sd15.pipe.vae) for p in part.parameters())
    with capsys.disabled():
        sys.stdout.write(f"\n{mode}: {live.peak / GIB:.2f} GiB at most beside {weights / GIB:.2f} of weights\n")
    assert len(mixture.names) == 3
    assert latents.shape == (1, 4, 64, 64)
    assert latents.isfinite().all()
    # Nothing of size positions x positions, nor experts x positions x width, is ever alive.
    assert live.peak < 0.25 * GIB * (3 if mode == "composite" else 1)


def test_the_command_draws_them(sd15: Any, tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free < 2 * DISK:
        pytest.skip(f"needs {2 * DISK / GIB:.0f} GiB of disk")
    base, out = tmp_path / "base", tmp_path / "out"
    sd15.pipe.save_pretrained(base)
    loras = ",".join(f"{name}={path}" for name, path in sd15.loras.items())
    command = [sys.executable, "-m", "molecli", "sample", "--base", str(base), "--dtype", "bfloat16", "--loras", loras]
    command += ["--modes", "linear,composite", "--prompt", "a cat and a dog by the sea", "--denoise-steps", "1"]
    try:
        done = subprocess.run([*command, "--output", str(out)], capture_output=True, text=True, check=False)
    finally:
        shutil.rmtree(base)
    assert done.returncode == 0, done.stderr
    assert (out / "sheet.png").exists()
    assert len(list(out.rglob("*.png"))) == 3
