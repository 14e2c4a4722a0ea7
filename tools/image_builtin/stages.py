"""A function for each stage. It reads and writes the work folder, and is done if its output exists there."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from molecli.catalog.builtin import BUILTIN_IMAGE_GUIDANCE

from .batches import World, load_world
from .data import load_objects
from .loop import Clock, join, rank


@dataclass(frozen=True)
class Options:
    """The options of every stage."""

    source: Path
    work: Path
    device: torch.device
    minutes: float
    schedule: float | None = None
    smoke: bool = False
    last: bool = False
    warm: bool = False
    initial: Path | None = None
    spent: float = 0.0
    until: float | None = None  # seconds since the epoch when the stage must end, however long it took to start
    guidance: float = BUILTIN_IMAGE_GUIDANCE
    first_seed: int = 0

    def world(self) -> World:
        """The pictures, on the device."""
        return load_world(self.source, self.device, self.work / "tokenizer", small=self.smoke)

    @property
    def initial_vae(self) -> Path | None:
        """The initial autoencoder."""
        folder = self.initial / "tiny-sd" / "vae" if self.initial else None
        return folder if folder is not None and folder.exists() else None

    def clock(self, name: str) -> Clock:
        """This stage's budget; a smoke run has only a few steps."""
        left = self.minutes if self.until is None else min(self.minutes, (self.until - time.time()) / 60)
        return Clock(left, name, max_steps=3 if self.smoke or self.warm else None, schedule=self.schedule)

    def batch(self, size: int) -> dict[str, int]:
        """The stage's own batch size, or a tiny one in a smoke run."""
        return {"batch": 8} if self.smoke else {"batch": size}


def run_vae(options: Options) -> None:
    """Trains the autoencoder, starting from the weights in `initial` if there are some."""
    from .vae import train_vae

    join(options.device)
    folder = options.work / "vae"
    if not (folder / "config.json").exists():
        train_vae(options.world(), folder, options.clock("vae"), initial=options.initial_vae, **options.batch(128))


def run_clip(options: Options) -> None:
    """Trains the tiny CLIP, or copies that of `initial`."""
    from .clip import train_clip

    if _taken(options, "tiny-clip"):
        return
    world, vae = options.world(), _wearing(options)
    tokenizer, folder = options.work / "tokenizer", options.work / "tiny-clip"
    _note(options, "clip", train_clip(world, vae, tokenizer, folder, options.clock("clip"), **options.batch(1024)))


def run_recogniser(options: Options) -> None:
    """Trains the recogniser, or copies that of `initial`."""
    from .recogniser import train_recogniser

    if _taken(options, "recogniser"):
        return
    world, vae = options.world(), _wearing(options)
    folder, clock = options.work / "recogniser", options.clock("recogniser")
    _note(options, "recogniser", train_recogniser(world, vae, folder, clock, **options.batch(384)))


def run_unet(options: Options) -> None:
    """Continues to train the UNet and text encoder and writes the pipeline; `warm` only fills the compiler's cache."""
    from .unet import Pool, level_embeddings, prepare_pool, save_pipeline, train_unet
    from .vae import load_vae

    join(options.device)
    world, clock = options.world(), options.clock("unet-warm" if options.warm else "unet")
    if options.warm:
        size = 16 if options.smoke else 4096
        ids = world.ids.empty(size).short()
        pool = Pool(torch.randn(size, 4, 16, 16, dtype=torch.float16, device=options.device), ids)
        train_unet(world, pool, options.work, clock, keep=False, **options.batch(256))
        return
    clock.done_before = options.spent
    checkpoint = options.work / "unet.pt"
    calls = int(checkpoint.stat().st_mtime) % 997 if checkpoint.exists() else 0  # every call draws other scenes
    if checkpoint.exists():
        clock.done_before = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["minutes"]
    if options.last:
        clock.schedule = clock.done_before + clock.minutes
    vae = load_vae(options.work / "vae", options.device)
    pool = prepare_pool(
        world, vae, 32 if options.smoke else 400_000, 41 + calls + 1000 * rank(), 8 if options.smoke else 2048
    )
    print(
        f"[unet] {len(pool.latents)} latents after {clock.elapsed:.2f} min, std {pool.latents.float().std():.3f}",
        flush=True,
    )
    initial = options.initial / "tiny-sd" if options.initial else None
    model = train_unet(world, pool, options.work, clock, initial=initial, **options.batch(256))
    if rank():
        return
    level_embeddings(model, world)
    save_pipeline(model, options.work / "vae", options.work / "tokenizer", options.work / "tiny-sd")


def run_judge(options: Options) -> None:
    """Judge the base by the recogniser."""
    from .judge import judge

    seeds, mixed = (1, 2) if options.smoke else (10, 120)
    folders = (options.work / "tiny-sd", options.work / "recogniser")
    report = judge(
        *folders,
        load_objects(),
        options.work / "judge.png",
        options.device,
        seeds=seeds,
        mixed=mixed,
        guidance=options.guidance,
        first_seed=options.first_seed,
    )
    _note(options, "judge", report)


def run_concepts(options: Options) -> None:
    """Write the concepts' pictures."""
    from .concepts import write_concepts

    write_concepts(options.world(), options.work / "emoji")


STAGES: dict[str, Callable[[Options], None]] = {
    "vae": run_vae,
    "clip": run_clip,
    "recogniser": run_recogniser,
    "unet": run_unet,
    "judge": run_judge,
    "concepts": run_concepts,
}


def _taken(options: Options, name: str) -> bool:
    """Whether a stage's folder exists, after copying it from `initial` if it is there."""
    folder = options.work / name
    if options.initial and not folder.exists() and (options.initial / name).exists():
        shutil.copytree(options.initial / name, folder)
    return folder.exists()


def _wearing(options: Options) -> AutoencoderKL | None:
    """The autoencoder through which scorers see pictures, if any: that of `initial` while another one is trained."""
    from .vae import load_vae

    folder = options.initial_vae or options.work / "vae"
    return load_vae(folder, options.device) if folder.exists() else None


def _note(options: Options, name: str, values: dict[str, float]) -> None:
    """Writes a stage's numbers to its own file."""
    (options.work / f"report-{name}.json").write_text(json.dumps(values, indent=1) + "\n", "utf-8")
