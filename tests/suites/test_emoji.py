"""The suite `emoji`: scenes of the embedded LoRAs in the embedded base's own language."""

from __future__ import annotations

from collections import Counter

import pytest

from molecli.errors import UsageError
from molecli.suites import load_scene_suite
from molecli.suites._captions import caption, read_words
from molecli.suites.emoji import ALONE, SCENES, EmojiSuite

WORDS = read_words()
ALL = dict.fromkeys((*WORDS.concepts, WORDS.style))
SUITE = EmojiSuite()
SIZES = [task for task in SUITE.tasks(ALL) if task != "concepts"]


def test_there_is_a_task_for_every_size_that_the_loras_suffice_for() -> None:
    assert SUITE.tasks(ALL) == ["concepts", "2 LoRAs", "3 LoRAs", "4 LoRAs", "5 LoRAs"]
    assert SUITE.tasks(dict.fromkeys(("violin", "octopus", "mine"))) == ["concepts", "2 LoRAs"]


@pytest.mark.parametrize("task", SIZES)
def test_scenes_hold_as_many_different_loras_as_the_task_says(task: str) -> None:
    scenes = SUITE.scenes(task, ALL)
    assert len(scenes) == SCENES
    assert {len(set(scene.loras)) for scene in scenes} == {int(task[0])}
    assert len({scene.name for scene in scenes}) == SCENES


@pytest.mark.parametrize("task", SIZES)
def test_every_lora_is_in_as_many_scenes_as_any_other_up_to_one(task: str) -> None:
    counts = Counter(name for scene in SUITE.scenes(task, ALL) for name in scene.loras)
    assert set(counts) == set(ALL)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_scenes_follow_from_the_set_of_loras_and_not_from_their_order() -> None:
    turned = dict.fromkeys(reversed(ALL))
    assert SUITE.scenes("3 LoRAs", ALL) == EmojiSuite().scenes("3 LoRAs", turned)


def test_prompts_name_every_object_in_order_and_a_background_that_the_base_knows() -> None:
    for scene in SUITE.scenes("4 LoRAs", ALL):
        objects = [name for name in scene.loras if name != WORDS.style]
        styles = [WORDS.style] if WORDS.style in scene.loras else [""]
        assert scene.prompt in {caption(objects, phrase, style) for phrase in WORDS.phrases for style in styles}


def test_a_style_alone_is_worn_by_an_object_of_the_base() -> None:
    scenes = [scene for scene in SUITE.scenes("concepts", ALL) if scene.loras == (WORDS.style,)]
    assert len(scenes) == ALONE
    for scene in scenes:
        assert scene.prompt.split(" in ")[0].split(" ")[1] in WORDS.objects
        assert f"in {WORDS.style} style" in scene.prompt
        assert scene.classes == (f"{WORDS.style} style",)


def test_a_recogniser_is_told_of_every_concept() -> None:
    for scene in SUITE.scenes("5 LoRAs", ALL):
        wanted = [f"{name} style" if name == WORDS.style else name for name in scene.loras]
        assert list(scene.classes) == [element.name for element in scene.elements] == wanted


def test_every_concept_has_its_pictures_in_the_package() -> None:
    assert SUITE.pictures("violin") is not None
    assert SUITE.pictures("mine") is None


def test_other_loras_alone_are_refused() -> None:
    with pytest.raises(UsageError) as caught:
        SUITE.tasks({"mine": None})
    assert str(caught.value).startswith(
        "suite emoji: it is for the embedded LoRAs, and the given ones are: mine. Write --loras with some of: octopus, "
    )


def test_it_is_a_row_of_the_table() -> None:
    assert isinstance(load_scene_suite("emoji"), EmojiSuite)


def test_the_training_scenes_are_others_of_the_same_tasks() -> None:
    concepts = dict.fromkeys(WORDS.concepts)
    test, train = EmojiSuite(), EmojiSuite("train")
    assert test.tasks(concepts) == train.tasks(concepts)
    for task in test.tasks(concepts)[1:]:
        mine, other = ([scene.prompt for scene in suite.scenes(task, concepts)] for suite in (test, train))
        assert len(mine) == len(other)
        assert not set(mine) & set(other)
