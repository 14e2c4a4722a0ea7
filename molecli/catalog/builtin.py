"""The models and recipes inside the package, by name: embedded bases, their LoRAs, recipes. Needs no torch.

Contents: package_folder, builtin_base, builtin_loras, builtin_lora, is_image_lora, recipes.
"""

from __future__ import annotations

import string
from pathlib import Path

from molecli.errors import UsageError

BUILTIN_PREFIX = "builtin:"
BUILTIN_BASE = "builtin:tiny-t5"
BUILTIN_IMAGE_BASE = "builtin:tiny-sd"
# Default scale of classifier-free guidance: for any diffusion base, and the best value for the embedded one.
DEFAULT_GUIDANCE = 7.5
BUILTIN_IMAGE_GUIDANCE = 2.5
# Share of the steps that are run from a given picture: enough to change it, little enough to keep its layout.
DEFAULT_STRENGTH = 0.7
PIPELINE_FILE = "model_index.json"
IMAGE_LORA_FILE = "pytorch_lora_weights.safetensors"
# The LoRAs a, b, c, ...: the first two share a joint task. Other LoRAs follow in alphabetical order.
LORA_ORDER = ("french", "reverse", "opposite", "plural", "double")


def package_folder() -> Path:
    """The folder of the installed package `molecli`."""
    return Path(__file__).resolve().parents[1]


def builtin_base(name: str = BUILTIN_BASE) -> Path:
    """The folder of the embedded base `name` ("builtin:tiny-t5" or "tiny-t5").

    Raises: UsageError if there is no such base.
    """
    bare = name.removeprefix(BUILTIN_PREFIX)
    folder = package_folder() / "builtin"
    known = _folders_with(folder, "config.json") | _folders_with(folder, PIPELINE_FILE)
    if bare not in known:
        names = ", ".join(BUILTIN_PREFIX + n for n in known) or "none in this installation"
        raise UsageError(f"{BUILTIN_PREFIX}{bare}", "no such built-in base", f"Known: {names}.")
    return known[bare]


def builtin_loras(base: str = BUILTIN_BASE) -> dict[str, Path]:
    """The embedded LoRAs of the embedded base `base`, in order: name -> folder."""
    folder = package_folder() / "builtin"
    if base.removeprefix(BUILTIN_PREFIX) == BUILTIN_IMAGE_BASE.removeprefix(BUILTIN_PREFIX):
        return _folders_with(folder / "image-loras", IMAGE_LORA_FILE)
    found = _folders_with(folder / "loras", "adapter_config.json")
    return {name: found[name] for name in sorted(found, key=_place)}


def is_image_lora(name: str) -> bool:
    """Whether `name` is an embedded LoRA of the embedded image base."""
    return name.removeprefix(BUILTIN_PREFIX) in builtin_loras(BUILTIN_IMAGE_BASE)


def builtin_lora(name: str) -> tuple[str, Path] | None:
    """(name, folder) of an embedded LoRA, given its name or its letter (a is the first, b the second, ...).

    Letters stand for LoRAs of the embedded text base. None if there is no such LoRA; the caller may then look for a
    folder or a hub id.
    """
    loras = builtin_loras()
    bare = name.removeprefix(BUILTIN_PREFIX)
    named = loras | builtin_loras(BUILTIN_IMAGE_BASE)
    if bare in named:
        return bare, named[bare]
    position = string.ascii_lowercase.find(bare) if len(bare) == 1 else -1
    if 0 <= position < len(loras):
        real = list(loras)[position]
        return real, loras[real]
    return None


def recipes() -> dict[str, Path]:
    """The shipped recipes: name such as "text/smollm2-135m" -> file."""
    folder = _recipe_folder()
    files = sorted(folder.rglob("*.yaml")) if folder.is_dir() else []
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}


def _place(name: str) -> tuple[int, str]:
    return (LORA_ORDER.index(name) if name in LORA_ORDER else len(LORA_ORDER), name)


def _recipe_folder() -> Path:
    # An installed wheel has them in molecli/recipes, a checkout next to the package.
    inside = package_folder() / "recipes"
    return inside if inside.is_dir() else package_folder().parent / "recipes"


def _folders_with(parent: Path, marker: str) -> dict[str, Path]:
    if not parent.is_dir():
        return {}
    return {folder.name: folder for folder in sorted(parent.iterdir()) if (folder / marker).is_file()}
