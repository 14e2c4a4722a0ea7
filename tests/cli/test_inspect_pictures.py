"""`mole inspect-gates` on a composition of a tiny diffusion pipeline."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SHORT = ("--denoise-steps", "3", "--guidance", "3")


@pytest.fixture
def inspected(mole: Callable[..., Any], picture_world: Any, tmp_path: Path) -> tuple[dict[str, Any], Path]:
    """The JSON document and the folder of one run."""
    prompts = ("--prompt", "a cat", "--prompt", "a hat")
    ran = mole(
        "inspect-gates", picture_world.gated, *prompts, *SHORT, "--images", "2", "--json", "--output", tmp_path / "out"
    )
    assert ran.code == 0, ran.err
    return json.loads(ran.out), tmp_path / "out"


def test_the_report_holds_weights_by_prompt_site_and_step(inspected: tuple[dict[str, Any], Path]) -> None:
    report, _ = inspected
    assert report["experts"] == ["cat", "hat", "sea"]
    assert report["tasks"] == ["a cat", "a hat"]
    assert report["examples"] == {"all": 4, "a cat": 2, "a hat": 2}
    assert len(report["timesteps"]) == 3
    assert any(site.startswith("text_encoder.") for site in report["sites"])
    assert all(site.startswith("unet.") for site in report["step_sites"])
    for rows in ("conditional", "unconditional"):
        assert [len(step) for step in report["by_step"][rows]] == [len(report["step_sites"])] * 3
        for step in report["by_step"][rows]:
            for weights in step:
                assert sum(weights) == pytest.approx(1, abs=1e-5)
    assert report["by_step"]["conditional"] != report["by_step"]["unconditional"]


def test_the_gates_are_those_of_the_drawing_mixture(inspected: tuple[dict[str, Any], Path], picture_world: Any) -> None:
    from molecli.bases.loading import load_backbone
    from molecli.config import BaseConfig
    from molecli.mixture.attach import attach

    report, _ = inspected
    backbone: Any = load_backbone(BaseConfig(id=str(picture_world.base)), "cpu")
    seen: list[dict[str, Any]] = []
    with attach(backbone.model, composition=picture_world.gated) as mixture:
        hook = backbone.model.unet.register_forward_hook(lambda *_: seen.append(mixture.gates()))
        for prompt in ("a cat", "a hat"):
            for seed in range(2):
                backbone.generate([prompt], seeds=[seed], steps=3, guidance=3.0)
        hook.remove()
    for s in range(3):
        for i, site in enumerate(report["step_sites"]):
            rows = [gates[site][1] for gates in seen[s::3]]
            expected = (sum(rows) / len(rows)).tolist()  # type: ignore[union-attr, arg-type]
            assert report["by_step"]["conditional"][s][i] == pytest.approx(expected, abs=1e-4)


def test_the_folder_holds_json_csv_a_picture_and_a_recipe_that_repeats_the_run(
    inspected: tuple[dict[str, Any], Path], mole: Callable[..., Any]
) -> None:
    report, folder = inspected
    assert json.loads((folder / "gates.json").read_text()) == report
    rows = list(csv.DictReader(io.StringIO((folder / "gates.csv").read_text())))
    assert len(rows) == 2 * 3 * len(report["step_sites"]) * 3
    assert (folder / "gates.png").read_bytes().startswith(b"\x89PNG")
    again = mole("inspect-gates", folder / "recipe.yaml", "--json")
    assert again.code == 0, again.err
    assert json.loads(again.out) == report


def test_the_table_shows_prompts_and_steps(mole: Callable[..., Any], picture_world: Any) -> None:
    ran = mole("inspect-gates", picture_world.gated, "--prompt", "a cat", *SHORT)
    assert ran.code == 0, ran.err
    lines = ran.out.splitlines()
    assert lines[0].split() == ["site", "cat", "hat", "sea", "entropy"]
    heads = [line.split()[0] for line in lines if line.split() and line.split()[0] in ("site", "task", "step")]
    assert heads == ["site", "task", "step"]
    assert lines[-1] == "∅: for the unconditional half of classifier-free guidance"
    assert ran.err == ""


def test_without_prompts_the_concepts_are_drawn_one_by_one_and_together(
    mole: Callable[..., Any], picture_world: Any
) -> None:
    ran = mole("inspect-gates", picture_world.gated, *SHORT, "--json")
    assert json.loads(ran.out)["tasks"] == ["a cat", "a hat", "a sea", "a cat and a hat, sea"]
    # The last is longer than the tiny encoder takes: what it loses is said once, and not on stdout.
    assert ran.err == "the text encoder reads only 16 tokens, and the prompt is longer. Left out: 'a'\n"


def test_a_mask_takes_the_named_expert_out_of_every_step(mole: Callable[..., Any], picture_world: Any) -> None:
    ran = mole("inspect-gates", picture_world.gated, "--prompt", "a cat", "--mask", "hat", *SHORT, "--json")
    report = json.loads(ran.out)
    assert all(weights[1] == 0 for step in report["by_step"]["conditional"] for weights in step)
    assert report["dead"] == ["hat"]
    every = mole("inspect-gates", picture_world.gated, "--prompt", "a cat", "--mask", "hat,cat,sea", *SHORT)
    assert every == (2, "", "mole: --mask: every LoRA is switched off, so no gate is used. Keep at least one.\n")


def test_a_language_models_gates_are_not_asked_about_prompts(mole: Callable[..., Any], gated_folder: Any) -> None:
    ran = mole("inspect-gates", gated_folder.folder, "--prompt", "a cat")
    what = "--prompt: a language model's gates are inspected on examples, which have answers. Write --files FILE.jsonl."
    assert ran == (2, "", f"mole: {what}\n")
