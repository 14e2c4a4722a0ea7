"""Pictures as data URLs for a request."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image


class UnreadablePicture(Exception):
    """A picture that cannot be shown to a judge; the message names it and the reason."""


def data_url(path: Path) -> str:
    """The picture at `path` as a PNG data URL, transparency on white.

    Only pixels are sent: the metadata of a file from `mole sample` names the method, which a judge must not know.
    Raises: UnreadablePicture.
    """
    try:
        with Image.open(path) as picture:
            picture.load()
            pixels = _opaque(picture)
    except FileNotFoundError:
        raise UnreadablePicture(f"{path} does not exist") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise UnreadablePicture(f"{path} is not a readable picture") from None
    stream = io.BytesIO()
    pixels.save(stream, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"


def _opaque(picture: Image.Image) -> Image.Image:
    """A new RGB picture without metadata."""
    rgba = picture.convert("RGBA")
    white = Image.new("RGB", rgba.size, "white")
    white.paste(rgba, mask=rgba.getchannel("A"))
    return white
