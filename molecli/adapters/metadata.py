"""The configuration of a LoRA file: adapter_config.json next to it, or JSON in its metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from molecli.adapters.settings import LoraSettings, parse_config, read_config
from molecli.files.lora_spec import COMPONENTS, CONFIG_FILE

# Metadata keys that may hold PEFT's configuration as JSON; the first is that of diffusers.
CONFIG_KEYS = ("lora_adapter_metadata", "adapter_config", "peft_config", "config")
# Metadata keys that name the base: that of this package, then kohya's.
BASE_KEYS = ("base_model_name_or_path", "ss_sd_model_name")


@dataclass(frozen=True)
class Configured:
    """Settings by component of a pipeline ("" is the default), and where they were found."""

    by_component: Mapping[str, LoraSettings] = field(default_factory=dict)
    origin: str = CONFIG_FILE
    remedy: str = "Its two files belong to different LoRAs, or rank_pattern is missing."
    base_model: str | None = None

    def of(self, module: str) -> tuple[LoraSettings | None, str]:
        """(the settings of `module`, its name in their patterns): each component has its own configuration."""
        component, _, path = module.partition(".")
        if component not in self.by_component or component not in COMPONENTS:
            # Patterns of one configuration for everything may name the component, which `LoraSettings` knows.
            return self.by_component.get(""), module
        return self.by_component[component], path


def configured(where: str, path: Path, metadata: Mapping[str, str], *, beside: bool) -> Configured:
    """The configuration of the LoRA file at `path`: next to it (with `beside`), else in its metadata, else none.

    Raises: UsageError, MismatchError as `parse_config` does.
    """
    named = _named(metadata)
    file = path.parent / CONFIG_FILE
    if beside and file.exists():
        settings = parse_config(where, read_config(file))
        return Configured({"": settings}, base_model=settings.base_model or named)
    for key in CONFIG_KEYS:
        found = {
            component: parse_config(where, config)
            for component, config in _by_component(metadata.get(key, "")).items()
            if "r" in config or "lora_alpha" in config
        }
        if found:
            base_model = next((s.base_model for s in found.values() if s.base_model), named)
            return Configured(found, "its metadata", "Export it again.", base_model)
    return Configured(base_model=named)


def named_base(path: Path, metadata: Mapping[str, str]) -> str | None:
    """The base that the file at `path` names, in its metadata or the configuration beside it; None if neither does."""
    try:
        beside = json.loads((path.parent / CONFIG_FILE).read_text(encoding="utf-8"))
        base = beside.get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    return base if isinstance(base, str) and base else _named(metadata)


def _named(metadata: Mapping[str, str]) -> str | None:
    return next((metadata[key] for key in BASE_KEYS if metadata.get(key)), None)


def _by_component(text: str) -> dict[str, dict[str, Any]]:
    """component -> its part of the JSON object in `text`; {} if that is not an object.

    diffusers writes one object whose keys begin with the component: "unet.r". Another prefix that all keys share
    ("transformer.") is dropped.
    """
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    if not isinstance(value, dict) or not value:
        return {}
    split = {key: key.partition(".") for key in value}
    prefixes = {prefix for prefix, _, _ in split.values()}
    if not all(dot for _, dot, _ in split.values()) or not (len(prefixes) == 1 or prefixes <= set(COMPONENTS)):
        return {"": value}
    parts: dict[str, dict[str, Any]] = {}
    for key, (prefix, _, rest) in split.items():
        parts.setdefault(prefix if prefix in COMPONENTS else "", {})[rest] = value[key]
    return parts
