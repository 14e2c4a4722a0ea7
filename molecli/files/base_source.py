"""Finds a base: a built-in name, a folder, a GGUF file, a checkpoint of a pipeline in one file, or a hub id.

It is checked before anything is read.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from molecli.catalog.builtin import BUILTIN_PREFIX, PIPELINE_FILE, builtin_base
from molecli.errors import MismatchError, RunError, UsageError, UserError
from molecli.files.tensor_file import opened

_PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle")
# The original code's names of a pipeline's parts in one file
UNET_IN_FILE = "model.diffusion_model."
ENCODERS_IN_FILE = ("cond_stage_model.", "conditioner.embedders.")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


# The keys of a base that say how prompts are written, and their flags. Only language models read them.
PROMPT_FLAGS = {
    "chat_template": "--no-chat-template",
    "template_file": "--template-file",
    "system_prompt": "--system-prompt",
    "template_args": "--template-arg",
    "source_language": "--source-language",
    "target_language": "--target-language",
}


class BaseSettings(Protocol):
    """The name of a base and how to load it; `config.BaseConfig` is one."""

    @property
    def id(self) -> str: ...
    @property
    def gguf_file(self) -> str | None: ...
    @property
    def dtype(self) -> str: ...
    @property
    def quantize(self) -> str | None: ...
    @property
    def chat_template(self) -> bool: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def template_file(self) -> str | None: ...
    @property
    def system_prompt(self) -> str | None: ...
    @property
    def template_args(self) -> Mapping[str, Any]: ...
    @property
    def source_language(self) -> str | None: ...
    @property
    def target_language(self) -> str | None: ...


@dataclass(frozen=True)
class BaseSource:
    """What transformers or diffusers loads: a folder or hub id, and a GGUF file in it.

    pipeline: it is a diffusers pipeline, with a model_index.json. checkpoint: it is one .safetensors file with all
    parts of a pipeline, under the names of the original code.
    """

    name: str
    path: str
    local: bool
    gguf_file: str | None = None
    revision: str | None = None
    pipeline: bool = False
    checkpoint: bool = False

    @property
    def arguments(self) -> dict[str, str]:
        """Keywords of `from_pretrained`, without the path."""
        given = {"gguf_file": self.gguf_file, "revision": None if self.local else self.revision}
        return {key: value for key, value in given.items() if value is not None}

    @property
    def where(self) -> str:
        """The path to name in messages about its contents."""
        return str(Path(self.path) / self.gguf_file) if self.gguf_file else self.path


def find_base(base: BaseSettings) -> BaseSource:
    """The source of the base. Raises: UsageError if there is none; RunError if GGUF cannot be read here."""
    if base.gguf_file is not None or base.id.endswith(".gguf"):
        _check_gguf_package(base.gguf_file or base.id)
    if base.id.startswith(BUILTIN_PREFIX):
        return _folder(base, builtin_base(base.id))
    path = Path(base.id).expanduser()
    if path.is_file():
        return _single_file(base, path)
    if path.is_dir():
        return _folder(base, path)
    if not _HUB_ID.fullmatch(base.id):
        raise UsageError(f"base {base.id}", "no such folder", "Write an existing folder, a hub id or builtin:NAME.")
    pipeline = base.gguf_file is None and _is_hub_pipeline(base.id, base.revision)
    return BaseSource(base.id, base.id, False, base.gguf_file, base.revision, pipeline)


def check_found(base: BaseSettings) -> None:
    """Checks that the base exists: a folder, or on the hub or in its cache. Raises: UserError that says why not.

    Requests config.json, the smallest file that every language model has.
    """
    import huggingface_hub

    source = find_base(base)
    if source.local or source.pipeline:
        return
    try:
        huggingface_hub.hf_hub_download(base.id, base.gguf_file or "config.json", revision=base.revision)
    except Exception as error:
        raise explain_hub(source, error, offline=huggingface_hub.is_offline_mode()) from None


def explain_hub(source: BaseSource, error: Exception, *, offline: bool) -> UserError:
    """The error for a base that the hub did not deliver."""
    where = f"base {source.name}"
    if offline:
        what = "no such folder or cached model, and HF_HUB_OFFLINE=1 forbids downloads"
        return UsageError(where, what, "Write an existing folder, or unset HF_HUB_OFFLINE.")
    if isinstance(error.__cause__, ConnectionError) or "connect" in str(error):
        return RunError(
            where, "no such folder, and the hub cannot be reached", "Write an existing folder, or go online."
        )
    reason = " ".join(str(error).split("\n")[0].split()).rstrip(".")
    return UsageError(where, f"no such folder, and the hub answers: {reason}", "Write an existing folder or a hub id.")


def _folder(base: BaseSettings, path: Path) -> BaseSource:
    pipeline = base.gguf_file is None and (path / PIPELINE_FILE).is_file()
    if not pipeline:
        _check_folder(path, base.gguf_file)
    return BaseSource(base.id, str(path), local=True, gguf_file=base.gguf_file, pipeline=pipeline)


def _is_hub_pipeline(hub_id: str, revision: str | None) -> bool:
    """Whether the hub, or its cache on this machine, has a model_index.json under that id."""
    import huggingface_hub

    try:
        huggingface_hub.hf_hub_download(hub_id, PIPELINE_FILE, revision=revision)
    except Exception:  # a language model has none; other errors show when the base itself is read
        return False
    return True


def _single_file(base: BaseSettings, path: Path) -> BaseSource:
    if path.suffix == ".safetensors":
        _check_checkpoint(base.id, path)
        return BaseSource(base.id, str(path), local=True, pipeline=True, checkpoint=True)
    if path.suffix in _PICKLES:
        what = "it is a pickle, which is refused because it can run code when it is loaded"
        raise UsageError(f"base {base.id}", what, "Write the .safetensors file of the same checkpoint, or a folder.")
    if path.suffix != ".gguf":
        raise UsageError(f"base {base.id}", "it is a file, not a folder", "Write the folder that holds config.json.")
    _check_folder(path.parent, path.name)
    return BaseSource(base.id, str(path.parent), local=True, gguf_file=path.name)


def _check_checkpoint(name: str, path: Path) -> None:
    """Raises: UsageError for a file that holds something else than a pipeline; MismatchError if it is damaged."""
    with opened(path, remedy="Download it again.") as file:
        keys = list(file.keys())
    if any("lora_" in key for key in keys):
        raise UsageError(f"base {name}", "it is a LoRA, not a base model", "Write it after --loras.")
    unet = any(key.startswith(UNET_IN_FILE) for key in keys)
    rest = all(any(key.startswith(start) for key in keys) for start in ("first_stage_model.", ENCODERS_IN_FILE))
    if unet and rest:
        return
    if unet:
        what, remedy = "it holds a UNet without its text encoder or VAE", "Write a whole pipeline's folder or file."
    else:
        what, remedy = "it is a file, not a folder", "Write the folder that holds config.json."
    raise UsageError(f"base {name}", what, remedy)


def _check_folder(folder: Path, gguf_file: str | None) -> None:
    """Raises: UsageError for a folder without the named GGUF file or without a config.json."""
    ggufs = ", ".join(sorted(file.name for file in folder.glob("*.gguf")))
    if gguf_file is not None:
        _check_gguf_file(folder / gguf_file, ggufs)
    elif not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise UsageError(f"base {folder}", "it is a LoRA, not a base model", "Write it after --loras.")
        if ggufs:
            raise UsageError(f"base {folder}", "it has only GGUF files", f"Add --gguf-file with one of: {ggufs}.")
        raise UsageError(f"base {folder}", "it has no config.json", "Write a folder that transformers can load.")
    else:
        _check_config(folder / "config.json")


def _check_gguf_file(file: Path, others: str) -> None:
    if not file.is_file():
        raise UsageError(str(file), "no such GGUF file", f"There are: {others or 'none'}.")
    with file.open("rb") as stream:
        magic = stream.read(4)
    if magic != b"GGUF":
        raise MismatchError(str(file), "it is damaged, or not a GGUF file", "Download it again.")


def _check_config(file: Path) -> None:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MismatchError(str(file), "it is damaged: not valid JSON", "Download the base again.") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise UsageError(str(file), "it has no model_type", "Write a folder that transformers can load.")


def _check_gguf_package(file: str) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise RunError(file, "reading GGUF needs the package gguf", "Run: pip install gguf.")
