"""The suite `dreambooth`: subjects alone in DreamBooth's prompts, and the compositions that a recipe lists."""

from __future__ import annotations

from pathlib import Path

import pytest

from molecli.config import SceneConfig, load_recipe
from molecli.errors import MismatchError, UsageError
from molecli.files.concepts import Concept
from molecli.suites.dreambooth import DreamboothSuite, read_listing

REAL = Path(__file__).parents[3] / "shared" / "data" / "dreambooth"
PLACES = ("in the jungle", "in the snow", "on the beach", "on a street", "on pink fabric", "by a house")
CONCEPTS = {
    "dog6": Concept("dog6", "a photo of sks dog", "sks dog", "character"),
    "can": Concept("can", "a photo of zwx can", "zwx can"),
    "table": Concept("table", "a photo of hta table", "hta table"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of the data set's shape, with two subjects."""
    templates = [f"'a {{0}} {{1}} {place}'.format(unique_token, class_token)," for place in PLACES]
    red = "'a red {0} {1}'.format(unique_token, class_token)"
    hat = "'a {0} {1} wearing a hat'.format(unique_token, class_token),"
    lines = ["Classes", "", "subject_name,class", "can,can", "dog6,dog", "", "Prompts", "", "Object Prompts", ""]
    lines += ["prompt_list = [", *templates, red, "]", "", "Live Subject Prompts", "", "prompt_list = ["]
    (tmp_path / "prompts_and_classes.txt").write_text("\n".join([*lines, *templates, hat, red, "]"]))
    for name in ("can", "dog6"):
        (tmp_path / name).mkdir()
    return tmp_path


def test_every_subject_is_drawn_in_the_prompts_of_its_kind(folder: Path) -> None:
    suite = DreamboothSuite()
    assert suite.tasks(CONCEPTS, str(folder)) == ["subjects"]
    scenes = suite.scenes("subjects", CONCEPTS, str(folder))
    assert [scene.prompt for scene in scenes if scene.loras == ("can",)][-1] == "a red zwx can"
    assert [scene.prompt for scene in scenes if scene.loras == ("dog6",)][-2:] == [
        "a sks dog wearing a hat",
        "a red sks dog",
    ]
    assert {scene.loras for scene in scenes} == {("dog6",), ("can",)}  # a table is no subject


def test_a_composition_without_a_prompt_is_drawn_in_five_places(folder: Path) -> None:
    suite = DreamboothSuite([SceneConfig(loras=("dog6", "can", "table"))])
    assert suite.tasks(CONCEPTS, str(folder)) == ["dog6 + can + table"]
    scenes = suite.scenes("dog6 + can + table", CONCEPTS, str(folder))
    assert [scene.prompt for scene in scenes] == [f"a sks dog, a zwx can and a hta table {p}" for p in PLACES[:5]]
    assert [element.kind for element in scenes[0].elements] == ["character", "object", "object"]


def test_a_composition_may_bring_its_prompt_and_share_a_row(folder: Path) -> None:
    scenes = (
        SceneConfig(loras=("dog6", "can"), task="2", prompt="sks dog eats zwx can"),
        SceneConfig(loras=("dog6", "table"), task="2"),
    )
    suite = DreamboothSuite(scenes)
    assert suite.tasks(CONCEPTS, str(folder)) == ["2"]
    found = suite.scenes("2", CONCEPTS, str(folder))
    assert len({scene.name for scene in found}) == len(found) == 6
    assert found[0].prompt == "sks dog eats zwx can"


def test_a_subjects_pictures_are_in_its_folder(folder: Path) -> None:
    suite = DreamboothSuite()
    assert suite.pictures("can", str(folder)) == str(folder / "can")
    assert suite.pictures("table", str(folder)) is None
    (folder / "can").rmdir()
    with pytest.raises(UsageError, match=r"no such folder, and 'can' is a subject. Put its pictures there."):
        suite.pictures("can", str(folder))


def test_what_is_missing_is_explained(folder: Path, tmp_path: Path) -> None:
    suite = DreamboothSuite([SceneConfig(loras=("dog6", "cat"))])
    with pytest.raises(UsageError) as caught:
        suite.scenes("dog6 + cat", CONCEPTS, str(folder))
    assert str(caught.value).startswith("eval.data.scenes: the scene dog6 + cat needs the LoRA 'cat', which is not giv")
    with pytest.raises(UsageError) as caught:
        suite.scenes("dog6 + cat", {**CONCEPTS, "cat": None}, str(folder))
    assert str(caught.value) == (
        "concepts.cat: the trigger words of this LoRA are not known. "
        'Write concepts: {NAME: {prompt: "a photo of sks dog"}}.'
    )
    with pytest.raises(UsageError, match="no LoRA has the name of a subject; the given LoRAs are: mine"):
        DreamboothSuite().tasks({"mine": None}, str(folder))
    with pytest.raises(UsageError, match="it reads its pictures and prompts from a folder, and none is given"):
        DreamboothSuite().tasks(CONCEPTS, None)
    with pytest.raises(UsageError, match=r"it has no prompts_and_classes.txt. Give --data-dir a copy"):
        read_listing(str(folder / "dog6"))
    (folder / "prompts_and_classes.txt").write_text("Classes")
    with pytest.raises(MismatchError, match="it has no subjects or no prompts"):
        read_listing(str(folder))


@pytest.mark.skipif(not REAL.is_dir(), reason="the data set is not beside the checkout")
def test_the_data_set_itself() -> None:
    listing = read_listing(str(REAL))
    assert len(listing.classes) == 30
    assert (len(listing.things), len(listing.animals)) == (25, 25)
    assert listing.places[:2] == ("in the jungle", "in the snow")
    assert len([name for name in listing.classes if (REAL / name).is_dir()]) == 24


def test_the_shipped_recipe_lists_table_1_and_larger_compositions() -> None:
    recipe = load_recipe("image/dreambooth-table1", "evaluate")
    scenes = recipe.eval.data.scenes  # type: ignore[union-attr]
    sizes = [len(scene.loras) for scene in scenes]
    assert sizes.count(3) == 15
    assert {4, 5, 6} <= set(sizes)
    names = {lora.name for lora in recipe.loras}  # type: ignore[union-attr]
    assert {name for scene in scenes for name in scene.loras} == names == set(recipe.concepts)  # type: ignore[union-attr]
    triggers = [concept.trigger for concept in recipe.concepts.values()]  # type: ignore[union-attr]
    assert len(set(triggers)) == len(triggers)
