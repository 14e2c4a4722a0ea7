"""Explains what is wrong with a recipe: turns pydantic's first error into a UsageError."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from molecli.config.tree import merged
from molecli.errors import UsageError, near, suggestion

# pydantic's error type -> (what the value should be, the remedy where the field has no default to show)
_WANTED = {
    "int_parsing": ("a whole number", "Write a whole number."),
    "int_type": ("a whole number", "Write a whole number."),
    "int_from_float": ("a whole number", "Write a whole number."),
    "float_parsing": ("a number", "Write a number."),
    "float_type": ("a number", "Write a number."),
    "finite_number": ("a finite number", "Write a finite number."),
    "bool_parsing": ("true or false", "Write true or false."),
    "bool_type": ("true or false", "Write true or false."),
    "string_type": ("text", "Write text, in quotes if it looks like a number."),
    "tuple_type": ("a list", "Write it in brackets: [...]."),
    "dict_type": ("a mapping of names to files", "Write `name: FILE` lines, each name once."),
    "model_type": ("a section of keys", "Write its keys indented below it."),
}
_BOUNDS = {
    "greater_than": ("greater than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}

# (where a layer comes from, its tree); a layer overrides those after it
Layers = Sequence[tuple[str, Mapping[str, Any]]]


def explain(error: ValidationError, model: type[BaseModel], layers: Layers) -> UsageError:
    """The UsageError for the first mistake, with the place where it was written."""
    # An unknown key goes first: a mistyped key often causes a second error, that the correct key is missing.
    first = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")[0]
    loc = tuple(part for part in first["loc"] if _is_written(part))
    kind, value, path = first["type"], first.get("input"), ".".join(str(part) for part in loc)
    where = _origin(loc[:-1] if kind == "missing" else loc, layers)
    if kind == "extra_forbidden":
        return UsageError(where, f"unknown key {path!r}", _nearest_key(model, loc))
    if kind == "unknown_name":
        return UsageError(where, f"{path} is {value!r}, which {first['msg']}", first["ctx"]["remedy"])
    if kind == "missing":
        return UsageError(where, f"the key {path!r} is missing", "Write it.")
    if kind == "literal_error":
        choices = _choices(model, loc)
        return UsageError(
            where, f"{path} is {value!r}, not one of {', '.join(choices)}", _nearest_choice(value, choices)
        )
    if kind in _BOUNDS:
        words, bound = _BOUNDS[kind]
        limit = first["ctx"][bound]
        return UsageError(where, f"{path} is {value!r}; it must be {words} {_plain(limit)}", _example(model, loc))
    if kind == "string_too_short":
        return UsageError(where, f"{path} is empty", _example(model, loc))
    wanted, remedy = _WANTED.get(kind, (f"valid ({first['msg']})", "Correct it."))
    return UsageError(where, f"{path} is {value!r}, not {wanted}", _example(model, loc, remedy))


def _plain(number: Any) -> str:
    return f"{number:g}"


def _is_written(part: int | str) -> bool:
    # For a union pydantic adds the type of the branch to the path: "str", "tuple[str, ...]". The user did not write it.
    return isinstance(part, int) or ("[" not in part and part != "str")


def _origin(loc: Sequence[int | str], layers: Layers) -> str:
    """The origin of the layer that set the final value at `loc`."""
    weakest_first = [*reversed(layers)]
    trees = [merged(*(tree for _, tree in weakest_first[: i + 1])) for i in range(len(weakest_first))]
    values = [_value(tree, loc) for tree in trees]
    return weakest_first[values.index(values[-1])][0]


def _value(tree: Any, loc: Sequence[int | str]) -> list[Any]:
    """The value at `loc` as a list of one element; [] where the key is absent, which differs from a value of None."""
    for part in loc:
        try:
            tree = tree[part]
        except (KeyError, IndexError, TypeError):
            return []
    return [repr(tree)]  # as text, so that two NaNs compare equal


def _section(annotation: Any) -> type[BaseModel] | None:
    """The model inside an annotation such as `EvalConfig | None` or `tuple[LoraConfig, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _section(inner))), None)


def _parent(model: type[BaseModel], loc: Sequence[int | str]) -> type[BaseModel]:
    """The section that holds the last key of `loc`."""
    for part in loc[:-1]:
        field = model.model_fields.get(str(part))
        model = (_section(field.annotation) if field else None) or model
    return model


def _nearest_key(model: type[BaseModel], loc: Sequence[int | str]) -> str:
    key, prefix = str(loc[-1]), "".join(f"{part}." for part in loc[:-1])
    siblings = list(_parent(model, loc).model_fields)
    if near(key, siblings) is None:
        elsewhere = next((path for path in _paths(model) if path.rpartition(".")[2] == key), None)
        if elsewhere is not None:
            return f"Did you mean {elsewhere!r}?"
        return suggestion(key, siblings)
    return suggestion(prefix + key, [prefix + name for name in siblings])


def _paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        section = _section(field.annotation)
        if section is not None:
            yield from _paths(section, f"{prefix}{name}.")


def _choices(model: type[BaseModel], loc: Sequence[int | str]) -> list[str]:
    keys = [part for part in loc if isinstance(part, str)]
    field = _parent(model, [*keys[:-1], ""]).model_fields[keys[-1]]
    return [str(choice) for choice in _literals(field.annotation)]


def _literals(annotation: Any) -> Iterator[Any]:
    for inner in get_args(annotation):
        if get_args(inner):
            yield from _literals(inner)
        elif isinstance(inner, str):
            yield inner


def _nearest_choice(value: Any, choices: Sequence[str]) -> str:
    nearest = near(str(value), choices)
    return f"Did you mean {nearest!r}?" if nearest else "Write one of them."


def _example(model: type[BaseModel], loc: Sequence[int | str], otherwise: str = "Correct it.") -> str:
    field = _parent(model, loc).model_fields.get(str(loc[-1])) if loc else None
    default = field.default if field is not None else None
    if not isinstance(default, (bool, int, float, str)):
        return otherwise
    written = str(default).lower() if isinstance(default, bool) else default
    return f"Write for example {'.'.join(map(str, loc))}: {written}."
