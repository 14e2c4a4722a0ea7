"""The prompt format of a run: said once, stored in a composition, compared with those of compositions and LoRAs.

PromptRecord       a format, as it is stored
prompt_settings    a base's settings -> keywords of its backbone, checked
refuse_settings    refuses them on a base that reads none
stored             the record of a backbone, as it is written to files
tell               says the format of a run, and what of its compositions and LoRAs was made with another one
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from molecli.adapters import LoraLike
from molecli.adapters.source import resolve_source
from molecli.bases.prompt_format import choose_format
from molecli.errors import UsageError, UserError
from molecli.files.base_source import PROMPT_FLAGS, BaseSettings
from molecli.files.chat_template import find_template, read_template
from molecli.protocols import Backbone, Note

# The key of the record in a composition's settings and in a LoRA's report.
KEY = "prompts"
_REPORT = "report.json"
_SHOWN = 40


@dataclass(frozen=True)
class PromptRecord:
    """A prompt format: the hash of its chat template (None: plain text) and what goes into it."""

    template: str | None = None
    system_prompt: str | None = None
    template_args: Mapping[str, Any] = field(default_factory=dict)
    source_language: str | None = None
    target_language: str | None = None

    def document(self) -> dict[str, Any]:
        """The record as JSON stores it."""
        return {**vars(self), "template_args": dict(self.template_args)}

    def words(self, called: str = "") -> str:
        """The format for a message; `called`: what its template is called, by default by its hash."""
        words = "plain text" if self.template is None else called or f"the chat template {self.template[:8]}"
        if self.system_prompt is not None:
            short = " ".join(self.system_prompt.split())
            words += f', system prompt "{short if len(short) <= _SHOWN else short[:_SHOWN] + "…"}"'
        words += "".join(f", {name}={json.dumps(value)}" for name, value in self.template_args.items())
        if self.target_language is not None:
            words += f", {f'from {self.source_language} ' if self.source_language else ''}to {self.target_language}"
        return words


def prompt_settings(base: BaseSettings, tokenizer: Any, where: str) -> dict[str, Any]:
    """The keywords of `Causal` and `Seq2Seq` for a base's settings; a template of its own goes into the tokenizer.

    Raises: UsageError for settings that the tokenizer's chat template does not take.
    """
    if base.template_file is not None:
        if not base.chat_template:
            raise UsageError("--template-file", "--no-chat-template leaves it out", "Write one of them.")
        tokenizer.chat_template = read_template(base.template_file)
    keys = ("chat_template", "system_prompt", "template_args")
    chosen = {key: getattr(base, key) for key in keys}
    choose_format(tokenizer, (), where, **chosen)
    return {**chosen, "source_language": base.source_language, "target_language": base.target_language}


def refuse_settings(base: BaseSettings) -> None:
    """Raises: UsageError for a prompt setting of a diffusion pipeline."""
    for key, flag in PROMPT_FLAGS.items():
        if getattr(base, key) not in (None, {}, True):
            what = "it is only for language models, and the base is a diffusion pipeline"
            raise UsageError(flag, what, "Leave it out.")


def record_of(backbone: Backbone) -> PromptRecord | None:
    """The prompt format of a language model; None for a pipeline."""
    found = getattr(backbone, "format", None)
    if found is None:
        return None
    languages = getattr(backbone, "languages", None)
    return PromptRecord(
        None if found.template is None else _digest(found.template),
        found.system,
        dict(found.args),
        getattr(languages, "source", None),
        getattr(languages, "target", None),
    )


def stored(backbone: Backbone) -> dict[str, Any]:
    """The record as an entry of a composition's settings or of a report; {} for a pipeline."""
    found = record_of(backbone)
    return {} if found is None else {KEY: found.document()}


def tell(
    backbone: Backbone,
    note: Note,
    *,
    base: BaseSettings,
    loras: Iterable[LoraLike] = (),
    compositions: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Says the format of a run in one line, then each LoRA that has its own; warns of compositions made with another.

    compositions: their settings, by name. Does nothing for a pipeline.
    """
    own = record_of(backbone)
    if own is None:
        return
    called = "the base's chat template" if base.template_file is None else f"the chat template of {base.template_file}"
    dated = backbone.format.dated  # type: ignore[attr-defined]
    left_out = " (--no-chat-template)" if not base.chat_template else ""
    note(f"prompts: {own.words(called)}{left_out}{'; it holds the date of today' if dated else ''}")
    for lora in loras:
        for line in _differences(lora, own, called, backbone.format.template):  # type: ignore[attr-defined]
            note(line)
    for name, settings in (compositions or {}).items():
        made = settings.get(KEY)
        if isinstance(made, Mapping) and (other := _read(made)) != own:
            same = other.template == own.template
            what = f"it was made with prompts in {other.words(called if same else '')}"
            warnings.warn(f"{name}: {what}, and this run uses {own.words(called)}", stacklevel=2)


def _differences(lora: LoraLike, own: PromptRecord, called: str, template: str | None) -> list[str]:
    """What to say of a LoRA whose folder has another chat template, or a report of a training with other prompts."""
    try:
        place = resolve_source(lora)
    except UserError:  # a merge does not need its LoRAs
        return []
    folder = place if place.is_dir() else place.parent
    made = _trained_with(folder)
    if made is not None:
        if made == own:
            return []
        other = made.words(called if made.template == own.template else "")
        return [f"{lora.name}: it was trained with prompts in {other}"]
    found = find_template(folder)
    if found is None or found.strip() == (template or "").strip():
        return []
    what = "its folder has a chat template that is not the one in use"
    return [f"{lora.name}: {what}. To use it, write --template-file {folder}"]


def _read(made: Mapping[str, Any]) -> PromptRecord:
    """The record in a file, without what a later version may have added."""
    return PromptRecord(**{key: made[key] for key in PromptRecord().document() if key in made})


def _trained_with(folder: Path) -> PromptRecord | None:
    """The format in the report that `mole train-lora` wrote beside a LoRA."""
    try:
        report = json.loads((folder / _REPORT).read_text(encoding="utf-8"))
        return _read(report[KEY])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
