"""Recipes: the YAML border. Imports no torch, so that `mole recipe validate` and `--help` answer at once."""

from __future__ import annotations

from molecli.files.near import near
from molecli.files.recipe.commands import (
    ComposeRecipe,
    EvaluateRecipe,
    ExportRecipe,
    Mode,
    SampleRecipe,
    TrainLoraRecipe,
)
from molecli.files.recipe.domains import is_pipeline
from molecli.files.recipe.images import ConceptConfig, ImageConfig, ObjectiveConfig, PicturesConfig
from molecli.files.recipe.judge import JudgeConfig
from molecli.files.recipe.loading import dump_recipe, find_recipe, load_recipe
from molecli.files.recipe.method import MethodConfig
from molecli.files.recipe.parts import (
    AdapterConfig,
    BaseConfig,
    CalibrationConfig,
    ClipConfig,
    DataConfig,
    EvalConfig,
    EvalDataConfig,
    GateConfig,
    LoraConfig,
    LoraTrainConfig,
    SceneConfig,
    TrainConfig,
)
from molecli.files.recipe.presets import PRESETS
from molecli.files.recipe.study import StudyMethod, StudyRecipe
from molecli.files.recipe.switched import Switched, choices
from molecli.files.recipe.table import RECIPES, Recipe

__all__ = [
    "PRESETS",
    "RECIPES",
    "AdapterConfig",
    "BaseConfig",
    "CalibrationConfig",
    "ClipConfig",
    "ComposeRecipe",
    "ConceptConfig",
    "DataConfig",
    "EvalConfig",
    "EvalDataConfig",
    "EvaluateRecipe",
    "ExportRecipe",
    "GateConfig",
    "ImageConfig",
    "JudgeConfig",
    "LoraConfig",
    "LoraTrainConfig",
    "MethodConfig",
    "Mode",
    "ObjectiveConfig",
    "PicturesConfig",
    "Recipe",
    "SampleRecipe",
    "SceneConfig",
    "StudyMethod",
    "StudyRecipe",
    "Switched",
    "TrainConfig",
    "TrainLoraRecipe",
    "choices",
    "dump_recipe",
    "find_recipe",
    "is_pipeline",
    "load_recipe",
    "near",
]
