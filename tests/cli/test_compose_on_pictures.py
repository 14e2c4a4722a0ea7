"""`mole compose` on a diffusion base, through the program: the folder, the plan, and what a user may get wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

Mole = Callable[..., Any]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe that says what cat and hat look like."""
    concepts = {}
    for name in ("cat", "hat"):
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.new("RGB", (24, 24), ("red", "green")[i]).save(tmp_path / name / f"{i}.png")
        concepts[name] = {"pictures": str(tmp_path / name), "prompt": f"a {name}"}
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump({"command": "compose", "concepts": concepts}))
    return file


@pytest.fixture
def job(picture_world: Any, recipe: Path, tmp_path: Path) -> tuple[str, ...]:
    """A small run."""
    named = ("--base", str(picture_world.base), "--loras", picture_world.named("cat", "hat"), "--device", "cpu")
    short = ("--steps", "2", "--batch-size", "2", "--denoise-steps", "2")
    return ("compose", str(recipe), *named, *short, "--output", str(tmp_path / "run"))


def test_a_run_writes_a_composition_that_sample_draws(mole: Mole, job: tuple[str, ...], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert mole(*job, "--collage", "0.5") == (0, f"{run}\n", f"Written: {run}\n")
    assert {path.name for path in run.iterdir()} == {
        "composition.safetensors", "recipe.yaml", "report.json", "train_log.jsonl", "preview",
        "gates.json", "gates.csv", "gates.png", "entropy.png",
    }  # fmt: skip
    drawn = mole("sample", run, "--prompt", "a cat", "--denoise-steps", "2", "--output", tmp_path / "drawn")
    assert drawn.code == 0, drawn.err
    assert mole(*job, "--overwrite", "--no-preview").code == 0
    assert not (run / "preview").exists()


def test_a_fixed_mode_needs_no_pictures(mole: Mole, picture_world: Any, tmp_path: Path) -> None:
    named = ("--base", picture_world.base, "--loras", picture_world.named(), "--output", tmp_path / "run")
    method = ("--mode", "switch", "--tau", "2", "--scale", "0.8", "--order", "hat,cat,sea", "--no-preview", "--json")
    report = mole("compose", *named, *method)
    assert report.code == 0, report.err
    assert json.loads(report.out)["mode"] == "switch"


def test_layers_that_the_text_encoder_skipped_are_remembered(mole: Mole, picture_world: Any, tmp_path: Path) -> None:
    named = ("--base", picture_world.base, "--loras", picture_world.named(), "--output", tmp_path / "run")
    assert mole("compose", *named, "--mode", "switch", "--clip-skip", "1", "--no-preview").code == 0
    ran = mole("sample", tmp_path / "run", "--prompt", "a cat", "--denoise-steps", "2", "--output", tmp_path / "drawn")
    assert ran.code == 0, ran.err
    with Image.open(tmp_path / "drawn" / "0-switch-0.png") as picture:
        assert picture.text["clip_skip"] == "1"  # type: ignore[attr-defined]


def test_the_plan_counts_pictures_and_passes(mole: Mole, job: tuple[str, ...], tmp_path: Path) -> None:
    plan = json.loads(mole(*job, "--dry-run", "--json").out)
    assert (plan["examples"], plan["passes"]) == ({"train": 4}, {"train": 2})
    ran = json.loads(mole(*job, "--json", "--no-preview").out)
    assert (plan["sites"], plan["trained_parameters"]) == (ran["sites"], ran["trained_parameters"])
    lines = mole(*job, "--dry-run", "--output", tmp_path / "other").out.splitlines()
    assert "train     4 pictures, 2 passes" in lines
    assert lines[-2].endswith("2 pictures at once)")


@pytest.mark.parametrize("mode", ["linear", "nla", "composite", "w_composite"])
def test_the_plan_of_a_fixed_mode(mole: Mole, job: tuple[str, ...], mode: str) -> None:
    plan = json.loads(mole(*job, "--dry-run", "--json", "--mode", mode).out)
    assert (plan["mode"], plan["steps"], plan["trained_parameters"]) == (mode, None, 0)


def test_the_plan_of_a_lora_is_the_lora_that_is_trained(
    mole: Mole, picture_world: Any, recipe: Path, tmp_path: Path
) -> None:
    cat = ("--instance-dir", recipe.parent / "cat", "--instance-prompt", "a cat", "--text-encoder")
    job = ("train-lora", "--base", picture_world.base, *cat, "--targets", "attention,conv", "--steps", "1", "--json")
    plan = json.loads(mole(*job, "--dry-run").out)
    report = json.loads(mole(*job, "--output", tmp_path / "lora").out)
    assert (plan["adapted_matrices"], plan["trained_parameters"]) == (report["matrices"], report["parameters"])
    assert plan["examples"] == {"train": report["pictures"]}


def refused(mole: Mole, arguments: tuple[Any, ...], code: int, message: str, folder: Path) -> None:
    assert mole(*arguments) == (code, "", f"mole: {message}\n")
    assert not folder.exists()


def test_gates_without_any_pictures(mole: Mole, picture_world: Any, tmp_path: Path) -> None:
    named = ("--base", picture_world.base, "--loras", picture_world.named())
    message = (
        "cat: gates learn from pictures of what each LoRA adds, and this LoRA has none. "
        'Write concepts.cat: {pictures: DIR, prompt: "a photo of ..."} in the recipe.'
    )
    refused(mole, ("compose", *named, "--output", tmp_path / "run"), 2, message, tmp_path / "run")


def test_a_folder_of_pictures_that_is_not_there(mole: Mole, job: tuple[str, ...], tmp_path: Path) -> None:
    message = "none: no such folder of pictures. Check the path."
    refused(mole, (*job, "--set", "concepts.hat.pictures=none"), 2, message, tmp_path / "run")


def test_collages_of_one_lora(mole: Mole, job: tuple[str, ...], picture_world: Any, tmp_path: Path) -> None:
    message = (
        "objective.collage: a collage shows two things or more, and the LoRAs add 1 (styles and backgrounds do not "
        "count). "
        "Give another LoRA, or write --collage 0."
    )
    alone = ("compose", "--base", picture_world.base, "--loras", picture_world.named("cat"))
    concept = ("--set", f"concepts.cat={{pictures: {tmp_path / 'cat'}, prompt: a cat}}")
    out = ("--output", tmp_path / "run")
    refused(mole, (*alone, *concept, "--collage", "0.5", *out), 2, message, tmp_path / "run")


def test_guidance_without_a_clip(mole: Mole, job: tuple[str, ...], tmp_path: Path) -> None:
    message = "CLIP nowhere/clip: open_clip has no such model, and there is no such folder. "
    ran = mole(*job, "--clip", "1", "--clip-model", "nowhere/clip")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith(f"mole: {message}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--suite", "bbh"), "data.suite: on a diffusion base, gates learn from the concepts' pictures, not from a "
         "suite's tasks. Leave it out."),
        (("--eval-limit", "3"), "evaluate: a composition on a diffusion base is scored only after it is finished. "
         "Leave it out, and run mole evaluate {run} afterwards."),
        (("--order", "cat,dog", "--mode", "switch"), "method.order: there is no LoRA 'dog'. Known: cat, hat."),
        (("--denoise", "0"), "objective: every term has weight 0, so the gates would learn nothing. "
         "Write --denoise 1, or --clip 1."),
        (("--set", "concepts.dog.prompt=x"), "concepts.dog: no LoRA has this name. Known: cat, hat."),
    ],
)  # fmt: skip
def test_flags_that_are_wrong(mole: Mole, job: tuple[str, ...], tmp_path: Path, flags: Any, message: str) -> None:
    refused(mole, (*job, *flags), 2, message.replace("{run}", str(tmp_path / "run")), tmp_path / "run")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--mode", "switch"), "--mode switch: it acts on denoising steps, and the base is a language model. "
         "Write gated, linear or another mode for a language model."),
        (("--collage", "0.5"), "objective: it is only for diffusion pipelines, and the base is a language model. "
         "Leave it out."),
        (("--tau", "3"), "method.tau: mode gated does not read it. It reads layers; "
         "tau is for switch, w_switch."),
    ],
)  # fmt: skip
def test_what_only_pictures_have_on_a_language_model(
    mole: Mole, gated_folder: Any, tmp_path: Path, flags: Any, message: str
) -> None:
    loras = ",".join(f"{name}={path}" for name, path in gated_folder.loras.items())
    job = ("compose", "--base", gated_folder.base, "--loras", loras, "--output", tmp_path / "run")
    refused(mole, (*job, *flags), 2, message, tmp_path / "run")
