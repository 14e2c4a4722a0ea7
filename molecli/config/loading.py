"""Loads and writes recipes. Each overrides the one before: defaults, domain and adapter, preset, file, flags, --set.

Contents: load_recipe, dump_recipe, find_recipe.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from molecli.catalog import builtin
from molecli.config.defaults import IMAGE_PRESETS, PRESETS, Preset, adapter_defaults, image_base, image_defaults
from molecli.config.explain import explain
from molecli.config.recipes import (
    ComposeRecipe,
    EvaluateRecipe,
    ExportRecipe,
    InspectGatesRecipe,
    SampleRecipe,
    TrainLoraRecipe,
)
from molecli.config.shorthand import expanded
from molecli.config.study import StudyRecipe
from molecli.config.tree import from_overrides, from_sets, merged, read_yaml
from molecli.errors import UsageError, suggestion


def load_recipe(
    path: str | Path | None,
    command: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    sets: Sequence[str] = (),
) -> Recipe:
    """The checked, complete recipe of `command`: the file's values, then `overrides` (flags), then `sets` over them.

    `overrides` may nest or use dotted keys; None means that the flag was not given. `command` defaults to the file's.
    Raises: UsageError that names the file and the key, and for an unknown key the nearest known one.
    """
    file = find_recipe(path) if path is not None else None
    tree = read_yaml(file) if file is not None else {}
    command = _command(file, tree, command)
    layers = [("--set", from_sets(sets)), ("command line", from_overrides(overrides or {})), (str(file), tree)]
    if file is None:
        layers.pop()
    spelled = [(where, expanded(layer, changes=where == "--set")) for where, layer in layers]
    explicit = merged({"command": command}, *(layer for _, layer in reversed(spelled)))
    image = image_base(explicit)
    preset = _preset(command, explicit.get("preset"), IMAGE_PRESETS if image is not None else PRESETS)
    domain = {"base": {"id": image}, **image_defaults(command, image)} if image is not None else {}
    adapter = adapter_defaults(explicit, image)
    model = RECIPES[command]
    try:
        return model.model_validate(merged(domain, adapter, preset, explicit))
    except ValidationError as error:
        raise explain(error, model, spelled) from None


def _preset(command: str, name: Any, presets: Mapping[str, Mapping[str, dict[str, Any]]]) -> dict[str, Any]:
    """The values of the preset, {} without one. Raises: UsageError for a preset of the other kind of base."""
    there = presets.get(command, {})
    if there and name in get_args(Preset) and name not in there:
        remedy = f"Leave it out, or write {' or '.join(there)}."
        raise UsageError("preset", f"{name} is not for a diffusion base", remedy)
    return there.get(str(name), {})


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every value; `load_recipe` of it gives the same recipe.

    A study keeps only the values that were written: the recipes of its commands hold the rest.
    """
    written = recipe.model_dump(mode="json", exclude_unset=isinstance(recipe, StudyRecipe))
    return yaml.safe_dump({"command": recipe.command, **written}, sort_keys=False, allow_unicode=True, width=120)


def find_recipe(path: str | Path) -> Path:
    """The file that `path` names: a file, a run's folder (its recipe.yaml) or the name of a shipped recipe.

    Raises: UsageError if there is no such recipe.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "recipe.yaml"
    if file.is_file():
        return file
    shipped = builtin.recipes()
    name = str(path).removesuffix(".yaml")
    if name in shipped:
        return shipped[name]
    raise UsageError(str(path), "no such recipe", f"{_meant(name, shipped)} `mole recipe ls` lists them.")


def _meant(name: str, shipped: Collection[str]) -> str:
    """The remedy for a wrong name: the recipes that begin with it, if there are several, else the nearest one."""
    begin = [one for one in shipped if name and one.startswith(name)]
    return f"Write one of: {', '.join(begin)}." if len(begin) > 1 else suggestion(name, begin or shipped)


def _command(file: Path | None, tree: Mapping[str, Any], command: str | None) -> str:
    written = tree.get("command", command)
    if written not in RECIPES:
        remedy = suggestion(str(written), RECIPES) if "command" in tree else f"Write command: {' | '.join(RECIPES)}."
        what = f"unknown command {written!r}" if "command" in tree else "the key 'command' is missing"
        raise UsageError(str(file), what, remedy)
    if command is not None and written != command:
        raise UsageError(str(file), f"this recipe is for {written}, not for {command}", f"Run mole {written} {file}.")
    return str(written)


Recipe = (
    TrainLoraRecipe | ComposeRecipe | SampleRecipe | EvaluateRecipe | InspectGatesRecipe | ExportRecipe | StudyRecipe
)
RECIPES: dict[str, type[Recipe]] = {
    "train-lora": TrainLoraRecipe,
    "compose": ComposeRecipe,
    "sample": SampleRecipe,
    "evaluate": EvaluateRecipe,
    "inspect-gates": InspectGatesRecipe,
    "export": ExportRecipe,
    "study": StudyRecipe,
}
