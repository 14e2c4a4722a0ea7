"""Runs the stages as processes within a deadline, in parallel if they leave the device idle, and packs the results."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .export import export

GPUS = torch.cuda.device_count()
# Minutes that are kept free at the end. The UNet's stage writes its pipeline after its own minutes are over.
JUDGE_MINUTES, PACK_MINUTES = 0.9, 0.4


@dataclass
class Driver:
    """One call: the options that all stages get, and the deadline."""

    work: Path
    target: Path
    common: list[str]  # options of every stage
    deadline: float  # minutes
    _start: float = field(default_factory=time.monotonic)

    @property
    def elapsed(self) -> float:
        """Minutes since the start."""
        return (time.monotonic() - self._start) / 60

    def start(
        self, stage: str, *options: str, gpu: int | None = None, together: bool = False
    ) -> subprocess.Popen[bytes]:
        """Starts a stage in its own process: on one GPU of several, or `together` with one process for each GPU."""
        self.work.mkdir(parents=True, exist_ok=True)
        print(f"[all] {self.elapsed:.2f} min: {stage} {' '.join(options)}", flush=True)
        launcher = ["torch.distributed.run", "--nproc-per-node", str(GPUS), "--virtual-local-rank", "-m"]
        launcher = launcher if together and GPUS > 1 else []
        command = [sys.executable, "-m", *launcher, "tools.image_builtin", stage, *self.common, *options]
        environment = {
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": str(self.work / "inductor"),
            "TRITON_CACHE_DIR": str(self.work / "triton"),
        }
        if gpu is not None and GPUS > 1:
            environment["CUDA_VISIBLE_DEVICES"] = str(gpu % GPUS)
        return subprocess.Popen(command, env=environment)

    def wait(self, process: subprocess.Popen[bytes], *, reserve: float = 0.2) -> bool:
        """Whether a stage succeeded; it is stopped when less than `reserve` minutes are left."""
        try:
            code = process.wait(max(1.0, (self.deadline - reserve - self.elapsed) * 60))
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        if code:
            print(f"[all] {self.elapsed:.2f} min: a stage ended with code {code}", flush=True)
        return code == 0

    def pack(self) -> None:
        """Write the archives, the contact sheet and the reports to the export folder."""
        for line in export(self.work, self.target):
            print(f"[all] {self.elapsed:.2f} min: {line}", flush=True)
        for name in ("judge.png", "report-judge.json", "report-clip.json", "report-recogniser.json"):
            if (self.work / name).is_file():
                shutil.copy(self.work / name, self.target / name)


def run_all(
    driver: Driver,
    *,
    vae: float,
    clip: float,
    recogniser: float,
    unet: float | None,
    schedule: float,
    last: bool,
    judge: bool,
) -> int:
    """Runs the VAE and the scorers (while the UNet compiles), then the UNet until the deadline, then the judge.

    With several GPUs, the first trains the VAE, the second the scorers, and all of them the UNet.
    """
    warm = None if (driver.work / "inductor-warm").exists() else driver.start("unet", "--warm", gpu=1)
    autoencoder = driver.start("vae", "--minutes", str(vae), gpu=0)
    if GPUS < 2 and not driver.wait(autoencoder):
        return 1
    # If there is no autoencoder at the start, the scorers see no pictures that were decoded by one.
    scorers = [
        driver.start("recogniser", "--minutes", str(recogniser), gpu=1),
        driver.start("clip", "--minutes", str(clip), gpu=1),
    ]
    if not driver.wait(autoencoder):
        return 1
    well = [driver.wait(process) for process in scorers]
    driver.pack()
    if warm is not None and driver.wait(warm):
        (driver.work / "inductor-warm").touch()
    left = driver.deadline - driver.elapsed - (JUDGE_MINUTES if judge else PACK_MINUTES)
    minutes = left if unet is None else min(unet, left)
    if minutes > 0:
        until = time.time() + minutes * 60
        options = [
            "--minutes",
            f"{minutes:.3f}",
            "--until",
            f"{until:.0f}",
            "--schedule",
            str(schedule),
            *(["--last"] if last else []),
        ]
        well.append(driver.wait(driver.start("unet", *options, together=True), reserve=0.1))
        driver.pack()
        if judge:
            well.append(driver.wait(driver.start("judge"), reserve=0.1))
            driver.pack()
    print(f"[all] done after {driver.elapsed:.2f} min", flush=True)
    return 0 if all(well) else 1
