"""SVDiff through the program: train, compose, sample, and what a user may get wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

Mole = Callable[..., Any]


class Trained(NamedTuple):
    """The command line that trained an adapter, its folder and its base."""

    job: tuple[str, ...]
    folder: Path
    base: Path


@pytest.fixture
def trained(mole: Mole, tiny_folder: Callable[..., Path], write_jsonl: Any, tmp_path: Path) -> Trained:
    base, folder = tiny_folder("t5"), tmp_path / "run"
    data = write_jsonl(tmp_path / "letters.jsonl", [(f"say {c}", c.upper() * 2) for c in "abcd"])
    job = ("train-lora", "--method", "svdiff", "--base", str(base), "--files", str(data), "--device", "cpu")
    job = (*job, "--steps", "3", "--batch-size", "4", "--dtype", "float32")
    assert mole(*job, "--output", folder) == (0, f"{folder}\n", f"prompts: plain text\nWritten: {folder}\n")
    return Trained(job, folder, base)


def test_a_run_writes_its_folder_and_its_recipe_repeats_it(mole: Mole, trained: Trained, tmp_path: Path) -> None:
    names = {path.name for path in trained.folder.iterdir()}
    assert names == {"svdiff.safetensors", "recipe.yaml", "report.json", "train_log.jsonl"}
    again = tmp_path / "again"
    assert mole("train-lora", trained.folder / "recipe.yaml", "--output", again).code == 0
    first, second = (folder / "svdiff.safetensors" for folder in (trained.folder, again))
    assert first.read_bytes() == second.read_bytes()
    assert mole(*trained.job, "--output", again, "--overwrite", "--seed", "1").code == 0
    assert first.read_bytes() != second.read_bytes()


def test_a_plan_counts_the_singular_values(mole: Mole, trained: Trained, tmp_path: Path) -> None:
    plan = json.loads(mole(*trained.job, "--output", tmp_path / "p", "--dry-run", "--json").out)
    report = json.loads((trained.folder / "report.json").read_text())
    assert (plan["adapted_matrices"], plan["trained_parameters"]) == (report["matrices"], report["parameters"])
    assert not (tmp_path / "p").exists()


@pytest.mark.filterwarnings("ignore:.*are the same LoRA")
def test_loras_takes_its_folder_and_its_file(mole: Mole, trained: Trained, tmp_path: Path) -> None:
    file, shared = trained.folder / "svdiff.safetensors", ("--base", trained.base, "--device", "cpu")
    composed = tmp_path / "c"
    job = ("compose", "--loras", f"a={trained.folder},b={file}@0.5", *shared, "--mode", "svdiff", "--dtype", "float32")
    dry = json.loads(mole(*job, "--set", "evaluate=null", "--output", composed, "--dry-run", "--json").out)
    assert [(lora["name"], lora["rank"]) for lora in dry["loras"]] == [("a", 32), ("b", 32)]
    ran = mole(*job, "--set", "evaluate=null", "--output", composed, "--json")
    said = "prompts: plain text\na and b are the same LoRA: it counts twice\n"
    assert (ran.code, ran.err) == (0, f"{said}Written: {composed}\n")
    assert all(share < 1e-5 for share in json.loads(ran.out)["residuals"].values())
    assert mole("sample", composed, "--prompt", "say a", "--device", "cpu").code == 0


def test_what_is_lost_of_a_lora_is_a_note(
    mole: Mole, trained: Trained, make_tiny: Any, make_peft_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    lora = make_peft_adapter(make_tiny("t5").model, tmp_path / "lora")
    job = ("compose", "--loras", f"a={trained.folder},b={lora}", "--base", trained.base, "--mode", "svdiff")
    ran = mole(*job, "--dtype", "float32", "--set", "evaluate=null", "--output", tmp_path / "c", "--json")
    share = json.loads(ran.out)["residuals"]["b"]
    note = f"b: {share:.1%} of its update is no shift of the base's singular values, and is left out"
    assert (ran.code, ran.err) == (0, f"prompts: plain text\n{note}\nWritten: {tmp_path / 'c'}\n")


def test_another_base_is_exit_3(mole: Mole, trained: Trained, tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    other = tiny_folder("t5", seed=1)
    where = f"a ({trained.folder / 'svdiff.safetensors'})"
    message = (
        f"mole: {where}: it shifts the singular values of {trained.base}, whose weights differ from this base's. "
        f"Name the base it was trained on with --base {trained.base}.\n"
    )
    job = ("compose", "--loras", f"a={trained.folder}", "--base", other, "--mode", "linear", "--device", "cpu")
    assert mole(*job, "--set", "evaluate=null", "--output", tmp_path / "c") == (3, "", message)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--rank", "8"), "--rank: it is a setting of LoRAs, and the method is svdiff. Leave it out."),
        (("--alpha", "16"), "--alpha: it is a setting of LoRAs, and the method is svdiff. Leave it out."),
        (("--rslora",), "adapter.rslora: it is a setting of LoRAs, and the method is svdiff. Leave it out."),
        (
            ("--set", "adapter.dropout=0.1"),
            "adapter.dropout: it is a setting of LoRAs, and the method is svdiff. Leave it out.",
        ),
        (
            ("--method", "svdif"),
            "command line: adapter.method is 'svdif', not one of lora, svdiff. Did you mean 'svdiff'?",
        ),
    ],
)
def test_flags_that_are_wrong(mole: Mole, flags: tuple[str, ...], message: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ran = mole("train-lora", "--method", "svdiff", *flags, "--output", folder)
    assert ran == (2, "", f"mole: {message}\n")
    assert not folder.exists()
