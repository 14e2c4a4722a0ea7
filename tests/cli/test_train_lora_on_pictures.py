"""`mole train-lora` on pictures, through the program: the folder, the plan, and what a user may get wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

Mole = Callable[..., Any]


@pytest.fixture
def dog(tmp_path: Path) -> Path:
    folder = tmp_path / "dog"
    folder.mkdir()
    for i, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (24, 24), colour).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def job(dog: Path, pipeline_folder: Callable[..., Path], tmp_path: Path) -> tuple[str, ...]:
    """A small run."""
    base = str(pipeline_folder("sd"))
    flags = ("--base", base, "--instance-dir", str(dog), "--instance-prompt", "a photo of sks", "--device", "cpu")
    return ("train-lora", *flags, "--steps", "2", "--checkpoint-every", "1", "--output", str(tmp_path / "run"))


def test_a_run_writes_the_folder_that_diffusers_loads_and_its_recipe_repeats_it(
    mole: Mole, job: tuple[str, ...], tmp_path: Path
) -> None:
    run, again = tmp_path / "run", tmp_path / "again"
    assert mole(*job) == (0, f"{run}\n", f"Written: {run}\n")
    names = {path.name for path in run.iterdir()}
    lora = "pytorch_lora_weights.safetensors"
    assert names == {lora, "concept.json", "recipe.yaml", "report.json", "train_log.jsonl"}
    assert mole("train-lora", run / "recipe.yaml", "--output", again, "--json").code == 0
    assert (run / lora).read_bytes() == (again / lora).read_bytes()
    assert mole(*job).code == 2
    assert mole(*job, "--overwrite", "--seed", "1").code == 0
    assert (run / lora).read_bytes() != (again / lora).read_bytes()


def test_a_run_with_its_class_beside_it_can_be_overwritten(mole: Mole, job: tuple[str, ...], tmp_path: Path) -> None:
    kept = (*job, "--class-prompt", "a photo", "--class-pictures", "2")
    assert mole(*kept).code == 0
    assert len(list((tmp_path / "run" / "class_pictures").iterdir())) == 2
    report = json.loads(mole(*kept, "--overwrite", "--json").out)
    assert report["class_pictures"] == 2


def refused(mole: Mole, arguments: tuple[str, ...], code: int, message: str, folder: Path) -> None:
    assert mole(*arguments) == (code, "", f"mole: {message}\n")
    assert not folder.exists()


def test_a_folder_without_pictures(mole: Mole, job: tuple[str, ...], dog: Path, tmp_path: Path) -> None:
    for file in dog.iterdir():
        file.unlink()
    message = f"{dog}: it has no pictures. Put some there (png, jpg, jpeg, webp, bmp, gif, tif, tiff)."
    refused(mole, job, 2, message, tmp_path / "run")


def test_a_folder_that_is_not_there(mole: Mole, job: tuple[str, ...], tmp_path: Path) -> None:
    arguments = (*job, "--instance-dir", "./none")
    refused(mole, arguments, 2, "none: no such folder of pictures. Check the path.", tmp_path / "run")


def test_prompts_cannot_all_be_left_empty(mole: Mole, job: tuple[str, ...], tmp_path: Path) -> None:
    what = "command line: pictures.prompt_dropout is '1'; it must be less than 1."
    refused(
        mole,
        (*job, "--prompt-dropout", "1"),
        2,
        f"{what} Write for example pictures.prompt_dropout: 0.0.",
        tmp_path / "run",
    )


def test_a_cmyk_picture_and_a_tiny_one(mole: Mole, job: tuple[str, ...], dog: Path, tmp_path: Path) -> None:
    file = dog / "3.jpg"
    Image.new("CMYK", (24, 24)).save(file)
    message = f"{file}: its colours are stored in CMYK. "
    remedy = "Convert it to RGB with its colour profile, in any picture editor."
    refused(mole, job, 2, message + remedy, tmp_path / "run")
    Image.new("RGB", (24, 2)).save(file)
    message = f"{file}: 24x2 pixels are too few: each side must have 16. Give a larger picture."
    refused(mole, job, 2, message, tmp_path / "run")


def test_a_broken_picture_is_exit_3(mole: Mole, job: tuple[str, ...], dog: Path, tmp_path: Path) -> None:
    file = dog / "1.png"
    file.write_text("not a picture")
    message = f"{file}: it is damaged, or not a picture. Remove it from the folder."
    refused(mole, job, 3, message, tmp_path / "run")


def test_no_prompt(mole: Mole, job: tuple[str, ...], dog: Path, tmp_path: Path) -> None:
    place = job.index("--instance-prompt")
    arguments = (*job[:place], *job[place + 2 :])
    message = f"{dog}/0.png: there is no prompt for this picture. "
    remedy = 'Write --instance-prompt "a photo of sks ...", or a prompts.json beside the pictures.'
    refused(mole, arguments, 2, message + remedy, tmp_path / "run")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--resolution", "20"),
            "command line: pictures.resolution is '20', which is not a multiple of 8. Write 16 or 24.",
        ),
        (
            ("--suite", "builtin"),
            "--suite: a suite's tasks train a language model, and pictures a diffusion pipeline. "
            "Leave it out, or leave out --instance-dir.",
        ),
        (
            ("--class-dir", "x"),
            "pictures.class_dir: the class has no prompt, and it is not learned without one. "
            'Write --class-prompt "a photo of a dog".',
        ),
        (
            ("--class-prompt", "a photo of sks"),
            "pictures.class_prompt: it is the same as the instance prompt, so the class would hide the subject. "
            'Leave the rare token out: "a photo of a dog".',
        ),
        (
            ("--targets", "q_proj"),
            "adapter.targets: 'q_proj' is only in the text encoder, which is not adapted. Write --text-encoder to "
            "adapt it.",
        ),
        (
            ("--kind", "objct"),
            "command line: pictures.kind is 'objct', not one of object, character, clothing, style, background. "
            "Did you mean 'object'?",
        ),
    ],
)
def test_flags_that_are_wrong(mole: Mole, job: tuple[str, ...], tmp_path: Path, flags: Any, message: str) -> None:
    refused(mole, (*job, *flags), 2, message, tmp_path / "run")


def test_pictures_on_a_language_model(
    mole: Mole, job: tuple[str, ...], tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    text = tiny_folder("t5")
    message = (
        f"base {text}: it is a language model, and pictures train a diffusion pipeline. "
        "Name a pipeline with --base, or leave out --instance-dir."
    )
    refused(mole, (*job, "--base", str(text)), 2, message, tmp_path / "run")


def test_a_pipeline_without_pictures(mole: Mole, pipeline_folder: Callable[..., Path], tmp_path: Path) -> None:
    base = pipeline_folder("sd")
    message = (
        f"base {base}: a diffusion pipeline learns from pictures, and none are given. "
        'Write --instance-dir DIR --instance-prompt "a photo of sks".'
    )
    refused(mole, ("train-lora", "--base", str(base), "--output", str(tmp_path / "run")), 2, message, tmp_path / "run")


def test_what_is_cut_of_a_long_prompt_is_a_note(mole: Mole, job: tuple[str, ...], tmp_path: Path) -> None:
    ran = mole(*job, "--instance-prompt", "a photo of sks in the snow")
    assert (ran.code, ran.out) == (0, f"{tmp_path / 'run'}\n")
    assert "Left out: 'he snow'" in ran.err


def test_the_help_needs_no_torch(mole: Mole) -> None:
    ran = mole("train-lora", "--help")
    assert ran.code == 0
    assert "--instance-dir DIR" in ran.out
    assert "torch" in sys.modules  # of this process; `test_app` asks it of a fresh one
