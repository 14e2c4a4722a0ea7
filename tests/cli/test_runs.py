"""`mole compose`, `evaluate` and `train-lora` whole, on a tiny T5: folders, records, repeats, failures."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

Mole = Callable[..., Any]


@pytest.fixture
def job(gated_folder: Any) -> tuple[str, ...]:
    """A small gated run, without its output."""
    loras = ",".join(f"{name}={path}" for name, path in gated_folder.loras.items())
    return (
        *("compose", "--base", str(gated_folder.base), "--loras", loras, "--files", str(gated_folder.data)),
        *("--granularity", "block", "--steps", "3", "--batch-size", "2", "--checkpoint-every", "1", "--no-evaluate"),
    )


def _gates(folder: Path) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in load_file(folder / "composition.safetensors").items()}


def test_a_run_writes_its_folder_says_where_and_its_recipe_repeats_it(
    mole: Mole, job: tuple[str, ...], tmp_path: Path
) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    ran = mole(*job, "--output", first)
    assert (ran.code, ran.out, ran.err) == (0, f"{first}\n", f"prompts: plain text\nWritten: {first}\n")
    names = {path.name for path in first.iterdir()}
    assert names == {"recipe.yaml", "composition.safetensors", "train_log.jsonl", "report.json"}
    assert mole("compose", first / "recipe.yaml", "--output", again, "--quiet").err == ""
    assert _gates(first) == _gates(again)


def test_json_is_the_one_thing_on_stdout(mole: Mole, job: tuple[str, ...], tmp_path: Path) -> None:
    ran = mole(*job, "--output", tmp_path / "run", "--json")
    assert json.loads(ran.out)["experts"] == ["a", "b"]


def test_a_full_folder_is_refused_and_overwrite_replaces_it(mole: Mole, job: tuple[str, ...], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert mole(*job, "--output", folder).code == 0
    before = _gates(folder)
    ran = mole(*job, "--output", folder)
    assert ran == (
        2,
        "",
        f"mole: {folder}: the output folder is not empty. Choose another --output, or write --overwrite to replace it, "
        "--resume to continue the run there.\n",
    )
    assert mole(*job, "--output", folder, "--overwrite", "--seed", "1").code == 0
    assert _gates(folder) != before


def test_overwrite_with_a_recipe_that_cannot_run_keeps_the_old_results(
    mole: Mole, job: tuple[str, ...], tmp_path: Path, tiny_folder: Callable[..., Path]
) -> None:
    folder = tmp_path / "run"
    assert mole(*job, "--output", folder).code == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    ran = mole(*job, "--output", folder, "--overwrite", "--base", tiny_folder("llama"))
    assert ran.code == 3
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_run_that_fails_at_once_leaves_no_folder(
    mole: Mole, job: tuple[str, ...], tmp_path: Path, tiny_folder: Callable[..., Path]
) -> None:
    ran = mole(*job, "--output", tmp_path / "run", "--base", tiny_folder("llama"))
    assert (ran.code, ran.out) == (3, "")
    assert ran.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_new_folder_under_runs_is_the_default(
    mole: Mole, job: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert mole(*job).code == 0
    (first,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"compose-\d{8}-\d{6}", first.name)
    # Its own record repeats it without another flag, and beside it.
    assert mole("compose", first / "recipe.yaml").code == 0
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_several_processes_need_one_folder(mole: Mole, job: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert mole(*job).err == "mole: --output: several processes need the same output folder. Write --output DIR.\n"


def test_an_interrupted_run_is_resumed_to_the_same_gates(
    mole: Mole, job: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from molecli.cli.console import Console

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert mole(*job, "--output", whole).code == 0

    def interrupt(self: Console, label: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Console, "progress", interrupt)
        ran = mole(*job, "--output", cut)
    assert ran.code == 130
    assert ran.err == (
        "prompts: plain text\n"
        f"{cut}: to continue, run the same command with --resume --output {cut}\n"
        "mole: interrupted: what was finished is kept\n"
    )
    assert not (cut / "composition.safetensors").exists()
    assert mole("compose", "--resume", "--output", cut).code == 0
    assert _gates(cut) == _gates(whole)


def test_a_dry_run_writes_nothing(mole: Mole, job: tuple[str, ...], tmp_path: Path) -> None:
    ran = mole(*job, "--output", tmp_path / "run", "--dry-run", "--json")
    plan = json.loads(ran.out)
    assert (plan["mode"], plan["steps"], plan["examples"]) == ("gated", 3, {"train": 3})
    assert plan["output"] == str(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_fixed_mode_is_one_value_of_mode(mole: Mole, job: tuple[str, ...], tmp_path: Path) -> None:
    ran = mole(*job, "--mode", "nla", "--output", tmp_path / "run", "--json")
    report = json.loads(ran.out)
    assert (report["mode"], report["steps"]) == ("nla", 0)
    assert not (tmp_path / "run" / "train_log.jsonl").exists()


def test_evaluate_scores_a_composition_beside_the_fixed_modes(mole: Mole, gated_folder: Any, tmp_path: Path) -> None:
    arguments = ("--files", gated_folder.data, "--max-new-tokens", "4", "--bootstrap", "50", "--output", tmp_path / "e")
    ran = mole("evaluate", gated_folder.folder, *arguments, "--json")
    assert ran.code == 0, ran.err
    report = json.loads(ran.out)
    assert set(report["methods"]) == {"base", "a", "b", "linear", "nla", "run"}
    assert {path.name for path in (tmp_path / "e").iterdir()} == {"recipe.yaml", "results.json", "samples_words.jsonl"}
    plan = json.loads(mole("evaluate", gated_folder.folder, *arguments[:-1], tmp_path / "f", "--dry-run", "--json").out)
    assert plan["compositions"][0]["experts"] == ["a", "b"]


def test_evaluate_takes_one_recipe_or_compositions(mole: Mole, gated_folder: Any) -> None:
    ran = mole("evaluate", "x.yaml", gated_folder.folder)
    assert ran == (
        2,
        "",
        "mole: x.yaml: a recipe cannot be combined with other arguments. Name one recipe, or only compositions.\n",
    )


def test_train_lora_writes_a_folder_that_compose_takes(mole: Mole, gated_folder: Any, tmp_path: Path) -> None:
    lora = tmp_path / "c"
    ran = mole(
        *("train-lora", "--base", gated_folder.base, "--files", gated_folder.data, "--steps", "2"),
        *("--batch-size", "2", "--rank", "2", "--output", lora),
    )
    assert (ran.code, ran.out) == (0, f"{lora}\n"), ran.err
    assert {path.name for path in lora.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors", "recipe.yaml"}
    sampled = mole(
        *("sample", "--base", gated_folder.base, "--loras", lora, "--prompt", "a", "--max-new-tokens", "4", "--json")
    )
    assert sampled.code == 0
