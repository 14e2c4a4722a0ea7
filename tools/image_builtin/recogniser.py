"""Stage `recogniser`: the network of molecli.metrics.recogniser, on real scenes of one to five objects, both styles."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from molecli.metrics.recogniser import Recogniser, RecogniserNet, save_recogniser

from . import scenes
from .augment import decoys, worn
from .batches import World
from .data import SIZE
from .loop import Average, Clock, adamw, fast, prepare, rate, set_rate

SHARES = (0.25, 0.25, 0.2, 0.15, 0.15)
EXTRA = 2  # decoys or unnamed pictures beside the objects


@dataclass(frozen=True)
class Labelled:
    """Scenes [B, 3, 64, 64], labels [B, classes] and which labels count [B, classes]."""

    images: Tensor
    labels: Tensor
    counts: Tensor


def labelled(world: World, generator: torch.Generator, batch: int) -> Labelled:
    """Scenes with objects and with things that are not objects; the last class is the held-out drawing style."""
    device, kinds = world.device, len(world.objects.words)
    count = scenes.counts(generator, batch, SHARES)
    draw = torch.rand(batch, 2 + 2 * EXTRA, generator=generator, device=device)
    which = scenes.choose(generator, count, len(SHARES), world.all())
    which = torch.where((draw[:, :1] < 0.1), -1, which)  # some scenes show no named object
    styled = draw[:, 1] < 0.5
    rows = torch.where(which >= 0, which + styled.unsqueeze(1) * kinds, -1)
    # The bank: named pictures of both styles, decoys of both, unnamed pictures of the base's style.
    number = max(8, batch // 2)
    fakes = [decoys(world.named[:kinds], generator, number), decoys(world.named[kinds:], generator, number)]
    bank = torch.cat([world.named, *fakes, world.others])
    fake = torch.randint(number, (batch, EXTRA), generator=generator, device=device)
    fake = fake + len(world.named) + styled.unsqueeze(1) * number
    unnamed = torch.randint(len(world.others), (batch, EXTRA), generator=generator, device=device)
    unnamed = unnamed + len(world.named) + 2 * number
    plain = (draw[:, 2 : 2 + EXTRA] < 0.5) & ~styled.unsqueeze(1)
    extra = torch.where(plain, unnamed, fake)
    there = (draw[:, 2 + EXTRA :] < 0.3) | (which[:, :1] < 0)
    extra = torch.where(there & (count <= 3).unsqueeze(1), extra, -1)
    # Slots 1, 2, 3: true ones; the extras take the last slots, in front of the first objects or behind them.
    rows = torch.cat([extra[:, :1], rows, extra[:, 1:]], dim=1)
    background = torch.randint(len(world.objects.phrases), (batch,), generator=generator, device=device)
    canvas = scenes.draw_backgrounds(generator, background, world.objects)
    images = scenes.render(bank, scenes.arrange(generator, rows), canvas)
    labels = torch.zeros(batch, kinds + 1, device=device)
    labels[:, :kinds].scatter_reduce_(1, which.clamp_min(0), (which >= 0).float(), "amax")
    labels[:, kinds] = styled.float()
    counts = torch.ones_like(labels)
    counts[:, kinds] = (which[:, 0] >= 0).float()
    return Labelled(images, labels, counts)


def train_recogniser(
    world: World, vae: AutoencoderKL | None, folder: Path, clock: Clock, *, batch: int = 512, peak: float = 2e-3
) -> dict[str, float]:
    """The scores on other scenes, after training for the clock's minutes, choosing thresholds and saving."""
    device = world.device
    prepare(device)
    torch.manual_seed(3)
    classes = (*world.objects.words, f"{world.objects.style} style")
    net = RecogniserNet(len(classes)).to(device, memory_format=torch.channels_last)
    optimizer, average = adamw(net.parameters(), peak, 0.02, device), Average(net.parameters(), 0.998)
    generator = scenes.seeded(31, device)
    while clock.running():
        set_rate(optimizer, rate(clock.fraction, peak))
        data = labelled(world, generator, batch)
        images = worn(vae, data.images, generator).contiguous(memory_format=torch.channels_last)
        with fast(device):
            logits = net(images)
        losses = F.binary_cross_entropy_with_logits(logits.float(), data.labels, reduction="none")
        loss = (losses * data.counts).sum(1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update()
        clock.report(loss=loss)
    average.swap()
    rounds = 40 if clock.max_steps is None else 2
    recogniser = Recogniser(net, classes, [0.5] * len(classes), SIZE).to(device)
    recogniser.thresholds = thresholds(*scored(recogniser, world, vae, 32, rounds, batch))
    save_recogniser(recogniser, folder)
    report = judged(recogniser, *scored(recogniser, world, vae, 33, rounds, batch))
    print("[recogniser] " + "  ".join(f"{name} {value:.4f}" for name, value in report.items()), flush=True)
    return report


@torch.no_grad()
def scored(
    recogniser: Recogniser, world: World, vae: AutoencoderKL | None, seed: int, rounds: int, batch: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities, labels and which of them count, on other scenes: half plain, half degraded."""
    generator = scenes.seeded(seed, world.device)
    parts = []
    for turn in range(rounds):
        data = labelled(world, generator, batch)
        images = worn(vae, data.images, generator) if turn % 2 else data.images
        parts.append((recogniser(images), data.labels, data.counts))
    chance, labels, counts = (torch.cat(part) for part in zip(*parts, strict=True))
    return chance, labels > 0.5, counts > 0.5


def thresholds(chance: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    """For every class the threshold in 0.2 … 0.9 with the best F1."""
    levels = torch.linspace(0.2, 0.9, 36, device=chance.device)
    scores = []
    for level in levels:
        over = (chance > level) & counts
        right = (over & labels).sum(0)
        scores.append(2 * right / (over.sum(0) + (labels & counts).sum(0)).clamp_min(1))
    return levels[torch.stack(scores).argmax(0)]


def judged(recogniser: Recogniser, chance: Tensor, labels: Tensor, counts: Tensor) -> dict[str, float]:
    """Precision, recall and false positives of the objects' classes, and of the style's."""
    over = (chance > recogniser.thresholds) & counts
    right, truth = (over & labels).sum(0).float(), (labels & counts).sum(0).float()
    wrong, absent = (over & ~labels).sum(0).float(), (~labels & counts).sum(0).float()
    recall, precision = right / truth.clamp_min(1), right / over.sum(0).clamp_min(1)
    return {
        "precision": float(right[:-1].sum() / over[:, :-1].sum().clamp_min(1)),
        "recall": float(right[:-1].sum() / truth[:-1].sum()),
        "lowest_precision": float(precision[:-1].min()),
        "lowest_recall": float(recall[:-1].min()),
        "false_positive_rate": float(wrong[:-1].sum() / absent[:-1].sum()),
        "style_precision": float(precision[-1]),
        "style_recall": float(recall[-1]),
    }
