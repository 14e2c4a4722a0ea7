"""The suite `pictures`: scenes of one's own from JSONL files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from molecli.errors import UsageError
from molecli.files.concepts import Concept
from molecli.protocols import Element
from molecli.suites import load_scene_suite, load_suite
from molecli.suites.pictures import PicturesSuite


def written(tmp_path: Path, *rows: Any) -> Path:
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_line_is_a_scene(tmp_path: Path) -> None:
    file = written(tmp_path, {"prompt": "sks dog on zwx can", "loras": ["dog", "can"]}, {"prompt": "a", "name": "x"})
    suite = PicturesSuite([str(file)])
    concepts = {"dog": Concept("dog", "a photo of sks dog", "sks dog", "character"), "can": None}
    assert suite.tasks(concepts) == ["mine"]
    first, second = suite.scenes("mine", concepts)
    assert (first.prompt, first.loras, first.name) == ("sks dog on zwx can", ("dog", "can"), "000")
    assert first.elements == (Element("character", "dog", ("sks dog",)), Element("object", "can"))
    assert (second.loras, second.name) == ((), "x")
    assert suite.metrics("mine") == ("text_alignment", "image_alignment")


def test_scenes_that_all_name_classes_are_recognised_first(tmp_path: Path) -> None:
    suite = PicturesSuite([str(written(tmp_path, {"prompt": "a dog", "loras": [], "classes": ["dog"]}))])
    assert suite.scenes("mine", {})[0].classes == ("dog",)
    assert suite.metrics("mine")[0] == "recognised"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"loras": []}, "line 1: the field 'prompt' is missing. Every line needs it."),
        ({"prompt": " ", "loras": []}, "line 1: the prompt is empty. Write what to draw."),
        ({"prompt": "a", "loras": ["x", "x"]}, "line 1: a LoRA is named twice. Name each one once."),
        ({"prompt": "a", "loras": "x"}, 'line 1: the field \'loras\' is not a list of texts. Write ["...", "..."].'),
        (
            {"prompt": "a", "lora": ["x"]},
            "line 1: unknown field 'lora'. There are: prompt, loras, name, classes.",
        ),
    ],
)
def test_a_line_that_is_no_scene_is_explained(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    file = written(tmp_path, row)
    with pytest.raises(UsageError) as caught:
        PicturesSuite([str(file)]).scenes("mine", {})
    assert str(caught.value) == f"{file}, {message}"


def test_files_must_be_named() -> None:
    with pytest.raises(UsageError, match=r"suite pictures: no file of scenes was given. Write --files FILE.jsonl"):
        PicturesSuite().tasks({})


def test_suites_of_texts_and_of_scenes_are_told_apart() -> None:
    with pytest.raises(UsageError) as caught:
        load_scene_suite("bbh")
    assert str(caught.value) == (
        "--suite: the suite 'bbh' has texts, and the base draws pictures. "
        "Write one of: emoji, dreambooth, composlora, pictures."
    )
    with pytest.raises(UsageError, match="the suite 'emoji' has scenes to draw, and the base is a language model"):
        load_suite("emoji")
    with pytest.raises(UsageError, match=r"no suite is called 'emojis'. Did you mean 'emoji'\?"):
        load_scene_suite("emojis")
    with pytest.raises(UsageError, match=r"data.files: the suite 'emoji' has its own files"):
        load_scene_suite("emoji", files=["a.jsonl"])
    with pytest.raises(UsageError, match=r"data.scenes: the suite 'pictures' has its own scenes"):
        load_scene_suite("pictures", scenes=["a"])
