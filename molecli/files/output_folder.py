"""The output folder of a run: its default name, and the rules for folders that are not empty."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

from molecli.errors import RunError, UsageError
from molecli.files.lora_spec import COMPONENTS

RECIPE_FILE, SAMPLES_FILE = "recipe.yaml", "samples.jsonl"
# The files of runs, as glob patterns: --overwrite removes these and nothing else.
PRODUCTS = (
    RECIPE_FILE,
    "report.json",
    "report.md",
    "composition.safetensors",
    "train_log.jsonl",
    "checkpoints",
    "adapter_config.json",
    "adapter_model.safetensors",
    "pytorch_lora_weights.safetensors",
    "lora.safetensors",
    "svdiff.safetensors",
    # A pipeline's LoRA in PEFT's layout. Not the whole folder: it may belong to a pipeline.
    *(f"{part}/{name}" for part in COMPONENTS for name in ("adapter_config.json", "adapter_model.safetensors")),
    "concept.json",
    "class_pictures",
    "results.json",
    "comparison.json",
    "comparison.md",
    "samples*.jsonl",
    "judgements.jsonl",
    "drawn",
    "sheet*.png",
    "gates.json",
    "gates.csv",
    "gates.png",
    "entropy.png",
    "preview",
    "study.md",
    "study.json",
    "study.png",
    "study-steps",
)


def default_folder(command: str, parent: str | Path = "runs") -> str:
    """`runs/<command>-<timestamp>`, with a number appended if that exists."""
    stem = f"{parent}/{command}-{time.strftime('%Y%m%d-%H%M%S')}"
    name, number = stem, 2
    while Path(name).exists():
        name, number = f"{stem}-{number}", number + 1
    return name


def claim(folder: str | Path, *, overwrite: bool = False, resume: bool = False, resumable: bool = True) -> Path:
    """Makes the folder, which is returned: empty, or with `resume` as an earlier run left it.

    `overwrite` removes the files of an earlier run (`PRODUCTS`). `resumable` only changes the advice in the message.
    Raises: UsageError if the folder is not empty, RunError if it cannot be made.
    """
    folder = check(folder, overwrite=overwrite, resume=resume, resumable=resumable)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "Permission denied")
        if overwrite:
            _clear(folder)
    except OSError as error:
        reason = error.strerror or str(error)
        raise RunError(str(folder), f"cannot be written ({reason})", "Choose another --output.") from None
    return folder


def check(folder: str | Path, *, overwrite: bool = False, resume: bool = False, resumable: bool = True) -> Path:
    """The folder, if a run may write there; nothing is changed. Raises: UsageError as `claim` does."""
    folder = Path(folder)
    if overwrite and resume:
        raise UsageError("--overwrite --resume", "they contradict each other", "Write only one of them.")
    if folder.exists() and not folder.is_dir():
        raise UsageError(str(folder), "the output is a file, not a folder", "Choose another --output.")
    if folder.is_dir() and any(folder.iterdir()) and not (overwrite or resume):
        going_on = ", --resume to continue the run there" if resumable else ""
        remedy = f"Choose another --output, or write --overwrite to replace it{going_on}."
        raise UsageError(str(folder), "the output folder is not empty", remedy)
    if resume and not folder.is_dir():
        raise UsageError(str(folder), "there is no run to resume", "Check --output.")
    return folder


def _clear(folder: Path) -> None:
    for pattern in PRODUCTS:
        for path in folder.glob(pattern):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
