"""What a user may get wrong, through the program: exit code, the exact message on stderr, nothing on stdout or disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

Refuse = Callable[..., None]


@pytest.fixture
def refused(mole: Callable[..., Any], gated_folder: Any, tmp_path: Path) -> Refuse:
    """`refused(code, message, **changes)` runs `mole compose` with changed flags and expects the refusal."""

    def run(code: int, message: str, **changes: Any) -> None:
        flags = {
            "base": gated_folder.base,
            "loras": ",".join(f"{name}={path}" for name, path in gated_folder.loras.items()),
            "files": gated_folder.data,
            "output": tmp_path / "run",
            "steps": 1,
            **{key.replace("_", "-"): value for key, value in changes.items()},
        }
        arguments = [part for name, value in flags.items() if value is not None for part in (f"--{name}", str(value))]
        assert mole("compose", *arguments) == (code, "", f"mole: {message}\n")
        assert not (tmp_path / "run").exists()

    return run


@pytest.fixture
def broken_lora(gated_folder: Any, tmp_path: Path) -> Callable[..., Path]:
    """`broken_lora(change)` -> a copy of LoRA a with its tensors changed."""

    def build(change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
        folder = shutil.copytree(gated_folder.loras["a"], tmp_path / "broken")
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
        return folder

    return build


def test_a_base_that_is_not_there(refused: Refuse) -> None:
    refused(2, "base ./none: no such folder. Write an existing folder, a hub id or builtin:NAME.", base="./none")


def test_a_lora_that_is_not_there(refused: Refuse) -> None:
    refused(2, "./none: no such built-in LoRA, folder or file. Check the path.", loras="a=./none")


def test_one_name_for_two_loras(refused: Refuse, gated_folder: Any) -> None:
    a, b = gated_folder.loras.values()
    what = "--loras: the name 'a' is used twice. Give each LoRA its own name: name=PATH."
    refused(2, what, loras=f"a={a},a={b}")


@pytest.mark.parametrize(
    ("mode", "flags", "message"),
    [
        (
            "iso",
            {"density": 0.3, "set": "method.evaluations=4"},
            "method.density: mode iso does not read it. "
            "It reads scale, rank, layers; density is for magnitude_prune, ties, dare, dare_ties, knots.",
        ),
        (
            "iso",
            {"set": "method.evaluations=4"},
            "method.evaluations: mode iso does not read it. It reads scale, rank, layers; evaluations is for lorahub.",
        ),
        ("linear", {"rank": 3}, "method.rank: mode linear does not read it. It reads scale, layers."),
        ("gated", {"scale": 0.5}, "method.scale: mode gated does not read it. It reads layers."),
    ],
)
def test_a_setting_that_the_mode_does_not_read(refused: Refuse, mode: str, flags: dict[str, Any], message: str) -> None:
    refused(2, message, mode=mode, **flags)


def test_a_lora_that_holds_nan(refused: Refuse, broken_lora: Callable[..., Path]) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[min(tensors)][0, 0] = float("nan")

    folder = broken_lora(change)
    first = min(load_file(folder / "adapter_model.safetensors"))
    what = f"a ({folder}/adapter_model.safetensors): {first!r} holds NaN or infinity. "
    refused(3, what + "Its training diverged: train it again.", loras=f"a={folder}")


def test_a_damaged_lora(refused: Refuse, broken_lora: Callable[..., Path]) -> None:
    folder = broken_lora(lambda tensors: None)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    message = f"{file}: it is a damaged safetensors file (invalid header length). Download or export it again."
    refused(3, message, loras=folder)


def test_an_empty_training_file(refused: Refuse, tmp_path: Path) -> None:
    file = tmp_path / "empty.jsonl"
    file.touch()
    refused(2, f'{file}: holds no examples. Write one {{"input": ..., "target": ...}} per line.', files=file)


def test_a_jsonl_line_without_its_field_is_named(refused: Refuse, tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"input": "a", "target": "b"}\n{"input": "c"}\n')
    refused(2, f"{file}, line 2: the field 'target' is missing. Every line needs it.", files=file)


def test_a_device_that_is_not_there(refused: Refuse) -> None:
    if torch.backends.mps.is_available():
        pytest.skip("this machine has that device")
    refused(2, "--device mps: torch finds no mps device on this machine. Write auto or cpu.", device="mps")


def test_a_folder_that_is_full(mole: Callable[..., Any], gated_folder: Any, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    ran = mole("sample", "--base", gated_folder.base, "--prompt", "x", "--output", tmp_path)
    assert ran == (
        2,
        "",
        f"mole: {tmp_path}: the output folder is not empty. "
        "Choose another --output, or write --overwrite to replace it.\n",
    )
    assert (tmp_path / "note.txt").read_text() == "mine"


def test_a_composition_on_other_loras(mole: Callable[..., Any], gated_folder: Any) -> None:
    a, b = gated_folder.loras.values()
    ran = mole("sample", gated_folder.folder, "--loras", f"a={b},b={a}", "--prompt", "x")
    assert (ran.code, ran.out) == (3, "")
    assert ran.err.startswith("mole: a: its weights differ from those in the composition (")
    assert ran.err.endswith(f"Give the LoRA from {a}, or compose again.\n")


def test_a_composition_on_another_base(
    mole: Callable[..., Any], gated_folder: Any, tiny_folder: Callable[..., Path]
) -> None:
    ran = mole("sample", gated_folder.folder, "--base", tiny_folder("t5", seed=1), "--prompt", "x")
    assert (ran.code, ran.out) == (3, "")
    assert ran.err.endswith(
        f": the composition was made on {gated_folder.base}, whose weights differ from this base's. "
        f"Give --base {gated_folder.base}, or compose again.\n"
    )


def test_a_damaged_composition(mole: Callable[..., Any], gated_folder: Any, tmp_path: Path) -> None:
    file = tmp_path / "cut.safetensors"
    file.write_bytes((gated_folder.folder / "composition.safetensors").read_bytes()[:100])
    for arguments in (("sample", file, "--prompt", "x"), ("inspect-gates", file), ("evaluate", file, "--dry-run")):
        ran = mole(*arguments)
        expected = f"mole: {file}: it is a damaged safetensors file (invalid header length). Compose again.\n"
        assert ran == (3, "", expected)
