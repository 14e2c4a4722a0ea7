"""Reads a chat template from a file, or from a folder such as a LoRA's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from molecli.errors import UsageError

# Where transformers keeps the template, newest form first.
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FILES = (TEMPLATE_FILE, "chat_template.json", "tokenizer_config.json")


def read_template(path: str | Path) -> str:
    """The chat template in a .jinja or .json file, or in a folder. Raises: UsageError if there is none."""
    place = Path(path).expanduser()
    if not place.exists():
        raise UsageError(f"--template-file {path}", "no such file or folder", "Check the path.")
    found = find_template(place)
    if found is None:
        what = "it has no chat template"
        raise UsageError(f"--template-file {path}", what, f"Name a .jinja file, or a folder with {TEMPLATE_FILE}.")
    return found


def find_template(place: Path) -> str | None:
    """The chat template at `place`, a file or a folder; None if there is none that can be read."""
    files = [place / name for name in TEMPLATE_FILES] if place.is_dir() else [place]
    return next((text for file in files if file.is_file() and (text := _in_file(file))), None)


def _in_file(file: Path) -> str | None:
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix != ".json":
            # The text of a .safetensors file is no template.
            return text if file.suffix in (".jinja", ".jinja2", ".j2", ".txt") else None
        settings = json.loads(text)
    except (OSError, ValueError):
        return None
    return _default(settings.get("chat_template")) if isinstance(settings, dict) else None


def _default(template: Any) -> str | None:
    """The template itself, or the default one of several."""
    if isinstance(template, list):
        named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
