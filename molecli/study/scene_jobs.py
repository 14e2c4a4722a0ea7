"""The commands of a study of pictures: scenes name LoRAs, and every method composes the LoRAs of a scene.

A fixed method draws all scenes in one evaluation. A learned method makes a composition for each set of LoRAs that the
recipe's scenes name, because the paper trains new gates for each set. If the suite has its own scenes, it makes one
composition of all LoRAs. Contents: scene_jobs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from molecli.catalog.methods import ALONE
from molecli.errors import UsageError, suggestion
from molecli.study.jobs import Job, Named, common, composed, gate_jobs, inside, lora_jobs, placed, plain

if TYPE_CHECKING:
    from molecli.config.study import StudyMethod, StudyRecipe

# A task of the recipe's scenes, or None for all scenes of the suite -> the sets of LoRAs that its scenes name.
Sets = Mapping[str | None, Sequence[tuple[str, ...]]]


def scene_jobs(recipe: StudyRecipe) -> list[Job]:
    """The study's commands in order. Raises: UsageError for a scene with a LoRA that the study does not have."""
    loras, cast, training = lora_jobs(recipe)
    sets = _sets(recipe, [lora.name for lora in loras])
    needed = {name for some in sets.values() for chosen in some for name in chosen}
    cast = {method: [lora for lora in some if lora.name in needed] for method, some in cast.items()}
    training = [job for job in training if job.name.rpartition("/")[2] in needed]
    made: list[Job] = []
    scores: list[Job] = []
    for name, method in recipe.methods.items():
        if method.mode == ALONE:
            raise UsageError(f"methods.{name}", f"{ALONE} is one LoRA alone", "Write a scene with one LoRA instead.")
        if method.fixed:
            scores.append(_drawn(recipe, name, method, cast[name]))
            continue
        for seed in method.seeds or recipe.seeds:
            own = _learned(recipe, name, method, cast[name], sets, seed)
            made += own.values()
            scores += _by_compositions(recipe, name, own, sets, seed)
    return [*training, *made, *scores, *gate_jobs(recipe, made)]


def _sets(recipe: StudyRecipe, names: Sequence[str]) -> Sets:
    found: dict[str | None, list[tuple[str, ...]]] = {}
    for scene in recipe.test.data.scenes:
        for lora in scene.loras:
            if lora not in names:
                what = f"the scene {' + '.join(scene.loras)} needs the LoRA {lora!r}, which the study does not have"
                raise UsageError("test.data.scenes", what, suggestion(lora, names))
        task = scene.task or " + ".join(scene.loras)
        if scene.loras not in found.setdefault(task, []):
            found[task].append(scene.loras)
    return found or {None: [tuple(names)]}


def _learned(
    recipe: StudyRecipe, name: str, method: StudyMethod, loras: Sequence[Named], sets: Sets, seed: int
) -> dict[tuple[str, ...], Job]:
    """The job of the method's composition for each set of LoRAs."""
    jobs = {}
    for chosen in dict.fromkeys(some for sets_of_task in sets.values() for some in sets_of_task):
        place = placed("compositions", None, seed, "+".join(chosen), name)
        members = [lora for wanted in chosen for lora in loras if lora.name == wanted]
        # No preview: the pictures are scored separately, and the sheet of the scores shows them.
        drawn = {**_pictured(recipe, chosen), "preview": []}
        jobs[chosen] = Job("compositions", place, composed(recipe, method, members, drawn, place, seed), (name,))
    return jobs


def _drawn(recipe: StudyRecipe, name: str, method: StudyMethod, loras: Sequence[Named]) -> Job:
    """The job in which a method that learns nothing draws all scenes."""
    tree = {
        "loras": [{"name": lora.name, "source": lora.source} for lora in loras],
        "modes": [method.mode],
        **({"method": method.method} if method.method else {}),
        **_pictured(recipe, [lora.name for lora in loras]),
    }
    return _scored(recipe, placed("scores", None, None, name), name, tree, None)


def _by_compositions(
    recipe: StudyRecipe, name: str, own: Mapping[tuple[str, ...], Job], sets: Sets, seed: int
) -> list[Job]:
    """A job for each task, in which every scene is drawn by the composition of its LoRAs."""
    jobs = []
    for number, (task, chosen) in enumerate(sets.items(), start=1):
        paths = [inside(recipe, own[some].name) for some in chosen]
        what = {"compositions": paths, **_pictured(recipe, [lora for some in chosen for lora in some])}
        jobs.append(_scored(recipe, placed("scores", None, seed, name, f"scenes-{number}"), name, what, task))
    return jobs


def _scored(recipe: StudyRecipe, place: str, column: str, what: Mapping[str, Any], task: str | None) -> Job:
    test = plain(recipe.test)
    test["baselines"], test["bootstrap"] = False, 0
    if task is not None:
        data = test["data"]
        scenes = [one for one in data["scenes"] if (one.get("task") or " + ".join(one["loras"])) == task]
        test["data"] = {**data, "scenes": scenes}
    tree = {"command": "evaluate", "base": plain(recipe.base), **what, "eval": test}
    return Job("scores", place, {**tree, **common(recipe, place, recipe.seed)}, (column,))


def _pictured(recipe: StudyRecipe, names: Sequence[str]) -> dict[str, Any]:
    """The sections `image` and `concepts` of a recipe; concepts are those of the LoRAs `names`."""
    concepts = {name: plain(concept) for name, concept in recipe.concepts.items() if name in names}
    image = plain(recipe.image)
    return {**({"image": image} if image else {}), **({"concepts": concepts} if concepts else {})}
