"""What an evaluation on a diffusion base would do: scenes, pictures and passes of the UNet, with no weights read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from molecli.compose.options import check_options, told
from molecli.engine.images.evaluate import Setting, read_setting, switched_off
from molecli.engine.images.judge import check_judge
from molecli.engine.images.lineup import SINGLE
from molecli.files.lora_spec import LoraLike
from molecli.files.recipe import EvaluateRecipe

# How often the UNet sees a picture at each denoising step, with N LoRAs; once by every other method.
_BRANCHES = {"composite": (1, 0), "w_composite": (1, 0), "loratorio": (1, 1)}


@dataclass(frozen=True)
class ScenePlan:
    """The LoRAs that are drawn with, how many pictures, and how many passes of the UNet."""

    loras: Sequence[LoraLike]
    pictures: int
    passes: int


def plan_scenes(recipe: EvaluateRecipe) -> ScenePlan:
    """The plan, checked as the run checks it. Raises: UsageError and MismatchError."""
    setting = read_setting(recipe)
    check_options(recipe.method, told(setting.modes))
    methods = _methods(setting, switched_off(recipe, setting.loras))
    if recipe.judge is not None:
        check_judge(recipe.judge, methods)
    scenes = setting.bench.all
    calls = sum(_branches(method, len(scene.loras)) for method in methods for scene in scenes)
    pictures = len(methods) * len(scenes) * recipe.eval.images
    return ScenePlan(setting.needed, pictures, calls * recipe.eval.images * recipe.image.steps)


def _methods(setting: Setting, off: Sequence[str]) -> list[str]:
    alone = [name for name in setting.bench.loras if name not in off]
    fixed = [name for mode in dict.fromkeys(setting.modes) for name in (alone if mode == SINGLE else [mode])]
    needed = set(setting.bench.loras)
    learned = [
        name if needed <= set(composition.names) else composition.mode
        for name, composition in setting.compositions.items()
    ]
    return [*fixed, *dict.fromkeys(learned)]


def _branches(method: str, loras: int) -> int:
    slope, constant = _BRANCHES.get(method, (0, 1))
    return max(1, slope * loras + constant)
