"""A drawn picture as a PNG file that says how it was made: a text entry for each fact, and a line in A1111's format.

Contents: PictureFacts, texts, parameters_line, write_png.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from molecli import __version__
from molecli.files.atomic import write_bytes

# Unless it is quoted, a value with one of these characters would be cut short when A1111's line is read back.
_QUOTED = re.compile(r"[,:\n\"]")


@dataclass(frozen=True)
class PictureFacts:
    """How one picture was made. loras: weights by name; for a learned method those that its gates started from.

    settings: of the method, such as switch's tau. dtype: of the UNet's weights. digest: a hash of all that the picture
    depends on, by which a resumed run recognises its own pictures. more: rarer settings, where they are set.
    """

    prompt: str
    seed: int
    method: str
    steps: int
    guidance: float
    scheduler: str
    base: str
    negative_prompt: str = ""
    loras: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = ""
    digest: str | None = None
    more: Mapping[str, Any] = field(default_factory=dict)


def texts(facts: PictureFacts, size: tuple[int, int]) -> dict[str, str]:
    """The PNG's text entries for a picture of (width, height) pixels."""
    return {
        "parameters": parameters_line(facts, size),
        "prompt": facts.prompt,
        "negative_prompt": facts.negative_prompt,
        "seed": str(facts.seed),
        "method": facts.method,
        "method_settings": json.dumps(dict(facts.settings)),
        "loras": _lora_list(facts),
        "steps": str(facts.steps),
        "guidance": f"{facts.guidance:g}",
        "scheduler": facts.scheduler,
        "base": facts.base,
        "dtype": facts.dtype,
        "mole_version": __version__,
        **({"digest": facts.digest} if facts.digest else {}),
        **{name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.more.items()},
    }


def parameters_line(facts: PictureFacts, size: tuple[int, int]) -> str:
    """The entry that viewers know from A1111: the prompt, the negative prompt, then `Key: value` pairs on one line."""
    values = {
        "Steps": str(facts.steps),
        "Sampler": facts.scheduler,
        "CFG scale": f"{facts.guidance:g}",
        "Seed": str(facts.seed),
        "Size": f"{size[0]}x{size[1]}",
        "Model": facts.base,
        # A1111 calls the last layer 1, diffusers calls it 0.
        "Clip skip": str(facts.more["clip_skip"] + 1) if "clip_skip" in facts.more else "",
        "Denoising strength": f"{facts.more['strength']:g}" if "strength" in facts.more else "",
        "Method": facts.method,
        "LoRAs": _lora_list(facts),
        "Version": f"mole {__version__}",
    }
    pairs = ", ".join(f"{key}: {_quoted(value)}" for key, value in values.items() if value)
    negative = [f"Negative prompt: {facts.negative_prompt}"] if facts.negative_prompt else []
    return "\n".join([facts.prompt, *negative, pairs])


def write_png(path: str | Path, picture: Image.Image, facts: PictureFacts) -> Path:
    """The path, after writing the picture with its facts; readers never see a partial file. Raises: RunError."""
    info, stream = PngInfo(), BytesIO()
    for key, value in texts(facts, picture.size).items():
        # Bytes of a command line that are not UTF-8 arrive as lone surrogates, which PNG cannot hold.
        info.add_text(key, value.encode("utf-8", "replace").decode("utf-8"))
    picture.save(stream, format="PNG", pnginfo=info)
    return write_bytes(path, stream.getvalue())


def _lora_list(facts: PictureFacts) -> str:
    return ", ".join(f"{name}: {weight:g}" for name, weight in facts.loras.items())


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if _QUOTED.search(value) else value
