"""Which files of a folder are a LoRA's: one at its top, or one in the subfolder of each component.

Nothing is dropped in silence: a component whose file cannot be told is refused, and files beside those that are read
are named.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from molecli.errors import UsageError
from molecli.files.lora_spec import COMPONENTS, DIFFUSERS_FILE, WEIGHTS_FILE

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
EITHER = "Name a PEFT folder or a .safetensors file."
_STANDARD = (WEIGHTS_FILE, DIFFUSERS_FILE)
_STEMS = tuple(Path(name).stem for name in _STANDARD)
# Files with these names are not LoRAs, but whole models or gates.
_OTHERS = re.compile(r"(model|diffusion_pytorch_model|composition)(\.\w+)?(-\d+-of-\d+)?(\.\w+)?\.safetensors")
# What trainers leave of earlier steps: the same LoRA, unfinished.
_EARLIER = re.compile(r"checkpoints?([-_]?\d+)?")


@dataclass(frozen=True)
class LoraFiles:
    """component -> file ("" for a file with all components), and the weights beside them that are not read."""

    files: Mapping[str, Path]
    unread: tuple[Path, ...] = field(default=())


def files_in(folder: Path) -> LoraFiles:
    """The files of the LoRA in `folder`.

    At its top, PEFT's name comes before diffusers', and that before one other file. Each component's subfolder is
    searched in the same way, also one folder deeper, where PEFT puts adapters that have a name.
    Raises: UsageError for a pickle, for no file, for several, and for parts that cannot be told.
    """
    top = _standard(folder)
    parts = {component: file for component in COMPONENTS if (file := _part(folder / component, top is not None))}
    if top is not None and parts:
        what = f"it has weights at its top ({top.name}) and in {', '.join(f'{part}/' for part in parts)}"
        raise UsageError(str(folder), what, f"Name the one that is meant, such as {top}.")
    if top is not None:
        return _with_unread(folder, {"": top})
    if parts:
        _check_parts(folder, parts)
        return _with_unread(folder, parts)
    pickles = [file for part in ("", *COMPONENTS) for file in _pickles(folder / part) if is_pickled(file)]
    if pickles:
        raise pickle(pickles[0])
    others = lora_names(file.name for file in folder.iterdir())
    if len(others) > 1:
        raise _several(folder, others, f"Name one: {folder / others[0]}.")
    if not others:
        inside = next((file for file in _inside(folder) if file.parent != folder and lora_names([file.name])), None)
        remedy = EITHER if inside is None else f"Name the folder that holds the LoRA, such as {inside.parent}."
        raise UsageError(str(folder), f"it has no {WEIGHTS_FILE}", remedy)
    return _with_unread(folder, {"": folder / others[0]})


def lora_names(names: Iterable[str]) -> list[str]:
    """The names of files that may be LoRAs, in order."""
    return sorted(name for name in names if name.endswith(".safetensors") and not _OTHERS.fullmatch(name))


def is_pickled(path: Path) -> bool:
    """Whether it is a LoRA as a pickle, by its name."""
    return path.suffix in PICKLES and path.stem in _STEMS


def pickle(path: Path) -> UsageError:
    """The error for a pickle."""
    remedy = "Save it again with safe_serialization=True."
    return UsageError(str(path), "it is a pickle, which is refused because it can run code when it is loaded", remedy)


def _standard(folder: Path) -> Path | None:
    return next((folder / name for name in _STANDARD if (folder / name).is_file()), None)


def _part(folder: Path, optional: bool) -> Path | None:
    """The LoRA in the folder of one component, or None; `optional` if another file may hold everything."""
    if not folder.is_dir():
        return None
    for place in (folder, *sorted(path for path in folder.iterdir() if path.is_dir() and not _is_earlier(path))):
        if file := _standard(place):
            return file
        names = lora_names(file.name for file in place.iterdir())
        if len(names) > 1 and not optional:
            raise _several(folder, names, "Leave one of them in it, or name one file.")
        if names:
            return place / names[0]
    return None


def _check_parts(folder: Path, parts: Mapping[str, Path]) -> None:
    """Raises: UsageError if weights of a component, or of an unknown one, would be left out."""
    for component in COMPONENTS:
        place = folder / component
        if component in parts or not place.is_dir():
            continue
        if stored := list(filter(is_pickled, _pickles(place))):
            raise pickle(stored[0])
        if whole := sorted([*place.glob("*.safetensors"), *_pickles(place)]):
            what = f"its {component}/ holds {whole[0].name}, which is no LoRA by its name"
            remedy = f"Rename it to {WEIGHTS_FILE} if it is one, otherwise leave it out."
            raise UsageError(str(folder), what, remedy)
    for file in _inside(folder):
        part = file.relative_to(folder).parts[0]
        if len(file.relative_to(folder).parts) > 1 and part not in COMPONENTS and lora_names([file.name]):
            what = f"its {part}/{file.name} belongs to none of the parts {', '.join(COMPONENTS)}"
            raise UsageError(str(folder), what, "Give the subfolder the name of its part, or leave it out.")


def _with_unread(folder: Path, files: Mapping[str, Path]) -> LoraFiles:
    read = set(files.values())
    copies = {file.with_suffix("") for file in read}  # the same weights as a pickle
    beside = [file for file in _inside(folder) if file not in read and file.with_suffix("") not in copies]
    return LoraFiles(files, tuple(file for file in beside if not file.name.startswith("composition.")))


def _inside(folder: Path) -> Iterator[Path]:
    """The weights in `folder` and in its subfolders, without those of a training's earlier steps."""
    for place in (folder, *sorted(path for path in folder.iterdir() if path.is_dir() and not _is_earlier(path))):
        yield from sorted(place.glob("*.safetensors"))
        yield from filter(is_pickled, _pickles(place))


def _pickles(place: Path) -> list[Path]:
    return sorted(file for file in place.glob("*") if file.suffix in PICKLES and file.is_file())


def _is_earlier(path: Path) -> bool:
    return _EARLIER.fullmatch(path.name) is not None


def _several(folder: Path, names: list[str], remedy: str) -> UsageError:
    return UsageError(str(folder), f"it has {len(names)} .safetensors files: {', '.join(names)}", remedy)
