"""A chat template is found wherever transformers keeps it, and what has none says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from molecli.errors import UsageError
from molecli.files.chat_template import find_template, read_template

TEXT = "{{ messages }}"
KEPT: dict[str, Any] = {
    "chat_template.jinja": TEXT,
    "chat_template.json": json.dumps({"chat_template": TEXT}),
    "tokenizer_config.json": json.dumps({"chat_template": TEXT, "eos_token": "x"}),
}


@pytest.mark.parametrize("name", KEPT)
def test_a_template_is_read_from_a_file_and_from_its_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(KEPT[name])
    assert read_template(tmp_path) == read_template(tmp_path / name) == TEXT


def test_of_several_templates_the_default_one_counts(tmp_path: Path) -> None:
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": TEXT}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert read_template(tmp_path) == TEXT


def test_a_file_of_its_own_goes_before_the_tokenizers(tmp_path: Path) -> None:
    for name, content in KEPT.items():
        (tmp_path / name).write_text(content.replace("messages", name.partition(".")[0]))
    assert find_template(tmp_path) == "{{ chat_template }}"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"chat_template": null}', '{"chat_template": [{"name": "rag"}]}'])
def test_a_folder_without_a_template_has_none(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(content)
    assert find_template(tmp_path) is None
    with pytest.raises(UsageError, match="it has no chat template"):
        read_template(tmp_path)


def test_weights_are_no_template(tmp_path: Path) -> None:
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(b"\x02\xff{}")
    assert find_template(file) is None


def test_a_path_that_is_not_there_is_named() -> None:
    with pytest.raises(UsageError) as error:
        read_template("none.jinja")
    assert str(error.value) == "--template-file none.jinja: no such file or folder. Check the path."
