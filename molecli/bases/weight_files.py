"""Which weights of a pipeline's part are read: the plain ones, otherwise those of the one variant that is there.

diffusion_pytorch_model.safetensors    diffusion_pytorch_model.fp16.safetensors    model.safetensors.index.fp16.json
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import huggingface_hub

from molecli.errors import UsageError
from molecli.files.base_source import BaseSource

_WEIGHTS = re.compile(
    r"(diffusion_pytorch_model|model|pytorch_model)"
    r"(\.(?P<variant>\w+))??(-\d+-of-\d+)?(\.(?P<other>\w+))??\.(safetensors|bin)"
    r"(\.index(\.(?P<index>\w+))?\.json)?"
)


def variant_of(source: BaseSource, part: str) -> str | None:
    """The variant of the weights in the folder `part`, as diffusers and transformers name it; None for plain ones.

    Plain weights come before any variant. Raises: UsageError for several variants and no plain weights.
    """
    found = variants(_names(source, part))
    if None in found or not found:
        return None
    if len(found) > 1:
        what = f"its {part} has only weights of the variants {', '.join(sorted(filter(None, found)))}"
        remedy = f"Keep the files of one of them in {source.where}/{part}."
        raise UsageError(f"base {source.name}", what, remedy)
    return found.pop()


def variants(names: Iterable[str]) -> set[str | None]:
    """The variants among a folder's file names; None stands for plain weights."""
    matches = filter(None, map(_WEIGHTS.fullmatch, names))
    return {match["variant"] or match["other"] or match["index"] for match in matches}


def _names(source: BaseSource, part: str) -> list[str]:
    if source.local:
        folder = Path(source.path) / part
        return [file.name for file in folder.iterdir()] if folder.is_dir() else []
    try:
        files = huggingface_hub.HfApi().list_repo_files(source.path, revision=source.revision)
    except Exception:  # offline: what the cache has
        try:
            cached = Path(
                huggingface_hub.snapshot_download(source.path, revision=source.revision, local_files_only=True)
            )
        except Exception:  # the part itself will say why
            return []
        return [file.name for file in (cached / part).glob("*")]
    return [name.rpartition("/")[2] for name in files if name.rpartition("/")[0] == part]
