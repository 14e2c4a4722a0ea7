"""Recognises the objects in a picture: a small network, independent of the CLIP that guides training.

Each class (objects, and the drawing style) has a sigmoid and its own threshold, chosen on pictures that were not in
training. The network: convolutions in residual blocks with group norms, about a million parameters.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from molecli.errors import UsageError

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
REMEDY = "Name a folder with config.json and model.safetensors, such as molecli/builtin/recogniser."


class _Block(nn.Module):
    """Two 3×3 convolutions with a shortcut; the first may halve the picture."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.GroupNorm(8, channels), nn.GroupNorm(8, channels)])
        plain = stride == 1 and channels_in == channels
        self.shortcut = nn.Identity() if plain else nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norms[0](self.first(x)))
        return F.relu(self.norms[1](self.second(inner)) + self.shortcut(x))


class RecogniserNet(nn.Module):
    """Pictures [B, 3, size, size] in [0, 1] -> logits [B, classes]."""

    def __init__(self, classes: int, widths: Sequence[int] = (32, 64, 96, 128)) -> None:
        super().__init__()
        self.widths = tuple(widths)
        self.stem = nn.Conv2d(3, widths[0], 3, 1, 1)
        steps = pairwise(widths)
        halves = [nn.Sequential(_Block(a, b, 2), _Block(b, b, 1)) for a, b in steps]
        self.blocks = nn.Sequential(_Block(widths[0], widths[0], 2), *halves)
        self.head = nn.Linear(2 * widths[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        features = self.blocks(F.relu(self.stem(images * 4 - 2)))
        return self.head(torch.cat([features.amax((2, 3)), features.mean((2, 3))], dim=1))


class Recogniser:
    """A trained network with the names of its classes and the threshold of each."""

    def __init__(self, net: RecogniserNet, classes: Sequence[str], thresholds: Sequence[float], size: int) -> None:
        self.net = net.eval().requires_grad_(False)
        self.classes = tuple(classes)
        self.thresholds = torch.tensor(thresholds)
        self.size = size

    def to(self, device: torch.device | str) -> Recogniser:
        """Itself, with the weights on `device`."""
        self.net.to(device)
        self.thresholds = self.thresholds.to(device)
        return self

    def __call__(self, images: Tensor) -> Tensor:
        """Probabilities [B, classes] for images [B, 3, H, W] in [0, 1], scaled to the network's size if needed."""
        if images.ndim != 4 or images.shape[1] != 3:
            shape = list(images.shape)
            raise UsageError(
                "recogniser", f"the images have the shape {shape}", "Give images as [batch, 3, height, width]."
            )
        images = images.to(self.thresholds.device, torch.float32)
        if images.shape[-2:] != (self.size, self.size):
            images = F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)
        return self.net(images).sigmoid()

    def found(self, images: Tensor) -> Tensor:
        """Bool [B, classes]: which classes are above their thresholds."""
        return self(images) > self.thresholds


def save_recogniser(recogniser: Recogniser, folder: Path) -> None:
    """Write config.json and the weights in fp16."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().half().contiguous().cpu() for name, value in recogniser.net.state_dict().items()}
    save_file(weights, folder / WEIGHTS_FILE)
    config = {
        "size": recogniser.size,
        "widths": list(recogniser.net.widths),
        "classes": list(recogniser.classes),
        "thresholds": [round(float(value), 4) for value in recogniser.thresholds],
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n", "utf-8")


def load_recogniser(folder: Path | str) -> Recogniser:
    """Read a recogniser from its folder.

    Raises UsageError if a file is missing or the weights belong to another network.
    """
    folder = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise UsageError(str(folder), f"it has no {name}", REMEDY)
    try:
        config = json.loads((folder / CONFIG_FILE).read_text("utf-8"))
        classes, thresholds, size = config["classes"], config["thresholds"], int(config["size"])
        net = RecogniserNet(len(classes), config["widths"])
        net.load_state_dict({name: value.float() for name, value in load_file(folder / WEIGHTS_FILE).items()})
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(str(folder), f"it is not a recogniser ({reason})", REMEDY) from error
    return Recogniser(net, classes, thresholds, size)
