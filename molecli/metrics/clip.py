"""CLIP with open_clip: pictures and texts as unit vectors in one space.

load_clip    ClipConfig -> Clip, frozen, on a device
Clip         images (differentiable, from pixels to vectors), texts
source_of    the model for open_clip, checked without loading weights

`model` is a name that open_clip knows (with a `pretrained` tag or file), hf-hub:ID, a folder in open_clip's format, or
builtin:NAME. open_clip is imported only to load a CLIP.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from molecli.catalog.builtin import BUILTIN_PREFIX, package_folder
from molecli.config import ClipConfig
from molecli.errors import MismatchError, RunError, UsageError, suggestion

BUILTIN_CLIP = "builtin:tiny-clip"
# OpenAI's largest model at 224 pixels, the one of most published alignment scores.
DEFAULT_MODEL, DEFAULT_TAG = "ViT-L-14", "openai"
CONFIG_FILE = "open_clip_config.json"
_WEIGHTS = (".safetensors", ".bin", ".pth")
HUB, FOLDER = "hf-hub:", "local-dir:"
REMEDY = "Write --clip-model NAME --clip-pretrained TAG as open_clip lists them, or the folder of a CLIP."


@dataclass(frozen=True)
class ClipSource:
    """The model for open_clip, and the tag or file of its weights if the model does not name them.

    given: the configured name, if it differs from the name for open_clip.
    """

    model: str
    pretrained: str | None = None
    given: str | None = None

    @property
    def name(self) -> str:
        """Model and weights, for messages and results."""
        shown = self.given or self.model
        return f"{shown}/{self.pretrained}" if self.pretrained else shown


class Clip:
    """A frozen CLIP. `images` is differentiable in the pixels, `texts` has no gradient."""

    def __init__(self, model: nn.Module, tokenizer: Any, preprocess: Mapping[str, Any], name: str) -> None:
        self.model, self.tokenizer, self.name = model.eval().requires_grad_(False), tokenizer, name
        size = preprocess["size"]
        self.size: tuple[int, int] = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        self.mode = str(preprocess.get("resize_mode") or "shortest")
        self.interpolation = "bilinear" if preprocess.get("interpolation") == "bilinear" else "bicubic"
        self.fill = float(preprocess.get("fill_color") or 0) / 255
        self._mean = _per_channel(preprocess["mean"])
        self._std = _per_channel(preprocess["std"])

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def images(self, pixels: Tensor) -> Tensor:
        """[B, d] unit vectors of pictures [B, 3, H, W] in [0, 1], differentiable in the pixels."""
        return F.normalize(self.model.encode_image(self.prepared(pixels)), dim=-1)  # type: ignore[operator]

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """[P, d] unit vectors of texts."""
        ids = self.tokenizer(list(texts)).to(self.device)
        return F.normalize(self.model.encode_text(ids), dim=-1)  # type: ignore[operator]

    def prepared(self, pixels: Tensor) -> Tensor:
        """[B, 3, h, w]: open_clip's preprocessing as tensor code, without the rounding to integer colours."""
        x = pixels.to(self.device, torch.float32)
        x = self._fitted(x)
        return (x - self._mean.to(x.device)) / self._std.to(x.device)

    def _fitted(self, x: Tensor) -> Tensor:
        """The pictures in the model's size: squashed, or resized by one side and then cropped or padded."""
        height, width = x.shape[-2:]
        if self.mode == "squash":
            return self._resized(x, self.size)
        ratios = height / self.size[0], width / self.size[1]
        ratio = max(ratios) if self.mode == "longest" else min(ratios)
        # torchvision truncates the other side if it fits the shorter one, and rounds if it fits the longer one.
        whole = round if self.mode == "longest" else int
        return self._centred(self._resized(x, (max(1, whole(height / ratio)), max(1, whole(width / ratio)))))

    def _resized(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        if tuple(x.shape[-2:]) == size:
            return x
        # With antialiasing these are Pillow's kernels; bicubic kernels overshoot, which Pillow clips.
        return F.interpolate(x, size, mode=self.interpolation, antialias=True, align_corners=False).clamp(0, 1)

    def _centred(self, x: Tensor) -> Tensor:
        down, right = (self.size[0] - x.shape[-2], self.size[1] - x.shape[-1])
        if down > 0 or right > 0:
            down, right = max(down, 0), max(right, 0)
            x = F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2), value=self.fill)
        top, left = (round((x.shape[-2] - self.size[0]) / 2), round((x.shape[-1] - self.size[1]) / 2))
        return x[..., top : top + self.size[0], left : left + self.size[1]]


def load_clip(config: ClipConfig, *, device: torch.device | str = "cpu", builtin: bool = False) -> Clip:
    """The CLIP that `config` names, in float32; by default the embedded one if `builtin`.

    Raises: UsageError for an unknown model, tag, folder or file, and for weights that are missing offline;
    MismatchError for damaged files; RunError if the hub cannot be reached.
    """
    source = source_of(config, builtin=builtin)
    import open_clip

    with warnings.catch_warnings():
        # The mismatch of GELU is corrected below; other warnings of open_clip are about its own code.
        warnings.simplefilter("ignore")
        try:
            model = open_clip.create_model(
                source.model,
                source.pretrained,
                device=torch.device(device),
                require_pretrained=True,
                force_quick_gelu=_quick_gelu(source),
            )
            tokenizer = open_clip.get_tokenizer(source.model)
        except Exception as error:
            raise _explained(source, error) from error
    visual: Any = model.visual
    return Clip(model, tokenizer, visual.preprocess_cfg, source.name)


