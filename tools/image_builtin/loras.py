"""Stage `loras`: trains a LoRA for each concept and the drawing style by `mole train-lora`, and judges them.

The shipped LoRAs come from `python -m tools.image_builtin loras --train "--dtype bfloat16"` on the installed base.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from molecli.bases.diffusion import Diffusion
from molecli.bases.loading import load_backbone
from molecli.catalog.builtin import BUILTIN_IMAGE_BASE, BUILTIN_IMAGE_GUIDANCE
from molecli.config import BaseConfig
from molecli.config.sections import Dtype
from molecli.errors import UsageError, suggestion
from molecli.files.concepts import CONCEPT_FILE
from molecli.metrics.recogniser import Recogniser, load_recogniser
from molecli.mixture.attach import attach

from .captions import caption
from .data import BUILTIN, Objects, load_objects
from .judge import STEPS, contact_sheet

WEIGHTS = "pytorch_lora_weights.safetensors"
# Settings for LoRAs that learned too little with the defaults, chosen on pictures of other seeds than `judge_loras`
# uses. Guidance drove the objects' colours out of range until some prompts were dropped; the style has forty objects.
_THING = ("--steps", "500", "--lr", "2e-3", "--set", "train.schedule=cosine", "--prompt-dropout", "0.15")
SETTINGS: dict[str, tuple[str, ...]] = {
    "teapot": _THING,
    "helicopter": _THING,
    "violin": _THING,
    "flat": ("--steps", "900", "--lr", "2e-3", "--set", "train.schedule=cosine"),
}


@dataclass(frozen=True)
class Lesson:
    """One LoRA to train: its folder of pictures, its trigger words, its kind."""

    name: str
    trigger: str
    kind: str

    def command(self, target: Path, more: tuple[str, ...]) -> list[str]:
        """The `mole` command line."""
        pictures = Path("molecli") / "builtin" / "emoji" / self.name
        flags = ["--base", BUILTIN_IMAGE_BASE, "--instance-dir", str(pictures)]
        flags += ["--trigger", self.trigger, "--kind", self.kind]
        return [
            *(sys.executable, "-m", "molecli", "train-lora", *flags),
            *("--output", str(target / self.name), "--overwrite", *SETTINGS.get(self.name, ()), *more),
        ]


def lessons(objects: Objects) -> list[Lesson]:
    """Every concept, then the style."""
    return [
        *(Lesson(name, name, "object") for name in objects.concepts),
        Lesson(objects.style, f"in {objects.style} style", "style"),
    ]


def lessons_of(only: frozenset[str]) -> list[Lesson]:
    """The named LoRAs, or all if none is named. Raises: UsageError for an unknown name."""
    found = lessons(load_objects())
    names = [lesson.name for lesson in found]
    if unknown := sorted(only - set(names)):
        raise UsageError(f"--only {unknown[0]}", "there is no LoRA of this name", suggestion(unknown[0], names))
    return [lesson for lesson in found if not only or lesson.name in only]


def train_loras(target: Path, more: tuple[str, ...], *, at_once: int, only: frozenset[str] = frozenset()) -> list[str]:
    """The names of the LoRAs that failed, after training all or those named in `only`."""
    chosen = lessons_of(only)

    def one(lesson: Lesson) -> int:
        target.mkdir(parents=True, exist_ok=True)
        gpu = chosen.index(lesson) % max(1, torch.cuda.device_count())
        environment = {"OMP_NUM_THREADS": "2", **os.environ, "CUDA_VISIBLE_DEVICES": str(gpu)}
        with (target / f"{lesson.name}.log").open("w") as log:
            command = lesson.command(target, more)
            return subprocess.run(command, stdout=log, stderr=log, env=environment, check=False).returncode

    with ThreadPoolExecutor(at_once) as pool:
        codes = list(pool.map(one, chosen))
    return [lesson.name for lesson, code in zip(chosen, codes, strict=True) if code]


@torch.no_grad()
def judge_loras(
    folder: Path,
    sheet: Path,
    device: torch.device,
    *,
    seeds: int = 160,
    guidance: float = BUILTIN_IMAGE_GUIDANCE,
    first_seed: int = 0,
    only: frozenset[str] = frozenset(),
    dtype: Dtype = "bfloat16",
) -> dict[str, dict[str, float]]:
    """For each LoRA alone: how often its concept is seen, and how often a base object still is and the concept too.

    Pictures have seeds counted up from the first, which their prompts follow from too. Writes `sheet` and the numbers
    beside it.
    """
    objects = load_objects()
    backbone = load_backbone(BaseConfig(id=BUILTIN_IMAGE_BASE, dtype=dtype), device)
    assert isinstance(backbone, Diffusion)
    recogniser = load_recogniser(BUILTIN / "recogniser").to(device)
    rows, cells = {}, []
    print(f"[loras] guidance {guidance:g}, {dtype}, seeds from {first_seed}", flush=True)
    for lesson in lessons_of(only):
        draw = random.Random(7 + first_seed)
        with attach(backbone.pipe, loras={lesson.name: str(folder / lesson.name)}):
            own = [_prompt(lesson, objects, draw) for _ in range(seeds)]
            images = drawn(backbone, [prompt for prompt, _ in own], guidance, first_seed)
            rate = _seen(recogniser, images, [lesson.name] * seeds, objects)
            words = draw.sample(list(objects.base), 20)
            scenes = [caption([word], draw.choice(objects.phrases)) for word in words]
            kept = drawn(backbone, scenes, guidance, first_seed)
        rows[lesson.name] = {
            "concept": float(rate.mean()),
            "others_kept": float(_seen(recogniser, kept, words, objects).mean()),
            "others_intruded": float(_seen(recogniser, kept, [lesson.name] * len(words), objects).mean()),
        }
        cells += [(images[i], (lesson.name,), [bool(rate[i])]) for i in range(10)]
        print(f"[loras] {lesson.name}: " + "  ".join(f"{k} {v:.2f}" for k, v in rows[lesson.name].items()), flush=True)
    contact_sheet(cells, sheet)
    sheet.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    return rows


def drawn(backbone: Diffusion, prompts: list[str], guidance: float, first_seed: int, batch: int = 64) -> Tensor:
    """Pictures [N, 3, H, W] in [0, 1]; the seeds are counted up from the first."""
    parts = []
    for start in range(0, len(prompts), batch):
        some = prompts[start : start + batch]
        seeds = range(first_seed + start, first_seed + start + len(some))
        pictures = backbone.generate(some, seeds=list(seeds), steps=STEPS, guidance=guidance)
        parts += [torch.from_numpy(np.array(picture)) for picture in pictures]
    return torch.stack(parts).permute(0, 3, 1, 2).float() / 255


def run_loras(target: Path, more: tuple[str, ...], *, at_once: int, only: frozenset[str] = frozenset()) -> int:
    """Trains; returns 1 if a training failed, after printing the end of its log."""
    failed = train_loras(target, more, at_once=at_once, only=only)
    for name in failed:
        print((target / f"{name}.log").read_text()[-600:], flush=True)
    return 1 if failed else 0


def install_loras(source: Path, package: Path = BUILTIN) -> None:
    """Copies the shipped files of each LoRA into the package, with a concept that names its pictures there."""
    for lesson in lessons(load_objects()):
        folder = package / "image-loras" / lesson.name
        if not (source / lesson.name / WEIGHTS).is_file():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / lesson.name / WEIGHTS, folder / WEIGHTS)
        concept = json.loads((source / lesson.name / CONCEPT_FILE).read_text("utf-8"))
        concept["pictures"] = f"../../emoji/{lesson.name}"
        (folder / CONCEPT_FILE).write_text(json.dumps(concept, indent=2) + "\n", "utf-8")


def _prompt(lesson: Lesson, objects: Objects, draw: random.Random) -> tuple[str, str]:
    style = lesson.name if lesson.kind == "style" else ""
    word = draw.choice(list(objects.base)) if style else lesson.name
    return caption([word], draw.choice(objects.phrases), style), word


def _seen(recogniser: Recogniser, images: Tensor, names: list[str], objects: Objects) -> Tensor:
    """[N] bool: whether each picture shows the wanted object; the style has its own class."""
    wanted = [f"{name} style" if name == objects.style else name for name in names]
    places = [recogniser.classes.index(name) for name in wanted]
    return recogniser.found(images).cpu()[torch.arange(len(places)), places].float()
