"""Pictures in files, read as RGB whatever they are stored as.

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
SMALLEST = 16  # pixels: below, there is nothing to see


def pictures_in(folder: str | Path) -> list[Path]:
    """The picture files directly in `folder`, by name. Raises: UsageError for no such folder, or none in it."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        what = "a file, not a folder of pictures" if folder.exists() else "no such folder of pictures"
        raise UsageError(str(folder), what, "Check the path.")
    found = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and not _hidden(file))
    if not found:
        raise UsageError(str(folder), "holds no pictures", f"Put some there ({', '.join(s[1:] for s in SUFFIXES)}).")
    return found


def read_picture(path: str | Path, *, smallest: int = SMALLEST) -> Image.Image:
    """The picture in RGB: turned as its camera says, transparency over white, of an animation the first frame.

    Raises: UsageError where there is none, for CMYK, for a side of less than `smallest` pixels and for a size that
    could exhaust the memory; MismatchError for a file that is damaged or no picture.
    """
    path = Path(path)
    try:
        with warnings.catch_warnings():
            # A size that PIL warns of is refused like one that it refuses by itself.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.mode == "CMYK":
                    remedy = "Convert it to RGB with its colour profile, in any picture editor."
                    raise UsageError(str(path), "stored in CMYK, the colours of a printing press", remedy)
                image.load()
                picture = _rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise UsageError(str(path), "no such picture", "Check the path.") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UsageError(str(path), "too large to be read safely", "Make it smaller first.") from None
    except UnidentifiedImageError:
        raise MismatchError(str(path), "damaged, or no picture at all", "Remove it from the folder.") from None
    except (OSError, ValueError, SyntaxError) as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise MismatchError(str(path), f"a damaged picture ({reason})", "Replace or remove it.") from None
    if min(picture.size) < smallest:
        size = f"{picture.width}x{picture.height}"
        what = f"{size} pixels are too few: each side needs {smallest}"
        raise UsageError(str(path), what, "Give a larger picture.")
    return picture


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, which PIL would clip to 8
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _hidden(file: Path) -> bool:
    return file.name.startswith(".")
