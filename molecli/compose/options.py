"""Keys of `method.*` that were written and that no mode in use reads: refused, where they would be ignored.

Contents: check_options, check_keys, told.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from molecli.compose import METHODS, get_method
from molecli.errors import UsageError
from molecli.files.recipe import MethodConfig

NAMED = 6  # so many modes are named in a message, at most


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


def told(modes: Iterable[str]) -> list[str]:
    """The modes among an evaluation's or a sheet's columns to which `method` says something.

    The base and each LoRA alone are shown as they are.
    """
    return [mode for mode in modes if mode not in ("base", "single")]


def _unread(modes: Sequence[str]) -> str:
    if not modes:
        return "no mode that reads it is asked for"
    return f"mode {modes[0]} does not read it" if len(modes) == 1 else f"none of the modes {', '.join(modes)} reads it"


def _remedy(key: str, read: Sequence[str], modes: Sequence[str]) -> str:
    """What is read instead; and which modes the key is for, where these are few."""
    instead = f"{'It reads' if len(modes) == 1 else 'They read'} {', '.join(read)}" if read else "Leave it out"
    readers = [name for name, row in METHODS.items() if key in row.reads]
    return f"{instead}; {key} is for {', '.join(readers)}." if len(readers) <= NAMED else f"{instead}."
