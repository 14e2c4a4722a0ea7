"""Recipes: reads, checks and writes YAML. Imports no torch, so that `mole recipe validate` and `--help` are fast."""

from __future__ import annotations

from molecli.config.defaults import PRESETS, is_pipeline
from molecli.config.images import ConceptConfig, ImageConfig, ObjectiveConfig, PicturesConfig
from molecli.config.judge import JudgeConfig
from molecli.config.loading import RECIPES, Recipe, dump_recipe, find_recipe, load_recipe
from molecli.config.method import MethodConfig
from molecli.config.recipes import (
    ComposeRecipe,
    EvaluateRecipe,
    ExportRecipe,
    InspectGatesRecipe,
    Mode,
    SampleRecipe,
    TrainLoraRecipe,
)
from molecli.config.sections import (
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
from molecli.config.shorthand import Switched, choices
from molecli.config.study import StudyMethod, StudyRecipe
from molecli.errors import near

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
    "InspectGatesRecipe",
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
