"""`mole inspect-gates` on a composition of a tiny T5."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def inspected(mole: Callable[..., Any], gated_folder: Any, tmp_path: Path) -> tuple[dict[str, Any], Path]:
    """The JSON document and the folder of one run."""
    ran = mole("inspect-gates", gated_folder.folder, "--json", "--output", tmp_path / "out")
    assert ran.code == 0, ran.err
    return json.loads(ran.out), tmp_path / "out"


def test_the_report_holds_weights_that_add_up_to_one_at_every_site(inspected: tuple[dict[str, Any], Path]) -> None:
    report, _ = inspected
    assert report["experts"] == ["a", "b"]
    assert report["tasks"] == ["words"]
    assert report["examples"] == {"all": 3, "words": 3}
    assert len(report["sites"]) == len(report["weights"]["all"]) > 1
    for row in report["weights"]["words"]:
        assert sum(row) == pytest.approx(1, abs=1e-5)
    assert not all(row == pytest.approx([0.5, 0.5], abs=1e-3) for row in report["weights"]["words"])


def test_the_report_is_what_the_gates_of_the_live_mixture_are(
    inspected: tuple[dict[str, Any], Path], gated_folder: Any, tiny_folder: Callable[..., Path]
) -> None:
    from molecli.bases.loading import load_backbone
    from molecli.config import BaseConfig
    from molecli.mixture.attach import attach
    from molecli.protocols import Example

    report, _ = inspected
    backbone = load_backbone(BaseConfig(id=str(gated_folder.base)), "cpu")
    rows = [json.loads(line) for line in gated_folder.data.read_text().splitlines()]
    with attach(backbone.model, composition=gated_folder.folder) as mixture:
        single = []
        for row in rows:
            backbone.token_loss(backbone.collate([Example("words", row["input"], row["target"])]))
            single.append({site: gate[0].tolist() for site, gate in mixture.gates().items()})
    for site, weights in zip(report["sites"], report["weights"]["words"], strict=True):
        expected = [sum(gates[site][i] for gates in single) / len(single) for i in range(2)]
        assert weights == pytest.approx(expected, abs=1e-5)


def test_the_folder_holds_json_csv_pictures_and_the_recipe(inspected: tuple[dict[str, Any], Path]) -> None:
    report, folder = inspected
    assert json.loads((folder / "gates.json").read_text()) == report
    rows = list(csv.DictReader(io.StringIO((folder / "gates.csv").read_text())))
    assert len(rows) == 2 * 2 * len(report["sites"])
    assert float(rows[0]["weight"]) == pytest.approx(report["weights"]["all"][0][0], abs=1e-6)
    for name in ("gates.png", "entropy.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert (folder / "recipe.yaml").is_file()


def test_the_recorded_recipe_repeats_the_run(inspected: tuple[dict[str, Any], Path], mole: Callable[..., Any]) -> None:
    report, folder = inspected
    ran = mole("inspect-gates", folder / "recipe.yaml", "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out) == report


def test_the_course_of_the_entropy_is_the_training_logs(inspected: tuple[dict[str, Any], Path]) -> None:
    report, _ = inspected
    assert report["course"] == [[1, 0.69], [2, 0.4]]
    assert report["max_entropy"] == pytest.approx(math.log(2))


def test_a_mask_takes_the_named_expert_out_of_every_gate(mole: Callable[..., Any], gated_folder: Any) -> None:
    ran = mole("inspect-gates", gated_folder.folder, "--mask", "a", "--json")
    report = json.loads(ran.out)
    assert all(row == [0.0, pytest.approx(1)] for row in report["weights"]["all"])
    assert report["dead"] == ["a"]
    assert report["mean_entropy"] == pytest.approx(0)


def test_only_keeps_the_named_expert(mole: Callable[..., Any], gated_folder: Any) -> None:
    masked = mole("inspect-gates", gated_folder.folder, "--mask", "a", "--json")
    only = mole("inspect-gates", gated_folder.folder, "--only", "b", "--json")
    assert only.out == masked.out


def test_the_table_shows_sites_tasks_entropy_and_dead_experts(mole: Callable[..., Any], gated_folder: Any) -> None:
    lines = mole("inspect-gates", gated_folder.folder).out.splitlines()
    assert lines[0].split() == ["site", "a", "b", "entropy"]
    assert lines[1].split()[0] == "encoder.block.0"
    assert lines[-2] == "in training  0.69 at step 1, 0.40 at step 2"
    assert lines[-1] == "dead experts none"


def test_csv_goes_to_stdout_alone(mole: Callable[..., Any], gated_folder: Any) -> None:
    ran = mole("inspect-gates", gated_folder.folder, "--csv")
    assert ran.out.splitlines()[0] == "task,site,expert,weight,entropy"
    assert ran.err == "prompts: plain text\n"


def test_an_unknown_expert_is_named_with_the_known_ones(mole: Callable[..., Any], gated_folder: Any) -> None:
    ran = mole("inspect-gates", gated_folder.folder, "--mask", "c")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == "mole: c: no such LoRA in this composition. Known: a, b.\n"


def test_masking_every_expert_leaves_nothing_to_inspect(mole: Callable[..., Any], gated_folder: Any) -> None:
    for flags in (("--mask", "a,b"), ("--mask", "a", "--only", "a")):
        ran = mole("inspect-gates", gated_folder.folder, *flags)
        assert ran == (2, "", "mole: --mask: every LoRA is switched off, so no gate is used. Keep at least one.\n")


def test_a_fixed_mode_has_no_gates(mole: Callable[..., Any], gated_folder: Any, tmp_path: Path) -> None:
    loras = ",".join(f"{name}={path}" for name, path in gated_folder.loras.items())
    job = ("compose", "--base", gated_folder.base, "--loras", loras, "--mode", "linear", "--no-evaluate")
    assert mole(*job, "--output", tmp_path / "sum").code == 0
    ran = mole("inspect-gates", tmp_path / "sum")
    assert ran == (
        2,
        "",
        f"mole: {tmp_path}/sum: a composition of mode linear has no gates. Name one of mode gated.\n",
    )


def test_no_composition_is_code_2(mole: Callable[..., Any], tmp_path: Path) -> None:
    assert mole("inspect-gates").err == (
        "mole: mole inspect-gates: no composition is named. Name the output folder of mole compose.\n"
    )
    ran = mole("inspect-gates", tmp_path / "none")
    assert (ran.code, ran.err) == (
        2,
        f"mole: {tmp_path}/none: no such composition. Name the output folder of mole compose.\n",
    )


def test_gates_are_looked_at_with_one_choice_of_loras(
    mole: Callable[..., Any], gated_folder: Any, tmp_path: Path
) -> None:
    ran = mole("inspect-gates", gated_folder.folder, "--set", "mask=[[a],[]]", "--output", tmp_path / "out")
    assert ran == (2, "", "mole: --set: mask.0 is ['a'], not text. Write text, in quotes if it looks like a number.\n")
    assert not (tmp_path / "out").exists()
