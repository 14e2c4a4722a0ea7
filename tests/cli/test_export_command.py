"""`mole export` through the program: what it writes and says, and what a user may get wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

Mole = Callable[..., Any]
NOTHING_LEFT = "--mask: every LoRA is switched off, and nothing is left to export. Keep one."


@pytest.fixture
def summed(mole: Mole, gated_folder: Any, tmp_path: Path) -> Path:
    """A composition of mode linear."""
    return _composed(mole, gated_folder, tmp_path / "sum", "linear")


def _composed(mole: Mole, world: Any, folder: Path, mode: str) -> Path:
    loras = ",".join(f"{name}={path}" for name, path in world.loras.items())
    job = ("compose", "--base", world.base, "--loras", loras, "--mode", mode, "--no-evaluate", "--output", folder)
    assert mole(*job).code == 0
    return folder


def test_a_fixed_composition(mole: Mole, summed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ran = mole("export", summed, "--verify", "--output", out)
    assert (ran.code, ran.err) == (0, f"Written: {out}\n")
    lines = ran.out.splitlines()
    assert lines[0] == f"exported  {out}: peft, adapter_model.safetensors, adapter_config.json"
    assert lines[1] == f"of        {summed}: linear of a, b"
    assert lines[2].endswith("in float32")
    assert "rank 8," in lines[2]
    assert lines[3] == "error     none: exact"
    assert lines[4].startswith("verified  PEFT ")
    assert {path.name for path in out.iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json", "recipe.yaml", "report.json"
    }  # fmt: skip


def test_gates_and_a_rank(mole: Mole, gated_folder: Any, tmp_path: Path) -> None:
    ran = mole("export", gated_folder.folder, "--rank", "3", "--output", tmp_path / "out")
    assert ran.code == 0, ran.err
    lines = ran.out.splitlines()
    assert lines[1].endswith("gated of a, b, its gates averaged over 3 examples")
    assert lines[3].startswith("error     of rank 3: mean 0.")
    assert lines[4].startswith("loss      base ")
    assert lines[4].endswith(": mean token loss of an example, 3 examples")
    assert lines[5].startswith("          export minus gated ")
    shapes = load_file(tmp_path / "out" / "adapter_model.safetensors").items()
    assert {tensor.shape[0] for name, tensor in shapes if "lora_A" in name} == {3}


def test_json_is_the_report_and_all_of_stdout(mole: Mole, gated_folder: Any, tmp_path: Path) -> None:
    ran = mole("export", gated_folder.folder, "--json", "--output", tmp_path / "out")
    assert json.loads(ran.out) == json.loads((tmp_path / "out" / "report.json").read_text())


def test_the_recorded_recipe_repeats_the_run(mole: Mole, gated_folder: Any, tmp_path: Path) -> None:
    job = ("export", gated_folder.folder, "--rank", "2", "--dtype", "float16", "--mask", "b", "--limit", "2")
    first = json.loads(mole(*job, "--json", "--output", tmp_path / "out").out)
    ran = mole("export", tmp_path / "out" / "recipe.yaml", "--json", "--output", tmp_path / "again")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out) == {**first, "output": str(tmp_path / "again")}
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("out", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_exact_is_a_rank_too(mole: Mole, summed: Path, tmp_path: Path) -> None:
    ran = mole("export", summed, "--rank", "exact", "--json", "--output", tmp_path / "out")
    assert json.loads(ran.out)["rank"] == {"limit": None, "smallest": 8, "largest": 8}


def test_the_export_completes_as_the_composition_does(
    mole: Mole, summed: Path, gated_folder: Any, tmp_path: Path
) -> None:
    assert mole("export", summed, "--output", tmp_path / "out").code == 0
    prompts = ("--prompt", "a b", "--prompt", "hello", "--max-new-tokens", "8")
    own = mole("sample", summed, *prompts)
    again = mole("sample", "--base", gated_folder.base, "--loras", f"x={tmp_path / 'out'}", *prompts)
    assert (again.code, again.out) == (0, own.out)


def test_a_dry_run_writes_nothing(mole: Mole, gated_folder: Any, tmp_path: Path) -> None:
    job = ("export", gated_folder.folder, "--rank", "4", "--dry-run", "--output", tmp_path / "out")
    lines = mole(*job).out.splitlines()
    assert "export    peft, float32, rank 4 at most" in lines
    assert "calibrate 3 examples" in lines
    assert not (tmp_path / "out").exists()
    plan = json.loads(mole(*job, "--json").out)
    assert plan["export"] == {"format": "peft", "rank": 4, "dtype": "float32"}
    assert plan["examples"] == {"calibrate": 3}


def test_a_dry_run_of_a_fixed_composition_needs_no_examples(mole: Mole, summed: Path) -> None:
    plan = json.loads(mole("export", summed, "--dry-run", "--json").out)
    assert (plan["examples"], plan["export"]["rank"]) == ({}, None)


def test_a_full_folder_is_kept_unless_told_otherwise(mole: Mole, summed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert mole("export", summed, "--output", out).code == 0
    (out / "notes.txt").write_text("mine")
    ran = mole("export", summed, "--rank", "2", "--output", out)
    assert ran == (
        2,
        "",
        f"mole: {out}: the output folder is not empty. Choose another --output, or write --overwrite to replace it.\n",
    )
    assert mole("export", summed, "--rank", "2", "--output", out, "--overwrite").code == 0
    assert json.loads((out / "report.json").read_text())["rank"]["largest"] == 2
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--format", "kohya"),
            "--format kohya: it is a layout of diffusion pipelines, and the base is a language model. "
            "Write --format peft.",
        ),
        (
            ("--format", "pef"),
            "command line: format is 'pef', not one of auto, peft, diffusers, kohya. Did you mean 'peft'?",
        ),
        (("--rank", "0"), "command line: rank is '0'; it must be at least 1. Correct it."),
        (("--rank", "many"), "command line: rank is 'many', not a whole number. Write a whole number."),
        (
            ("--dtype", "int8"),
            "command line: dtype is 'int8', not one of float32, bfloat16, float16. Write one of them.",
        ),
        (
            ("--prompt", "a cat"),
            "--prompt: a language model's gates are averaged over examples, which have answers. "
            "Write --calibrate FILE.jsonl.",
        ),
        (
            ("--guidance", "3"),
            "image: it is only for diffusion pipelines, and the base is a language model. Leave it out.",
        ),
        (
            ("--calibrate", "none.jsonl"),
            "none.jsonl: no such file. Check the path.",
        ),
        (("--mask", "a,b"), NOTHING_LEFT),
        (("--mask", "a", "--only", "a"), NOTHING_LEFT),
        (("--only", "c"), "c: no such LoRA in this composition. Known: a, b."),
        (
            ("--limit", "0"),
            "command line: calibration.limit is '0'; it must be at least 1. Write for example calibration.limit: 64.",
        ),
    ],
)
def test_what_cannot_be_is_code_2(
    flags: tuple[str, ...], message: str, mole: Mole, gated_folder: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert mole("export", gated_folder.folder, *flags, "--output", out) == (2, "", f"mole: {message}\n")
    assert not out.exists()


def test_no_composition_is_code_2(mole: Mole, tmp_path: Path) -> None:
    assert mole("export") == (
        2, "", "mole: mole export: no composition is named. Name the output folder of mole compose.\n"
    )  # fmt: skip
    ran = mole("export", tmp_path / "none")
    assert ran == (2, "", f"mole: {tmp_path}/none: no such composition. Name the output folder of mole compose.\n")
    recipe = tmp_path / "r.yaml"
    recipe.write_text("command: export\n")
    assert mole("export", recipe).err == f"mole: {recipe}: it names no composition. Write composition: DIR.\n"


@pytest.mark.filterwarnings("ignore:.*are the same LoRA")
def test_a_lora_that_is_another_now_is_code_3(mole: Mole, gated_folder: Any, tmp_path: Path) -> None:
    swapped = f"a={gated_folder.loras['b']},b={gated_folder.loras['b']}"
    ran = mole("export", gated_folder.folder, "--loras", swapped, "--output", tmp_path / "out")
    assert ran.code == 3
    assert ran.err.startswith("mole: a: its weights differ from those in the composition")
    assert not (tmp_path / "out").exists()


def test_an_export_that_its_library_reads_otherwise_is_code_1(
    mole: Mole, summed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from molecli.commands import export as exporting

    def another(factors: Any, layout: str, dtype: str) -> Any:
        return {name: type(f)(f.A.float(), f.B.float(), 1.5) for name, f in factors.items()}

    monkeypatch.setattr(exporting, "_as_stored", another)
    ran = mole("export", summed, "--verify", "--output", tmp_path / "out")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith(f"mole: {tmp_path / 'out'}: PEFT ")
    assert "loads another update of '" in ran.err
    assert ran.err.endswith("(relative difference 5.0e-01). The files are kept; report.json lists every matrix.\n")
    assert (tmp_path / "out" / "report.json").is_file()


# -- pictures ------------------------------------------------------------------------------------------------------


def test_a_pipelines_composition_in_every_layout(mole: Mole, picture_world: Any, tmp_path: Path) -> None:
    job = ("compose", "--base", picture_world.base, "--loras", picture_world.named("cat", "hat"), "--mode", "nla")
    assert mole(*job, "--no-preview", "--output", tmp_path / "run").code == 0
    written = {"auto": "pytorch_lora_weights.safetensors", "kohya": "lora.safetensors"}
    for layout, name in written.items():
        ran = mole("export", tmp_path / "run", "--format", layout, "--verify", "--output", tmp_path / layout)
        assert (ran.code, ran.err) == (0, f"Written: {tmp_path / layout}\n")
        assert {path.name for path in (tmp_path / layout).iterdir()} == {name, "recipe.yaml", "report.json"}
        assert ran.out.splitlines()[-1].startswith("verified  diffusers ")
    ran = mole("export", tmp_path / "run", "--format", "peft", "--output", tmp_path / "kohya", "--overwrite")
    assert ran.code == 0, ran.err
    assert not (tmp_path / "kohya" / "lora.safetensors").exists()
    assert (tmp_path / "kohya" / "unet" / "adapter_config.json").is_file()


def test_gates_of_a_pipeline_over_prompts(mole: Mole, picture_world: Any, tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("a hat\n")
    prompts = ("--prompt", "a cat", "--prompts-file", tmp_path / "more.txt", "--denoise-steps", "2")
    ran = mole("export", picture_world.gated, *prompts, "--verify", "--output", tmp_path / "out")
    assert ran.code == 0, ran.err
    lines = ran.out.splitlines()
    assert lines[1].endswith("gated of cat, hat, sea, its gates averaged over 2 pictures")
    assert lines[4].startswith("latents   mean difference from gated: export ")
    assert lines[4].endswith("2 pictures drawn")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            (),
            "cat: gates learn from pictures of what each LoRA adds, and this LoRA has none. "
            "Write --prompt TEXT, which is drawn instead.",
        ),
        (
            ("--calibrate", "x.jsonl"),
            "--calibrate: examples are for a language model, and this base draws pictures. "
            "Write --prompt TEXT, or leave it out.",
        ),
        (
            ("--data-dir", "x"),
            "--data-dir: examples are for a language model, and this base draws pictures. "
            "Write --prompt TEXT, or leave it out.",
        ),
    ],
)
def test_what_a_pipeline_cannot_use_is_code_2(
    flags: tuple[str, ...], message: str, mole: Mole, picture_world: Any, tmp_path: Path
) -> None:
    ran = mole("export", picture_world.gated, *flags, "--output", tmp_path / "out")
    assert ran == (2, "", f"mole: {message}\n")
    assert not (tmp_path / "out").exists()


def test_a_mode_on_the_steps_is_code_2(mole: Mole, picture_world: Any, tmp_path: Path) -> None:
    job = ("compose", "--base", picture_world.base, "--loras", picture_world.named("cat", "hat"), "--mode", "switch")
    assert mole(*job, "--no-preview", "--output", tmp_path / "run").code == 0
    for more in ((), ("--dry-run",)):
        ran = mole("export", tmp_path / "run", "--output", tmp_path / "out", *more)
        assert (ran.code, ran.out) == (2, "")
        assert ran.err == (
            f"mole: {tmp_path / 'run'}: mode switch composes the UNet's outputs step by step, which a single adapter "
            "cannot. Compose the LoRAs with --mode gated or linear, and export that.\n"
        )
    assert not (tmp_path / "out").exists()
