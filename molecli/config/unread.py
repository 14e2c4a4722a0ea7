"""Refuses settings of a recipe that would be ignored.

check_fields     fields of the recipe that only the other kind of base reads
check_unused     fields that have no effect because of another setting
check_options    keys of `method.*` that no mode in use reads
check_keys       the same for a list of keys
composing        the modes that read `method`
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from molecli.catalog.methods import ALONE, BASE, Kind, get_method, readers
from molecli.config.loading import Recipe
from molecli.config.method import NAMED, MethodConfig
from molecli.errors import UsageError
from molecli.files.base_source import check_found

_ONLY = {
    "pictures": "it is only for diffusion pipelines, and the base is a language model",
    "texts": "it is only for language models, and the base is a diffusion pipeline",
}


def check_fields(recipe: Recipe, fields: Sequence[str], kind: Kind) -> None:
    """Checks that `fields`, which only bases of that kind read, have their defaults. Raises: UsageError."""
    written = _changed(recipe, fields)
    base = getattr(recipe, "base", None)
    if written and kind == "pictures" and base is not None:
        check_found(base)  # a base that cannot be found looks like a language model
    check_unused(recipe, fields, _ONLY[kind])


def check_unused(recipe: Recipe, fields: Sequence[str], why: str) -> None:
    """Checks that `fields` have their defaults. Raises: UsageError that says why another value would be ignored."""
    for name in _changed(recipe, fields):
        raise UsageError(name, why, "Leave it out.")


def check_options(method: MethodConfig, modes: Sequence[str]) -> None:
    """Checks that each setting written in `method` is read by at least one of `modes`. Raises: UsageError.

    A written default is allowed: the recorded recipe of a run holds all values.
    """
    changed = {key for key, field in MethodConfig.model_fields.items() if getattr(method, key) != field.default}
    check_keys((key for key in MethodConfig.model_fields if key in changed & method.model_fields_set), modes)


def check_keys(keys: Iterable[str], modes: Sequence[str], where: str = "method") -> None:
    """Checks that each of `keys` in the section `where` is read by at least one of `modes`. Raises: UsageError."""
    read = tuple(dict.fromkeys(key for mode in modes for key in get_method(mode).reads))
    for key in keys:
        if key not in read:
            raise UsageError(f"{where}.{key}", _unread(modes), _remedy(key, read, modes))


def composing(modes: Iterable[str]) -> list[str]:
    """The modes that read `method`: all but the base and each LoRA alone."""
    return [mode for mode in modes if mode not in (BASE, ALONE)]


def _changed(recipe: Recipe, fields: Sequence[str]) -> list[str]:
    defaults = {name: type(recipe).model_fields[name].get_default(call_default_factory=True) for name in fields}
    return [name for name, default in defaults.items() if getattr(recipe, name) != default]


def _unread(modes: Sequence[str]) -> str:
    if not modes:
        return "no chosen mode reads it"
    return f"mode {modes[0]} does not read it" if len(modes) == 1 else f"none of the modes {', '.join(modes)} reads it"


def _remedy(key: str, read: Sequence[str], modes: Sequence[str]) -> str:
    """The keys that the modes do read, and the modes that read `key`, if they are few."""
    instead = f"{'It reads' if len(modes) == 1 else 'They read'} {', '.join(read)}" if read else "Leave it out"
    own = readers(key)
    return f"{instead}; {key} is for {', '.join(own)}." if len(own) <= NAMED else f"{instead}."