def source_of(config: ClipConfig, *, builtin: bool = False) -> ClipSource:
    """The model for open_clip. Raises: UsageError for a name, tag, folder or file that does not exist."""
    model, pretrained = config.model, config.pretrained
    if model is None:
        if builtin and pretrained is None:
            return _in_folder(BUILTIN_CLIP, None)
        model, pretrained = DEFAULT_MODEL, pretrained or DEFAULT_TAG
    if model.startswith((BUILTIN_PREFIX, FOLDER)) or Path(model).expanduser().is_dir():
        return _in_folder(model, pretrained)
    if model.startswith(HUB):
        _check_alone(model, pretrained)
        return ClipSource(model)
    return _by_name(model, pretrained)


def _in_folder(model: str, pretrained: str | None) -> ClipSource:
    _check_alone(model, pretrained)
    if model.startswith(BUILTIN_PREFIX):
        folder = package_folder() / "builtin" / model.removeprefix(BUILTIN_PREFIX)
    else:
        folder = Path(model.removeprefix(FOLDER)).expanduser()
    if not (folder / CONFIG_FILE).is_file():
        if model.startswith(BUILTIN_PREFIX):
            known = sorted(BUILTIN_PREFIX + file.parent.name for file in folder.parent.glob(f"*/{CONFIG_FILE}"))
            raise UsageError(f"CLIP {model}", "no such built-in CLIP", f"Known: {', '.join(known) or 'none'}.")
        what = f"it has no {CONFIG_FILE}" if folder.is_dir() else "no such folder"
        raise UsageError(f"CLIP {model}", what, "Write a folder in open_clip's format.")
    if not any(file.suffix in _WEIGHTS for file in folder.iterdir()):
        raise UsageError(f"CLIP {model}", "the folder has no weights", "Put open_clip_model.safetensors there.")
    return ClipSource(f"{FOLDER}{folder}", given=model)


def _by_name(model: str, pretrained: str | None) -> ClipSource:
    import open_clip

    names = open_clip.list_models()
    if model.replace("/", "-") not in names:
        raise UsageError(f"CLIP {model}", "open_clip has no such model, and there is no such folder", _near(model))
    tags = open_clip.list_pretrained_tags_by_model(model)
    if pretrained is None:
        listed = f"one of: {', '.join(tags)}" if tags else "a file"
        raise UsageError(f"CLIP {model}", "its weights are not named", f"Write --clip-pretrained, {listed}.")
    if pretrained in tags:
        return ClipSource(model, pretrained)
    file = Path(pretrained).expanduser()
    if not file.is_file():
        what = f"{pretrained!r} is neither one of its tags nor a file"
        raise UsageError(f"CLIP {model}", what, suggestion(pretrained, tags) if tags else "Write a file of weights.")
    return ClipSource(model, str(file))


def _near(model: str) -> str:
    import open_clip

    return suggestion(model, [*open_clip.list_models(), BUILTIN_CLIP])


def _check_alone(model: str, pretrained: str | None) -> None:
    if pretrained is not None:
        what = f"{model} includes its weights, so that {pretrained!r} would be ignored"
        raise UsageError("clip.pretrained", what, "Leave it out.")


def _quick_gelu(source: ClipSource) -> bool:
    """Whether the weights were trained with OpenAI's approximate GELU, which is not clear from the model's name."""
    from open_clip.pretrained import get_pretrained_cfg

    if source.pretrained is None or source.model.startswith((HUB, FOLDER)):
        return False
    return bool((get_pretrained_cfg(source.model.replace("/", "-"), source.pretrained) or {}).get("quick_gelu"))


def _explained(source: ClipSource, error: Exception) -> Exception:
    """The error for a CLIP that open_clip could not load."""
    where, reason = f"CLIP {source.name}", " ".join(str(error).split("\n")[0].split()).rstrip(".")
    import huggingface_hub

    local = source.model.startswith(FOLDER) or (source.pretrained is not None and Path(source.pretrained).is_file())
    if local:
        return MismatchError(
            where, f"its files cannot be loaded ({reason})", "Give a folder or a file of another CLIP."
        )
    if huggingface_hub.is_offline_mode():
        what = "its weights are not in the local cache, and HF_HUB_OFFLINE=1 forbids downloading them"
        return UsageError(where, what, "Unset HF_HUB_OFFLINE, or write --clip-model with the folder of a CLIP.")
    text = f"{error} {error.__cause__}".lower()
    if any(word in text for word in ("connect", "resolve", "timed out", "offline", "cached files", "locate the file")):
        what = "its weights are not on this machine, and the hub cannot be reached"
        return UsageError(where, what, "Go online, or write --clip-model with the folder of a CLIP.")
    return RunError(where, f"open_clip cannot load it ({reason})", REMEDY)


def _per_channel(values: Any) -> Tensor:
    listed = [values] * 3 if isinstance(values, (int, float)) else list(values)
    return torch.tensor(listed, dtype=torch.float32)[:, None, None]
