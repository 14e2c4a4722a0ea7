"""Finds the files of a LoRA: a built-in name, a local path or the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from molecli.adapters.folder import EITHER, PICKLES, LoraFiles, files_in, is_pickled, lora_names, pickle
from molecli.catalog.builtin import builtin_loras
from molecli.errors import RunError, UsageError, near
from molecli.files.chat_template import TEMPLATE_FILES
from molecli.files.lora_spec import COMPONENTS, CONFIG_FILE, DIFFUSERS_FILE, WEIGHTS_FILE, LoraLike, builtin_meant

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[\w.\-]+")


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
    if _HUB_ID.fullmatch(spec.source) and path.suffix not in (".safetensors", *PICKLES):
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
    """component -> .safetensors file at `path`; see `lora_files`."""
    return dict(lora_files(path).files)


def lora_files(path: Path) -> LoraFiles:
    """The .safetensors files at `path`, a file or a folder; see `folder.files_in`.

    Raises: UsageError for a pickle, for no file and for several files.
    """
    if path.is_dir():
        return files_in(path)
    if path.suffix in PICKLES:
        raise pickle(path)
    if path.suffix != ".safetensors":
        raise UsageError(str(path), "it is not a .safetensors file", EITHER)
    return LoraFiles({"": path})


def _download(repository: str) -> Path:
    # Imported here: huggingface_hub is only needed for hub ids.
    from huggingface_hub import HfApi, snapshot_download

    def fetched(patterns: list[str]) -> Path:
        return _from_hub(repository, lambda: Path(snapshot_download(repository, allow_patterns=patterns)))

    names = (CONFIG_FILE, WEIGHTS_FILE, DIFFUSERS_FILE, *TEMPLATE_FILES)
    folder = fetched([*names, *(f"{component}/{name}" for component in COMPONENTS for name in names)])
    if lora_names(file.name for file in folder.iterdir()):
        return folder
    in_parts = [component for component in COMPONENTS if (folder / component).is_dir()]
    try:
        # Files of other names are found in the list of the repository's files.
        listed = _from_hub(repository, lambda: HfApi().list_repo_files(repository))
    except (UsageError, RunError):
        if in_parts:  # what the cache has
            return folder
        raise
    others = [name for name in listed if lora_names([name.rpartition("/")[2]])]
    inside = [name for name in others if name.partition("/")[0] in COMPONENTS]
    for name in listed:
        part = name.partition("/")[0]
        if is_pickled(Path(name)) and part in COMPONENTS and not any(n.startswith(f"{part}/") for n in inside):
            raise pickle(Path(repository) / name)
    if missing := [name for name in inside if not (folder / name).is_file()]:
        return fetched(missing)
    if inside:
        return folder
    others = sorted(name for name in others if "/" not in name)
    if len(others) > 1:
        what = f"it has {len(others)} .safetensors files: {', '.join(others)}"
        raise UsageError(repository, what, "Download one and name the file.")
    return fetched(others) if others else folder


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
