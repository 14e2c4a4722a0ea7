"""The suite `composlora`: sets and prompts as the testbed's code makes them."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from molecli.errors import MismatchError, UsageError
from molecli.suites.composlora import OPENINGS, ComposLoraSuite

SUITE = ComposLoraSuite()
REAL = Path(__file__).parents[3] / "shared" / "data" / "composlora"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Lists of the testbed's shape: three characters, two LoRAs of each other kind."""
    counts = {"character": 3, "clothing": 2, "style": 2, "background": 2, "object": 2}
    for style in OPENINGS:
        tree = {
            kind: [
                {"id": f"{kind}_{i}", "name": f"{style} {kind} {i}", "trigger": [f"{kind}{i}", f"like {kind}{i}"]}
                for i in range(1, count + 1)
            ]
            for kind, count in counts.items()
        }
        (tmp_path / f"{style}_lora_info.json").write_text(json.dumps(tree))
    return tmp_path


def test_there_are_480_sets(folder: Path) -> None:
    counts = [len(SUITE.scenes(task, {}, str(folder))) for task in SUITE.tasks({}, str(folder))]
    assert counts == [24, 72, 96, 48] * 2
    assert sum(counts) == 480


def test_every_set_has_one_character_and_no_kind_twice(folder: Path) -> None:
    for task in SUITE.tasks({}, str(folder)):
        scenes = SUITE.scenes(task, {}, str(folder))
        assert len({scene.loras for scene in scenes}) == len(scenes)
        for scene in scenes:
            kinds = [name.split("_")[0] for name in scene.loras]
            assert len(kinds) == int(task.split()[1])
            assert kinds.count("character") == 1 == len(kinds) - len(set(kinds)) + 1
            assert [element.kind for element in scene.elements] == kinds


def test_the_prompt_is_the_opening_and_all_triggers_the_characters_first(folder: Path) -> None:
    scene = SUITE.scenes("anime 2", {}, str(folder))[0]
    assert scene.prompt == "masterpiece, best quality, character1, like character1, clothing1, like clothing1"


@pytest.mark.skipif(not REAL.is_dir(), reason="the testbed's lists are not beside the checkout")
def test_the_published_lists_give_480_sets_of_their_own_triggers() -> None:
    tasks = SUITE.tasks({}, str(REAL))
    scenes = [scene for task in tasks for scene in SUITE.scenes(task, {}, str(REAL))]
    assert len(scenes) == 480
    for scene in scenes:
        opening = OPENINGS[scene.task.split()[0]]
        triggers = [trigger for element in scene.elements for trigger in element.features]
        assert scene.prompt == ", ".join([opening, *triggers])
    assert all(len(a.loras) <= len(b.loras) for a, b in pairwise(scenes[:240]))


def test_a_folder_must_be_named_and_hold_the_lists(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        SUITE.tasks({}, None)
    assert str(caught.value) == (
        "suite composlora: it reads its lists of LoRAs from a folder, and none is given. "
        "Write --data-dir DIR with the testbed's *_lora_info.json."
    )
    with pytest.raises(UsageError) as caught:
        SUITE.tasks({}, str(tmp_path))
    wanted = "it has no anime_lora_info.json or reality_lora_info.json"
    assert str(caught.value) == f"{tmp_path}: {wanted}. Give --data-dir the folder of the testbed."
    with pytest.raises(UsageError, match=r"no such folder. Check --data-dir."):
        SUITE.tasks({}, str(tmp_path / "gone"))


@pytest.mark.parametrize("text", ["[1]", "{", '{"character": [{"id": "a"}]}', '{"character": []}'])
def test_a_damaged_list_is_explained(tmp_path: Path, text: str) -> None:
    (tmp_path / "anime_lora_info.json").write_text(text)
    with pytest.raises(MismatchError, match=r"anime_lora_info.json: (it is not a list of LoRAs|it has no character)"):
        SUITE.scenes("anime 2", {}, str(tmp_path))
