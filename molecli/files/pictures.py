"""Picture files, read as RGB whatever their format.

pictures_in     the picture files of a folder
read_picture    one picture, upright, without transparency
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from molecli.errors import MismatchError, UsageError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SMALLEST = 16  # pixels; a smaller picture shows nothing


def pictures_in(folder: str | Path) -> list[Path]:
    """The picture files directly in `folder`, by name. Raises: UsageError if there is no such folder or no picture."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        what = "it is a file, not a folder of pictures" if folder.exists() else "no such folder of pictures"
        raise UsageError(str(folder), what, "Check the path.")
    found = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and not _hidden(file))
    if not found:
        raise UsageError(str(folder), "it has no pictures", f"Put some there ({', '.join(s[1:] for s in SUFFIXES)}).")
    return found


def read_picture(path: str | Path, *, smallest: int = SMALLEST) -> Image.Image:
    """The picture in RGB: rotated by its EXIF tag, transparency on white, of an animation the first frame.

    Raises: UsageError if there is none, for CMYK, for a side below `smallest` pixels and for a size that could exhaust
    the memory; MismatchError if the file is damaged or not a picture.
    """
    path = Path(path)
    try:
        with warnings.catch_warnings():
            # Sizes that PIL only warns about are refused too.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.mode == "CMYK":
                    remedy = "Convert it to RGB with its colour profile, in any picture editor."
                    raise UsageError(str(path), "its colours are stored in CMYK", remedy)
                image.load()
                picture = _rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise UsageError(str(path), "no such picture", "Check the path.") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UsageError(str(path), "it is too large to be read safely", "Make it smaller first.") from None
    except UnidentifiedImageError:
        raise MismatchError(str(path), "it is damaged, or not a picture", "Remove it from the folder.") from None
    except (OSError, ValueError, SyntaxError) as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise MismatchError(str(path), f"it is damaged ({reason})", "Replace or remove it.") from None
    if min(picture.size) < smallest:
        size = f"{picture.width}x{picture.height}"
        what = f"{size} pixels are too few: each side must have {smallest}"
        raise UsageError(str(path), what, "Give a larger picture.")
    return picture


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which PIL would clip to 8 bits
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _hidden(file: Path) -> bool:
    return file.name.startswith(".")
