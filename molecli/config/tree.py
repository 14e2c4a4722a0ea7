"""Recipes as plain trees: merging, `--set a.b=value`, and YAML that names the line of a mistake."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from molecli.catalog.methods import DEFAULT
from molecli.errors import UsageError

Tree = dict[str, Any]


def merged(*layers: Mapping[str, Any]) -> Tree:
    """One tree of several, a later layer over an earlier one.

    Mappings merge key by key. A mapping over a list of named entries changes the entries with those names. Anything
    else is replaced.
    """
    result: Tree = {}
    for layer in layers:
        for key, value in layer.items():
            below = result.get(key)
            if isinstance(value, Mapping) and isinstance(below, Mapping):
                value = merged(below, value)
            elif isinstance(value, Mapping) and isinstance(below, list):
                value = _changed(below, value)
            result[key] = value
    return result


def _changed(entries: list[Any], changes: Mapping[str, Any]) -> list[Any]:
    """The entries with `changes` applied by name, new names at the end: `--set loras.a.weight=0.5`."""
    result = list(entries)
    names = [entry.get("name") if isinstance(entry, Mapping) else None for entry in entries]
    for name, change in changes.items():
        change = change if isinstance(change, Mapping) else {"source": change}
        if name in names:
            result[names.index(name)] = merged(entries[names.index(name)], change)
        else:
            result.append({"name": name, **change})
    return result


def from_overrides(overrides: Mapping[str, Any]) -> Tree:
    """The tree of the flags: dotted keys are nested, flags that were not given (None) are left out."""
    tree: Tree = {}
    for key, value in overrides.items():
        if isinstance(value, Mapping):
            value = from_overrides(value)
            if not value:
                continue
        if value is not None:
            tree = merged(tree, _nested(key.split("."), value))
    return tree


def from_sets(sets: Iterable[str]) -> Tree:
    """The tree of `a.b=value` texts; values are read as YAML. Raises: UsageError for a text without key or value."""
    tree: Tree = {}
    for text in sets:
        key, equals, value = text.partition("=")
        path = key.strip().split(".")
        if not equals or not all(path):
            raise UsageError(f"--set {text}", "not of the form key=value", "Write for example --set train.lr=1e-3.")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UsageError(
                f"--set {text}", "the value is not valid YAML", "Quote it: --set 'key=\"value\"'."
            ) from None
        tree = merged(tree, _nested(path, parsed))
    return tree


def read_yaml(path: Path) -> Tree:
    """The mapping in a YAML file, {} for an empty file. Raises: UsageError that names the line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "not UTF-8 text"
        raise UsageError(str(path), f"the recipe cannot be read ({reason})", "Check the path.") from None
    try:
        # A SafeLoader: only plain data is built.
        tree = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "not readable"
        raise UsageError(f"{path}{line}", f"invalid YAML ({problem})", "Correct that line.") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise UsageError(
            str(path), "a recipe is a mapping of keys to values", f"Write lines such as `mode: {DEFAULT}`."
        )
    return tree


def _nested(path: list[str], value: Any) -> Tree:
    for key in reversed(path):
        value = {key: value}
    return value


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that is written twice; PyYAML silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != "tag:yaml.org,2002:merge":
                if key_node.value in seen:
                    problem = f"the key {key_node.value!r} is written twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)
