"""What was written in a recipe and would be ignored: refused, by name.

check_fields     fields of the recipe that only the other kind of base reads
check_unused     fields that something else of the recipe makes useless
check_options    keys of `method.*` that no mode in use reads
check_keys       the same, of keys alone
composing        the modes among some columns that read `method`
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from molecli.catalog.methods import ALONE, BASE, Kind, get_method, readers
from molecli.config.loading import Recipe
from molecli.config.method import NAMED, MethodConfig
from molecli.errors import UsageError
from molecli.files.base_source import check_found

_ONLY = {
    "pictures": "only a diffusion pipeline reads it, and the base is a language model",
    "texts": "only a language model reads it, and the base is a diffusion pipeline",
}


def check_fields(recipe: Recipe, fields: Sequence[str], kind: Kind) -> None:
    """Nothing, where `fields`, which only bases of that kind read, are at their defaults. Raises: UsageError."""
    written = _changed(recipe, fields)
    base = getattr(recipe, "base", None)
    if written and kind == "pictures" and base is not None:
        check_found(base)  # a base that cannot be had looks like no pipeline
    check_unused(recipe, fields, _ONLY[kind])


def check_unused(recipe: Recipe, fields: Sequence[str], why: str) -> None:
    """Nothing, where `fields` are at their defaults. Raises: UsageError that says why one would be ignored."""
    for name in _changed(recipe, fields):
        raise UsageError(name, why, "Leave it out.")


def check_options(method: MethodConfig, modes: Sequence[str]) -> None:
    """Nothing, where each setting of `method` that was written is read by one of `modes` at least. Raises: UsageError.

    A default never counts, not even a written one: a run's record writes all values out, and none of these is lost.
    """
    changed = {key for key, field in MethodConfig.model_fields.items() if getattr(method, key) != field.default}
    check_keys((key for key in MethodConfig.model_fields if key in changed & method.model_fields_set), modes)


def check_keys(keys: Iterable[str], modes: Sequence[str], where: str = "method") -> None:
    """Nothing, where each of `keys` of the section `where` is read by one of `modes` at least. Raises: UsageError."""
    read = tuple(dict.fromkeys(key for mode in modes for key in get_method(mode).reads))
    for key in keys:
        if key not in read:
            raise UsageError(f"{where}.{key}", _unread(modes), _remedy(key, read, modes))


def composing(modes: Iterable[str]) -> list[str]:
    """The modes among an evaluation's or a sheet's columns that read `method`.

    The base and each LoRA alone are shown as they are.
    """
    return [mode for mode in modes if mode not in (BASE, ALONE)]


def _changed(recipe: Recipe, fields: Sequence[str]) -> list[str]:
    defaults = {name: type(recipe).model_fields[name].get_default(call_default_factory=True) for name in fields}
    return [name for name, default in defaults.items() if getattr(recipe, name) != default]


def _unread(modes: Sequence[str]) -> str:
    if not modes:
        return "no mode that reads it is asked for"
    return f"mode {modes[0]} does not read it" if len(modes) == 1 else f"none of the modes {', '.join(modes)} reads it"


def _remedy(key: str, read: Sequence[str], modes: Sequence[str]) -> str:
    """What is read instead; and which modes the key is for, where these are few."""
    instead = f"{'It reads' if len(modes) == 1 else 'They read'} {', '.join(read)}" if read else "Leave it out"
    own = readers(key)
    return f"{instead}; {key} is for {', '.join(own)}." if len(own) <= NAMED else f"{instead}."
