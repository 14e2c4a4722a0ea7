"""concept.json: written beside a LoRA, read back, and what is wrong with one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from molecli.errors import MismatchError
from molecli.files.concepts import CONCEPT_FILE, Concept, read_concept, trigger_of, write_concept


def test_a_concept_survives_writing_and_reading(tmp_path: Path) -> None:
    pictures = tmp_path / "elsewhere"
    concept = Concept("dog", "a photo of sks dog", "sks dog", "character", str(pictures))
    file = write_concept(tmp_path / "lora", concept)
    assert read_concept(tmp_path / "lora") == concept
    assert read_concept(tmp_path / "lora" / "pytorch_lora_weights.safetensors") == concept
    assert list(json.loads(file.read_text())) == ["name", "kind", "prompt", "trigger", "pictures"]


def test_pictures_inside_the_folder_move_with_it(tmp_path: Path) -> None:
    write_concept(tmp_path / "a", Concept("é", "a é", "é", pictures=str(tmp_path / "a" / "pictures")))
    assert json.loads((tmp_path / "a" / CONCEPT_FILE).read_text(encoding="utf-8"))["pictures"] == "pictures"
    (tmp_path / "a").rename(tmp_path / "b")
    concept = read_concept(tmp_path / "b")
    assert concept is not None
    assert concept.pictures == str(tmp_path / "b" / "pictures")


def test_a_lora_without_a_concept_has_none(tmp_path: Path) -> None:
    assert read_concept(tmp_path) is None
    assert read_concept(tmp_path / "not there.safetensors") is None


def test_name_and_prompt_are_enough(tmp_path: Path) -> None:
    (tmp_path / CONCEPT_FILE).write_text('{"name": "dog", "prompt": "a photo of sks dog"}')
    assert read_concept(tmp_path) == Concept("dog", "a photo of sks dog", "sks dog", "object", None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "it cannot be read (not valid JSON). Correct or remove it."),
        ("[]", "it is not a JSON object. Correct or remove it."),
        ('{"name": "a"}', "the key 'prompt' is missing or empty. Write it."),
        ('{"name": "a", "prompt": "b", "trigers": "c"}', "unknown key 'trigers'. Did you mean 'trigger'?"),
        ('{"name": "a", "prompt": "b", "kind": "styl"}', "there is no kind 'styl'. Did you mean 'style'?"),
        ('{"name": "a", "prompt": 3}', "prompt is 3, not text. Write it in quotes."),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / CONCEPT_FILE
    file.write_text(content)
    with pytest.raises(MismatchError) as caught:
        read_concept(tmp_path)
    assert str(caught.value) == f"{file}: {message}"


@pytest.mark.parametrize(
    ("prompts", "trigger"),
    [
        (["a photo of sks dog"], "sks dog"),
        (["a picture of a red zwx vase."], "red zwx vase"),
        (["a drawing in the style of zwx"], "zwx"),
        (["sks dog"], "sks dog"),
        (["a photo of sks dog in the snow", "sks dog on a beach", "a photo of sks dog"], "sks dog"),
        (["one sks", "no such word"], "sks"),
        (["an octopus on a white background", "an octopus on grass under a blue sky"], "octopus"),
        (["an elephant in flat style on a red background", "a pizza in flat style on sand"], "in flat style"),
    ],
)
def test_the_trigger_is_what_all_prompts_are_about(prompts: list[str], trigger: str) -> None:
    assert trigger_of(prompts) == trigger


def test_every_kind_of_the_recipe_is_a_kind_of_the_file(tmp_path: Path) -> None:
    from molecli.config import PicturesConfig

    kinds: Any = PicturesConfig.model_fields["kind"].annotation
    for kind in kinds.__args__:
        write_concept(tmp_path, Concept("a", "b", "c", kind))
        assert read_concept(tmp_path) == Concept("a", "b", "c", kind)
