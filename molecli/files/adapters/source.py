"""Where a LoRA's files are: a built-in name, a local path or the hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from molecli.catalog import builtin_loras
from molecli.errors import RunError, UsageError
from molecli.files.lora_spec import CONFIG_FILE, WEIGHTS_FILE, LoraLike, builtin_meant
from molecli.files.near import near

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[\w.\-]+")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def resolve_source(spec: LoraLike) -> Path:
    """The folder or the .safetensors file that `spec.source` names, downloaded from the hub if it must be.

    A LoRA of one's own comes before a built-in name, any other path before a hub id.
    Raises: UsageError when there is nothing there; RunError when the hub cannot be reached.
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


def canonical_source(spec: LoraLike) -> str:
    """`spec.source` in a form that holds from any working folder: local paths made absolute."""
    builtin = builtin_meant(spec.source)
    if builtin is not None:
        return builtin[0]
    path = Path(spec.source).expanduser()
    return path.resolve().as_posix() if path.exists() else spec.source


def weights_file(path: Path) -> Path:
    """The .safetensors file at `path` (a folder or the file). Raises: UsageError for a pickle or for none."""
    if path.is_dir():
        if (path / WEIGHTS_FILE).is_file():
            return path / WEIGHTS_FILE
        pickles = sorted(file for file in path.iterdir() if file.suffix in _PICKLES and file.stem == "adapter_model")
        if pickles:
            raise _pickle(pickles[0])
        raise UsageError(str(path), f"holds no {WEIGHTS_FILE}", "Name a PEFT folder or a .safetensors file.")
    if path.suffix in _PICKLES:
        raise _pickle(path)
    if path.suffix != ".safetensors":
        raise UsageError(str(path), "not a .safetensors file", "Name a PEFT folder or a .safetensors file.")
    return path


def _pickle(path: Path) -> UsageError:
    remedy = "Save it again with safe_serialization=True."
    return UsageError(str(path), "a pickle, which can run code when it is loaded, is refused", remedy)


def _download(repository: str) -> Path:
    # Imported here: huggingface_hub is only needed for ids that are no local path.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(repository, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))
    except RepositoryNotFoundError:
        raise UsageError(repository, "no such folder, file or hub repository", "Check the path.") from None
    except LocalEntryNotFoundError:
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
            what = "no such folder or file, and not in the hub's local cache (HF_HUB_OFFLINE is set)"
            raise UsageError(repository, what, "Check the path, or unset HF_HUB_OFFLINE to download.") from None
        raise RunError(repository, "no such folder or file, and the hub cannot be reached", "Check both.") from None
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(repository, f"cannot be downloaded ({reason})", "Try again.") from None
