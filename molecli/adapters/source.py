"""Finds the files of a LoRA: a built-in name, a local path or the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from molecli.catalog.builtin import builtin_loras
from molecli.errors import RunError, UsageError, near
from molecli.files.chat_template import TEMPLATE_FILES
from molecli.files.lora_spec import COMPONENTS, CONFIG_FILE, DIFFUSERS_FILE, WEIGHTS_FILE, LoraLike, builtin_meant

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[\w.\-]+")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# Files with these names are not LoRAs, but whole models or gates.
_OTHERS = re.compile(r"(model|diffusion_pytorch_model|composition)\b.*")
_EITHER = "Name a PEFT folder or a .safetensors file."


def resolve_source(spec: LoraLike) -> Path:
    """The folder or the .safetensors file that `spec.source` names, downloaded from the hub if it must be.

    A LoRA at a local path takes precedence over a built-in name, any local path over a hub id.
    Raises: UsageError if there is nothing; RunError if the hub cannot be reached.
    """
    builtin = builtin_meant(spec.source)
    if builtin is not None:
        return builtin[1]
    path = Path(spec.source).expanduser()
    if path.exists():
        return path
    if _HUB_ID.fullmatch(spec.source) and path.suffix not in (".safetensors", *_PICKLES):
        return _download(spec.source)
    nearest = near(spec.source, builtin_loras())
    remedy = f"Did you mean {nearest!r}?" if nearest else "Check the path."
    raise UsageError(spec.source, "no such built-in LoRA, folder or file", remedy)


def is_there(spec: LoraLike) -> bool:
    """Whether there is a LoRA file at `spec.source`, on disk or on the hub (if that can be reached)."""
    try:
        weights_files(resolve_source(spec))
    except (UsageError, RunError):
        return False
    return True


def canonical_source(spec: LoraLike) -> str:
    """`spec.source` in a form that is valid in any working folder: local paths are made absolute."""
    builtin = builtin_meant(spec.source)
    if builtin is not None:
        return builtin[0]
    path = Path(spec.source).expanduser()
    return path.resolve().as_posix() if path.exists() else spec.source


def weights_files(path: Path) -> dict[str, Path]:
    """component -> .safetensors file at `path`, a file or a folder; "" for a file with all components.

    A folder has PEFT's file, diffusers' file, PEFT's files in subfolders (unet, text_encoder, …) or one other file.
    Raises: UsageError for a pickle, for no file and for several files.
    """
    if path.is_dir():
        return _in_folder(path)
    if path.suffix in _PICKLES:
        raise _pickle(path)
    if path.suffix != ".safetensors":
        raise UsageError(str(path), "it is not a .safetensors file", _EITHER)
    return {"": path}


def _in_folder(folder: Path) -> dict[str, Path]:
    found = _named_files(folder)
    if found:
        return found
    stems = (Path(WEIGHTS_FILE).stem, Path(DIFFUSERS_FILE).stem)
    places = [file for part in ("", *COMPONENTS) for file in sorted((folder / part).glob("*"))]
    pickles = [file for file in places if file.suffix in _PICKLES and file.stem in stems]
    if pickles:
        raise _pickle(pickles[0])
    others = _other_files(file.name for file in folder.iterdir())
    if len(others) > 1:
        what = f"it has {len(others)} .safetensors files: {', '.join(others)}"
        raise UsageError(str(folder), what, f"Name one: {folder / others[0]}.")
    if not others:
        raise UsageError(str(folder), f"it has no {WEIGHTS_FILE}", _EITHER)
    return {"": folder / others[0]}


def _named_files(folder: Path) -> dict[str, Path]:
    """component -> file, for the files in `folder` with the standard names."""
    for name in (WEIGHTS_FILE, DIFFUSERS_FILE):
        if (folder / name).is_file():
            return {"": folder / name}
    parts = {component: folder / component / WEIGHTS_FILE for component in COMPONENTS}
    return {component: file for component, file in parts.items() if file.is_file()}


def _other_files(names: Any) -> list[str]:
    return sorted(name for name in names if name.endswith(".safetensors") and not _OTHERS.fullmatch(name))


def _pickle(path: Path) -> UsageError:
    remedy = "Save it again with safe_serialization=True."
    return UsageError(str(path), "it is a pickle, which is refused because it can run code when it is loaded", remedy)


def _download(repository: str) -> Path:
    # Imported here: huggingface_hub is only needed for hub ids.
    from huggingface_hub import HfApi, snapshot_download

    names = (CONFIG_FILE, WEIGHTS_FILE)
    patterns = [*names, DIFFUSERS_FILE, *(f"{component}/{name}" for component in COMPONENTS for name in names)]
    patterns += TEMPLATE_FILES
    folder = _from_hub(repository, lambda: Path(snapshot_download(repository, allow_patterns=patterns)))
    if _named_files(folder) or _other_files(file.name for file in folder.iterdir()):
        return folder
    # Another file name, to be found in the list of the repository's files.
    others = _other_files(_from_hub(repository, lambda: HfApi().list_repo_files(repository)))
    others = [name for name in others if "/" not in name]
    if len(others) > 1:
        what = f"it has {len(others)} .safetensors files: {', '.join(others)}"
        raise UsageError(repository, what, "Download one and name the file.")
    if others:
        return _from_hub(repository, lambda: Path(snapshot_download(repository, allow_patterns=others)))
    return folder


def _from_hub(repository: str, call: Callable[[], Any]) -> Any:
    """The result of `call`. Raises: UsageError, RunError that explain its errors."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return call()
    except RepositoryNotFoundError:
        raise UsageError(repository, "no such folder, file or hub repository", "Check the path.") from None
    except LocalEntryNotFoundError:
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
            what = "no such folder or file, and it is not in the hub's local cache (HF_HUB_OFFLINE is set)"
            raise UsageError(repository, what, "Check the path, or unset HF_HUB_OFFLINE to download.") from None
        raise RunError(
            repository, "no such folder or file, and the hub cannot be reached", "Check the path and the network."
        ) from None
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(repository, f"it cannot be downloaded ({reason})", "Try again.") from None
