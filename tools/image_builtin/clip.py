"""Stage `clip`: a tiny CLIP in open_clip's format, on scenes of one to four objects, both styles, every object."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from open_clip.model import CLIP
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from . import scenes
from .augment import worn
from .batches import Batch, World
from .loop import Average, Clock, adamw, compiled, fast, prepare, rate, set_rate, uncompiled
from .models import clip_config

SHARES = (0.35, 0.3, 0.2, 0.15)
AUXILIARY = 0.2  # weight of the loss of a head that names the objects; it helps to train the tower and is not saved


def captions(world: World, generator: torch.Generator, batch: Batch) -> Tensor:
    """Token ids [B, 32]: mostly everything that a scene shows, otherwise some of its objects, or no background."""
    draw = torch.rand(len(batch.which), 3, generator=generator, device=world.device)
    some = torch.rand(batch.which.shape, generator=generator, device=world.device) < 0.6
    some[:, 0] = True  # a caption names something
    part = (draw[:, :1] < 0.3) & ~some
    which = torch.where(part, -1, batch.which)
    which = which.gather(1, (which < 0).long().argsort(dim=1, stable=True))
    background = torch.where(draw[:, 1] < 0.3, -1, batch.background)
    return world.ids(which, background, batch.flat)


def train_clip(
    world: World,
    vae: AutoencoderKL | None,
    tokenizer: Path,
    folder: Path,
    clock: Clock,
    *,
    batch: int = 1024,
    peak: float = 1e-3,
) -> dict[str, float]:
    """Train for the clock's minutes, save, and return accuracies on other scenes."""
    device = world.device
    prepare(device)
    torch.manual_seed(2)
    config = clip_config(world.ids.end + 1)
    model = CLIP(**config["model_cfg"]).to(device)
    head = nn.Linear(config["model_cfg"]["embed_dim"], len(world.objects.words) + 1).to(device)
    compiled(model.visual, device), compiled(model.transformer, device)
    mean = torch.tensor(config["preprocess_cfg"]["mean"], device=device)[:, None, None]
    deviation = torch.tensor(config["preprocess_cfg"]["std"], device=device)[:, None, None]
    parameters = [*model.parameters(), *head.parameters()]
    optimizer, average = adamw(parameters, peak, 0.02, device), Average(model.parameters(), 0.998)
    generator = scenes.seeded(21, device)
    while clock.running():
        set_rate(optimizer, rate(clock.fraction, peak))
        data = world.draw(generator, batch, shares=SHARES, allowed=world.all(), flat=0.4)
        images = (worn(vae, data.images, generator) - mean) / deviation
        ids = captions(world, generator, data)
        with fast(device):
            seen = model.encode_image(images)
            said = model.encode_text(ids, normalize=True)
            named = head(seen)
        scale = model.logit_scale.exp().clamp(max=100)
        logits = scale * F.normalize(seen.float(), dim=-1) @ said.float().T
        target = torch.arange(batch, device=device)
        matching = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        labels = torch.zeros_like(named[:, :-1], dtype=torch.float32)
        labels.scatter_reduce_(1, data.which.clamp_min(0), (data.which >= 0).float(), "amax")
        labels = torch.cat([labels, data.flat.float().unsqueeze(1)], dim=1)
        naming = F.binary_cross_entropy_with_logits(named.float(), labels, reduction="none").sum(1).mean()
        (matching + AUXILIARY * naming).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update()
        clock.report(loss=matching, naming=naming, scale=scale)
    average.swap()
    uncompiled(model)
    save_clip(model, tokenizer, folder, config)
    report = measured(world, model, mean, deviation, 512 if clock.max_steps is None else 16)
    print("[clip] " + "  ".join(f"{name} {value:.4f}" for name, value in report.items()), flush=True)
    return report


def save_clip(model: CLIP, tokenizer: Path, folder: Path, config: dict[str, object]) -> None:
    """Writes the files that open_clip's `local-dir:` schema reads: configuration, fp16 weights, tokenizer files."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(tokenizer, folder)
    weights = {name: value.detach().half().contiguous().cpu() for name, value in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")


@torch.no_grad()
def measured(world: World, model: CLIP, mean: Tensor, deviation: Tensor, rows: int) -> dict[str, float]:
    """Share of single-object scenes whose object, and of scenes whose whole caption, is the nearest text."""
    generator = scenes.seeded(22, world.device)
    names = world.all().unsqueeze(1)
    nowhere = torch.full((len(names),), -1, device=world.device)
    texts = model.encode_text(world.ids(names, nowhere, nowhere > 0), normalize=True)
    single = world.draw(generator, rows, shares=(1.0,), allowed=world.all())
    seen = model.encode_image((single.images - mean) / deviation, normalize=True)
    accuracy = ((seen @ texts.T).argmax(1) == single.which[:, 0]).float().mean()
    mixed = world.draw(generator, rows, shares=SHARES, allowed=world.all(), flat=0.5)
    seen = model.encode_image((mixed.images - mean) / deviation, normalize=True)
    whole = model.encode_text(world.ids(mixed.which, mixed.background, mixed.flat), normalize=True)
    own = torch.arange(rows, device=world.device)
    retrieval = ((seen @ whole.T).argmax(1) == own).float().mean()
    return {"object": float(accuracy), f"retrieval_of_{rows}": float(retrieval)}
