"""Stage `judge`: draws pictures with the base in diffusers' own pipeline and recognises them; a table and a sheet."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw
from torch import Tensor

from molecli.metrics.recogniser import Recogniser, load_recogniser

from .captions import caption
from .data import SIZE, Objects

STEPS = 25


@dataclass(frozen=True)
class Request:
    """A prompt and the objects that it names."""

    words: tuple[str, ...]
    prompt: str
    seed: int


def requests(objects: Objects, seeds: int, mixed: int, first_seed: int = 0) -> list[Request]:
    """Every base object alone `seeds` times, then `mixed` scenes each of two and of three objects.

    Seeds are counted up from the first, which also determines backgrounds and scenes.
    """
    draw = random.Random(5 + first_seed)
    words = list(objects.base)
    single = [(word,) for _ in range(seeds) for word in words]
    several = [tuple(draw.sample(words, number)) for number in (2, 3) for _ in range(mixed)]
    chosen = [*single, *several]
    return [
        Request(some, caption(some, draw.choice(objects.phrases)), seed) for seed, some in enumerate(chosen, first_seed)
    ]


@torch.no_grad()
def sampled(pipeline: StableDiffusionPipeline, wanted: list[Request], batch: int, guidance: float) -> Tensor:
    """Pictures [N, 3, 64, 64] in [0, 1], with one seed each."""
    parts = []
    for start in range(0, len(wanted), batch):
        some = wanted[start : start + batch]
        result = pipeline(
            [request.prompt for request in some],
            num_inference_steps=STEPS,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(request.seed) for request in some],
            output_type="pt",
        )
        parts.append(result.images.float())
    return torch.cat(parts)


def table(recogniser: Recogniser, wanted: list[Request], images: Tensor) -> tuple[list[list[bool]], dict[str, float]]:
    """Which requested objects each picture shows, and the rates by number of objects."""
    seen = recogniser.found(images).cpu()
    position = {name: row for row, name in enumerate(recogniser.classes)}
    hits = [[bool(seen[row, position[word]]) for word in request.words] for row, request in enumerate(wanted)]
    rates: dict[str, float] = {}
    for number in sorted({len(request.words) for request in wanted}):
        rows = [row for row, request in enumerate(wanted) if len(request.words) == number]
        flags = [flag for row in rows for flag in hits[row]]
        rates[f"objects_{number}"] = sum(flags) / len(flags)
        rates[f"whole_{number}"] = sum(all(hits[row]) for row in rows) / len(rows)
        surplus = [int(seen[row, :-1].sum()) - sum(hits[row]) for row in rows]
        rates[f"surplus_{number}"] = sum(surplus) / len(rows)
    return hits, rates


def judge(
    pipeline_folder: Path,
    recogniser_folder: Path,
    objects: Objects,
    sheet: Path,
    device: torch.device,
    *,
    seeds: int,
    mixed: int,
    guidance: float,
    first_seed: int,
) -> dict[str, float]:
    """Sample, recognise, print the table and save the contact sheet."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    pipeline = StableDiffusionPipeline.from_pretrained(
        pipeline_folder, dtype=dtype, safety_checker=None, requires_safety_checker=False
    ).to(device)
    pipeline.set_progress_bar_config(disable=True)
    wanted = requests(objects, seeds, mixed, first_seed)
    images = sampled(pipeline, wanted, 256, guidance)
    recogniser = load_recogniser(recogniser_folder).to(device)
    hits, rates = table(recogniser, wanted, images)
    by_word: dict[str, list[bool]] = defaultdict(list)
    for request, flags in zip(wanted, hits, strict=True):
        if len(request.words) == 1:
            by_word[request.words[0]] += flags
    shares = sorted((sum(flags) / len(flags), word) for word, flags in by_word.items())
    print(f"[judge] guidance {guidance:g}, seeds from {first_seed}", flush=True)
    print("[judge] by object: " + "  ".join(f"{word} {share:.2f}" for share, word in shares), flush=True)
    print("[judge] " + "  ".join(f"{name} {value:.3f}" for name, value in rates.items()), flush=True)
    first = list(range(len(objects.base)))
    several = list(range(seeds * len(objects.base), len(wanted)))
    pairs, triples = several[: min(20, mixed)], several[mixed : mixed + min(20, mixed)]
    contact_sheet([(images[row].cpu(), wanted[row].words, hits[row]) for row in first + pairs + triples], sheet)
    return rates


def contact_sheet(cells: list[tuple[Tensor, tuple[str, ...], list[bool]]], path: Path, columns: int = 10) -> None:
    """Pictures at twice their size with the requested words; a word that was not recognised is marked by a dash."""
    side, label = 2 * SIZE, 26
    sheet = Image.new("RGB", (columns * side, -(-len(cells) // columns) * (side + label)), "white")
    pen = ImageDraw.Draw(sheet)
    for place, (image, words, flags) in enumerate(cells):
        x, y = place % columns * side, place // columns * (side + label)
        pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        sheet.paste(Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST), (x, y))
        text = [word if flag else f"-{word}-" for word, flag in zip(words, flags, strict=True)]
        pen.text((x + 2, y + side), " ".join(text[:2]) + ("\n" + " ".join(text[2:]) if text[2:] else ""), fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
