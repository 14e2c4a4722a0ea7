"""What an evaluation on a diffusion base would do: scenes, pictures and passes of the UNet, with no weights read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from molecli.compose.options import check_options, told
from molecli.engine.images.columns import BASE
from molecli.engine.images.evaluate import Setting, read_setting, switched_off
from molecli.engine.images.judge import check_judge
from molecli.engine.images.lineup import ALL_ON, SINGLE, Off, left_alone
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
        check_judge(recipe.judge, [name for name, _ in methods])
    scenes = setting.bench.all
    calls = sum(_branches(mode, len(scene.loras)) for _, mode in methods for scene in scenes)
    pictures = len(methods) * len(scenes) * recipe.eval.images
    return ScenePlan(setting.needed, pictures, calls * recipe.eval.images * recipe.image.steps)


def _methods(setting: Setting, off: Off) -> list[tuple[str, str]]:
    """(name, mode) of every method."""
    loras = setting.bench.loras
    methods: list[tuple[str, str]] = []
    for mode in dict.fromkeys(setting.modes):
        if mode == SINGLE:
            methods += [(name, SINGLE) for name in left_alone(loras, off)]
        else:
            methods += [(mode + label, mode) for label in (ALL_ON if mode == BASE else off)]
    # Compositions of some of the LoRAs are one column a mode.
    learned = {
        name if set(loras) <= set(composition.names) else composition.mode: composition.mode
        for name, composition in setting.compositions.items()
    }
    return methods + [(name + label, mode) for name, mode in learned.items() for label in off]


def _branches(mode: str, loras: int) -> int:
    slope, constant = _BRANCHES.get(mode, (0, 1))
    return max(1, slope * loras + constant)
