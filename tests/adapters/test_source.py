"""A LoRA's files are found in every layout, in a folder or on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from molecli.adapters import LoraSpec, parse_lora, resolve_source
from molecli.adapters.source import is_there, weights_files

PEFT = "adapter_model.safetensors"
DIFFUSERS = "pytorch_lora_weights.safetensors"


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


@pytest.mark.parametrize(
    ("there", "found"),
    [
        ([PEFT, DIFFUSERS, "other.safetensors"], {"": PEFT}),
        ([DIFFUSERS, "other.safetensors"], {"": DIFFUSERS}),
        (["style.safetensors", "notes.txt"], {"": "style.safetensors"}),
        (["style.safetensors", "model.safetensors", "composition.safetensors"], {"": "style.safetensors"}),
        ([f"unet/{PEFT}"], {"unet": f"unet/{PEFT}"}),
        (
            [f"text_encoder/{PEFT}", f"unet/{PEFT}", "README.safetensors"],
            {"unet": f"unet/{PEFT}", "text_encoder": f"text_encoder/{PEFT}"},
        ),
    ],
)
def test_a_folders_files(there: list[str], found: dict[str, str], tmp_path: Path) -> None:
    files = weights_files(touch(tmp_path, *there))
    assert files == {component: tmp_path / name for component, name in found.items()}


def test_several_files_are_not_chosen_from(tmp_path: Path, explained: Any) -> None:
    touch(tmp_path, "b.safetensors", "a.safetensors")
    message = f"{tmp_path}: it has 2 .safetensors files: a.safetensors, b.safetensors. "
    explained(lambda: weights_files(tmp_path), 2, f"{message}Name one: {tmp_path / 'a.safetensors'}.")


@pytest.mark.parametrize("there", ["model.safetensors", "unet/diffusion_pytorch_model.safetensors", "notes.txt"])
def test_a_folder_without_a_lora(there: str, tmp_path: Path, explained: Any) -> None:
    message = f"{tmp_path}: it has no {PEFT}. Name a PEFT folder or a .safetensors file."
    explained(lambda: weights_files(touch(tmp_path, there)), 2, message)


@pytest.mark.parametrize("there", ["pytorch_lora_weights.bin", "unet/adapter_model.bin"])
def test_a_folder_of_pickles(there: str, tmp_path: Path, explained: Any) -> None:
    message = f"{tmp_path / there}: it is a pickle, which is refused because it can run code when it is loaded. "
    message += "Save it again with safe_serialization=True."
    explained(lambda: weights_files(touch(tmp_path, there)), 2, message)


@pytest.mark.parametrize("there", [PEFT, DIFFUSERS, f"unet/{PEFT}", "style.safetensors"])
def test_a_folder_of_ones_own_comes_before_a_builtin_lora(
    there: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from molecli.catalog.builtin import builtin_loras

    name = next(iter(builtin_loras()))
    monkeypatch.chdir(tmp_path)
    touch(tmp_path / name, there)
    assert resolve_source(parse_lora(name)) == Path(name)


# The hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`hub(*files)`: a repository org/lora with these files; returns the patterns asked for so far."""
    from fnmatch import fnmatch

    asked: list[list[str]] = []
    folder = tmp_path / "cache"

    def fill(*files: str) -> list[list[str]]:
        def snapshot(repository: str, *, allow_patterns: list[str]) -> str:
            asked.append(allow_patterns)
            folder.mkdir(exist_ok=True)
            touch(folder, *(file for file in files if any(fnmatch(file, p) for p in allow_patterns)))
            return str(folder)

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
        monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda self, repository: list(files))
        return asked

    return fill


def files_of_hub(tmp_path: Path) -> dict[str, str]:
    files = weights_files(resolve_source(LoraSpec("x", "org/lora")))
    return {component: file.relative_to(tmp_path / "cache").as_posix() for component, file in files.items()}


@pytest.mark.parametrize(
    "files",
    [
        {"": PEFT},
        {"": DIFFUSERS},
        {"unet": f"unet/{PEFT}", "text_encoder": f"text_encoder/{PEFT}", "text_encoder_2": f"text_encoder_2/{PEFT}"},
    ],
)
def test_known_files_are_downloaded_and_no_others(files: dict[str, str], hub: Any, tmp_path: Path) -> None:
    asked = hub(*files.values(), "other.safetensors", "vae/diffusion_pytorch_model.safetensors")
    assert files_of_hub(tmp_path) == files
    assert len(asked) == 1
    assert {file.name for file in (tmp_path / "cache").rglob("*.safetensors")} == {
        Path(file).name for file in files.values()
    }


def test_a_single_file_of_any_name_is_downloaded(hub: Any, tmp_path: Path) -> None:
    asked = hub("pixel-art.safetensors", "model.safetensors", "unet/diffusion_pytorch_model.safetensors")
    assert files_of_hub(tmp_path) == {"": "pixel-art.safetensors"}
    assert asked[1] == ["pixel-art.safetensors"]
    assert files_of_hub(tmp_path) == {"": "pixel-art.safetensors"}  # now from the cache: the list is not needed
    assert len(asked) == 3


def test_whether_a_lora_is_there_is_told_without_an_error(hub: Any, tmp_path: Path) -> None:
    hub("lora.safetensors")
    (tmp_path / "empty").mkdir()
    touch(tmp_path / "own", PEFT)
    there = ("org/lora", "own", f"own/{PEFT}")
    for source in (*there, "none", "empty", "own/none.safetensors"):
        assert is_there(LoraSpec("x", source)) == (source in there), source


def test_a_lora_on_a_hub_out_of_reach_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> str:
        raise ConnectionError

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    assert not is_there(LoraSpec("x", "org/lora"))


def test_several_files_on_the_hub(hub: Any, explained: Any) -> None:
    hub("b.safetensors", "a.safetensors")
    message = "org/lora: it has 2 .safetensors files: a.safetensors, b.safetensors. Download one and name the file."
    explained(lambda: resolve_source(LoraSpec("x", "org/lora")), 2, message)


def test_no_file_on_the_hub(hub: Any, explained: Any, tmp_path: Path) -> None:
    hub("README.md")
    message = f"{tmp_path / 'cache'}: it has no {PEFT}. Name a PEFT folder or a .safetensors file."
    explained(lambda: files_of_hub(tmp_path), 2, message)


def test_a_loras_chat_template_comes_with_it_from_the_hub(hub: Any, tmp_path: Path) -> None:
    hub(PEFT, "chat_template.jinja", "tokenizer_config.json", "tokenizer.json")
    folder = resolve_source(LoraSpec("x", "org/lora"))
    assert {file.name for file in folder.iterdir()} == {PEFT, "chat_template.jinja", "tokenizer_config.json"}
