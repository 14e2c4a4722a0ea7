"""Recipes: the YAML border. Imports no torch, so that `mole recipe validate` and `--help` answer at once."""

from __future__ import annotations

from molecli.files.near import near
from molecli.files.recipe.commands import (
    RECIPES,
    ComposeRecipe,
    EvaluateRecipe,
    Mode,
    Recipe,
    SampleRecipe,
    TrainLoraRecipe,
)
from molecli.files.recipe.loading import dump_recipe, find_recipe, load_recipe
from molecli.files.recipe.parts import (
    AdapterConfig,
    BaseConfig,
    DataConfig,
    EvalConfig,
    EvalDataConfig,
    GateConfig,
    LoraConfig,
    LoraTrainConfig,
    TrainConfig,
)
from molecli.files.recipe.presets import PRESETS

__all__ = [
    "PRESETS",
    "RECIPES",
    "AdapterConfig",
    "BaseConfig",
    "ComposeRecipe",
    "DataConfig",
    "EvalConfig",
    "EvalDataConfig",
    "EvaluateRecipe",
    "GateConfig",
    "LoraConfig",
    "LoraTrainConfig",
    "Mode",
    "Recipe",
    "SampleRecipe",
    "TrainConfig",
    "TrainLoraRecipe",
    "dump_recipe",
    "find_recipe",
    "load_recipe",
    "near",
]
