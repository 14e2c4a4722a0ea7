"""Expands the short forms of a recipe: a base as one string, LoRAs as text, names with commas.

A value of a wrong type is returned unchanged; validation then explains what is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import PurePath
from typing import Any, NamedTuple

import yaml

from molecli.errors import UsageError
from molecli.files.lora_spec import parse_lora


def as_base(value: Any) -> Any:
    """`base: ID` as `base: {id: ID}`."""
    return {"id": value} if isinstance(value, str) else value


def as_loras(value: Any) -> Any:
    """`loras: a,b`, `[a, x=PATH@0.5]`, `{x: PATH}` and `{x: {source: PATH}}` as a list of {name, source, weight}."""
    if isinstance(value, str):
        return [_spelled(text) for text in _texts(value)]
    if isinstance(value, Mapping):
        return [_named(str(name), entry) for name, entry in value.items()]
    if isinstance(value, (list, tuple)):
        return [spelled for item in value for spelled in (_many(item) if isinstance(item, str) else [item])]
    return value


def as_names(value: Any) -> Any:
    """`a,b` as [a, b]."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def as_choices(value: Any) -> Any:
    """`a,b` and [a, b] as names. If an item is a list, each item is one choice of names: [[a], "b,c", []]."""
    names = as_names(value)
    if not isinstance(names, (list, tuple)) or not any(isinstance(item, (list, tuple)) for item in names):
        return names
    each = [as_names(item) for item in names]
    return each[0] if len(each) == 1 else each


def as_pairs(texts: Sequence[str], flag: str) -> dict[str, Any]:
    """`KEY=VALUE` texts as a mapping; values are read as YAML, and a date stays text. Raises: UsageError."""
    pairs: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"{flag} {text}", "not of the form KEY=VALUE", f"Write for example {flag} thinking=false.")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError:
            parsed = value
        pairs[key.strip()] = value if isinstance(parsed, date) or not value.strip() else parsed
    return as_template_args(pairs)


def as_template_args(value: Any) -> dict[str, Any]:
    """The variables of a chat template. Raises: UsageError for a value that is not text, a number, true or false."""
    if not isinstance(value, Mapping):
        what = f"{value!r} is not a mapping of names to values"
        raise UsageError("base.template_args", what, "Write `name: value` lines.")
    for name, one in value.items():
        if not isinstance(one, (str, bool, int, float)):
            what = f"{one!r} is not text, a number, true or false"
            raise UsageError(f"base.template_args.{name}", what, "Write one such value.")
    return dict(value)


def as_paths(value: Any) -> Any:
    """A file or a list of files as {stem: file}; a mapping stays. A list with equal stems stays too, and is refused."""
    files = [value] if isinstance(value, str) else value
    if not isinstance(files, (list, tuple)) or not all(isinstance(file, str) for file in files):
        return value
    named = {PurePath(file).stem: file for file in files}
    return named if len(named) == len(files) else value


def expanded(tree: Mapping[str, Any], *, changes: bool = False) -> dict[str, Any]:
    """A recipe's tree with its base and LoRAs spelled out, so that two trees merge key by key.

    With `changes` (`--set`) a mapping of LoRAs stays a mapping: it changes the LoRAs of the lower layer by name.
    """
    result = dict(tree)
    if "base" in result:
        result["base"] = as_base(result["base"])
    if "loras" in result and not (changes and isinstance(result["loras"], Mapping)):
        result["loras"] = as_loras(result["loras"])
    return result


def _texts(value: str) -> list[str]:
    return [part.strip() for part in value.split(",") if part.strip()]


def _many(value: str) -> list[dict[str, Any]]:
    return [_spelled(text) for text in _texts(value)]


def _named(name: str, entry: Any) -> Any:
    if isinstance(entry, str):
        return _spelled(f"{name}={entry}")
    return {"name": name, **entry} if isinstance(entry, Mapping) else entry


def _spelled(text: str) -> dict[str, Any]:
    spec = parse_lora(text)
    return {"name": spec.name, "source": spec.source, "weight": spec.weight}


class Switched(NamedTuple):
    """Which LoRAs are off: those in `mask`, and, if `only` names any, all that are not in it."""

    mask: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The suffix of a method's name, such as " only a without b"; "" if every LoRA is on."""
        kept = f" only {', '.join(self.only)}" if self.only else ""
        return kept + (f" without {', '.join(self.mask)}" if self.mask else "")


def choices(mask: Sequence[Any], only: Sequence[Any]) -> tuple[Switched, ...]:
    """Each `mask` with each `only`, without repeats; either is one list of names or a list of such lists."""
    pairs = (Switched(tuple(off), tuple(kept)) for off in _each(mask) for kept in _each(only))
    return tuple(dict.fromkeys(pairs))


def _each(names: Sequence[Any]) -> Sequence[Any]:
    return names if names and not isinstance(names[0], str) else (names,)
