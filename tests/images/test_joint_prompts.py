"""Prompts that name several concepts: each named once, in order, by its own words."""

from __future__ import annotations

import pytest

from molecli.files.concepts import Concept
from molecli.images.joint_prompts import composition, joint_prompt, prompts_of, worded

PEACOCK = Concept("peacock", "a peacock on a red background", "peacock")
CACTUS = Concept("cactus", "a cactus on sand by the sea", "cactus")
OWL = Concept("owl", "an owl on a red background", "owl")
DOG = Concept("dog", "a photo of sks dog", "sks dog", "character")
HAT = Concept("hat", "a photo of a zwx hat", "zwx hat", "clothing")
FLAT = Concept("flat", "an elephant in flat style on a red background", "in flat style", "style")
ROOM = Concept("room", "a library", "library", "background")


def test_a_prompt_in_parts() -> None:
    parts = worded("a photo of a zwx hat on grass.", HAT)
    assert (parts.opening, parts.phrase, parts.scene) == ("a photo of", "a zwx hat", "on grass")


def test_the_trigger_is_found_whatever_its_case_and_as_whole_words() -> None:
    assert worded("An Owl on a red background", OWL).phrase == "An Owl"
    assert worded("a bowl on a table", OWL).phrase == "an owl"  # of the concept's own prompt


@pytest.mark.parametrize(
    ("concepts", "expected"),
    [
        ((PEACOCK, CACTUS), "a peacock and a cactus"),
        ((PEACOCK, OWL), "a peacock and an owl on a red background"),
        ((PEACOCK, OWL, CACTUS), "a peacock, an owl and a cactus"),
        ((DOG, HAT), "a photo of sks dog and a zwx hat"),
        ((DOG, CACTUS), "sks dog and a cactus"),
        ((PEACOCK, OWL, FLAT), "a peacock and an owl in flat style on a red background"),
        ((PEACOCK, OWL, ROOM), "a peacock and an owl, library"),
        ((FLAT, ROOM), "in flat style and a library"),
        ((CACTUS,), "a cactus on sand by the sea"),
    ],
)
def test_a_composition_names_every_concept(concepts: tuple[Concept, ...], expected: str) -> None:
    assert composition(concepts) == expected


def test_what_is_shown_twice_is_named_once() -> None:
    assert joint_prompt([worded(PEACOCK.prompt, PEACOCK)] * 2) == PEACOCK.prompt


def test_each_alone_and_all_together_are_drawn() -> None:
    assert prompts_of([PEACOCK, OWL]) == (PEACOCK.prompt, OWL.prompt, "a peacock and an owl on a red background")
    assert prompts_of([PEACOCK]) == (PEACOCK.prompt,)
    assert prompts_of([]) == ()
