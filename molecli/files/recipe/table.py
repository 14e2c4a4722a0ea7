"""Which recipe each command reads."""

from __future__ import annotations

from molecli.files.recipe.commands import ComposeRecipe, EvaluateRecipe, ExportRecipe, SampleRecipe, TrainLoraRecipe
from molecli.files.recipe.study import StudyRecipe

Recipe = TrainLoraRecipe | ComposeRecipe | SampleRecipe | EvaluateRecipe | ExportRecipe | StudyRecipe
RECIPES: dict[str, type[Recipe]] = {
    "train-lora": TrainLoraRecipe,
    "compose": ComposeRecipe,
    "sample": SampleRecipe,
    "evaluate": EvaluateRecipe,
    "export": ExportRecipe,
    "study": StudyRecipe,
}
