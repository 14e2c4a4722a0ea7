"""`mole evaluate` on a tiny diffusion pipeline: streams, exit codes, plans, going on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_clip import build_tiny_clip

from molecli.catalog.builtin import package_folder
from molecli.suites._captions import EMOJI

RECOGNISER = package_folder() / "builtin" / "recogniser" / "config.json"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def line(picture_world: Any, clip: Path, tmp_path: Path) -> tuple[Any, ...]:
    """A command line that scores two scenes, one picture each."""
    file = tmp_path / "mine.jsonl"
    rows = [{"prompt": "cat, hat", "loras": ["cat", "hat"]}, {"prompt": "sea", "loras": ["sea"]}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    short = ("--denoise-steps", "2", "--images", "1", "--bootstrap", "20", "--metrics", "text_alignment")
    return (
        "--base", picture_world.base, "--loras", picture_world.named(), "--files", file, "--clip-model", clip, *short
    )  # fmt: skip


def test_one_table_goes_to_stdout_and_the_rest_to_files(
    mole: Callable[..., Any], line: tuple[Any, ...], tmp_path: Path
) -> None:
    ran = mole("evaluate", *line, "--modes", "base,linear,nla", "--output", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert ran.out.splitlines()[0] == "| text_alignment (%) | base | linear | nla |"
    assert "nla − linear, text_alignment: " in ran.out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "recipe.yaml", "results.json", "samples_mine.jsonl", "sheet.png", "drawn",
    }  # fmt: skip


def test_json_is_the_only_thing_on_stdout(mole: Callable[..., Any], line: tuple[Any, ...], tmp_path: Path) -> None:
    ran = mole("evaluate", *line, "--modes", "base", "--output", tmp_path / "out", "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["suite"] == "pictures"


def test_compositions_and_the_default_modes_are_columns(
    mole: Callable[..., Any], line: tuple[Any, ...], picture_world: Any, tmp_path: Path
) -> None:
    ran = mole("evaluate", picture_world.gated, *line, "--output", tmp_path / "out", "--json")
    assert ran.code == 0, ran.err
    methods = json.loads(ran.out)["methods"]
    assert list(methods) == ["base", "linear", "nla", "switch", "composite", "gated"]


def test_a_run_goes_on_with_more_pictures_under_resume(
    mole: Callable[..., Any], line: tuple[Any, ...], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert mole("evaluate", *line, "--modes", "base", "--output", out).code == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("drawn/**/*.png")}
    refused = mole("evaluate", *line, "--modes", "base", "--output", out)
    assert (refused.code, refused.out) == (2, "")
    assert "--resume to continue the run there" in refused.err
    ran = mole("evaluate", *line, "--images", "2", "--modes", "base,nla", "--output", out, "--resume", "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["n-samples"]["mine"] == {"original": 4, "effective": 4}
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert "images: 2" in (out / "recipe.yaml").read_text()


def test_overwrite_leaves_nothing_of_the_earlier_run(
    mole: Callable[..., Any], line: tuple[Any, ...], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert mole("evaluate", *line, "--modes", "base,linear", "--output", out).code == 0
    assert mole("evaluate", *line, "--modes", "base", "--output", out, "--overwrite").code == 0
    assert not list(out.rglob("linear-*.png"))


def test_the_plan_counts_pictures_and_passes_of_the_unet(
    mole: Callable[..., Any], line: tuple[Any, ...], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ran = mole("evaluate", *line, "--modes", "linear,composite,loratorio", "--output", out, "--dry-run", "--json")
    assert ran.code == 0, ran.err
    plan = json.loads(ran.out)
    assert plan["examples"] == {"evaluate": 6}
    # Scenes of two LoRAs and of one: linear 1 + 1, composite 2 + 1, loratorio 3 + 2, two steps each.
    assert plan["passes"] == {"evaluate": 2 * (2 + 3 + 5)}
    assert not out.exists()


def test_mistakes_leave_no_folder(
    mole: Callable[..., Any], line: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    out = tmp_path / "out"
    for arguments, message in {
        ("--clip-model", "nowhere"): "mole: CLIP nowhere: open_clip has no such model, and there is no such folder.",
        ("--suite", "dreambooth", "--files", ""): "mole: suite dreambooth: it reads its pictures and prompts from a fo",
        ("--suite", "bbh", "--files", ""): "mole: --suite: the suite 'bbh' has texts, and the base draws pictures.",
        ("--judge-model", "gpt-4o", "--judge-baseline", "base"): "mole: judge.key_env:",
    }.items():
        for dry in ((), ("--dry-run",)):
            ran = mole("evaluate", *line, "--output", out, *arguments, *dry)
            assert (ran.code, ran.out) == (2, ""), ran.err
            assert message in ran.err
    assert not out.exists()


@pytest.mark.skipif(not RECOGNISER.is_file(), reason="the recogniser is not built in yet")
def test_the_embedded_loras_names_make_the_suite_emoji(
    mole: Callable[..., Any], picture_world: Any, clip: Path, tmp_path: Path
) -> None:
    named = zip(("violin", "octopus", "flat"), picture_world.loras.values(), strict=True)
    loras = ",".join(f"{name}={path}" for name, path in named)
    ran = mole(
        "evaluate", "--base", picture_world.base, "--loras", loras, "--suite", "emoji", "--clip-model", clip,
        "--limit", "1", "--images", "1", "--denoise-steps", "1", "--modes", "base,nla", "--output", tmp_path / "out",
        "--json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    report = json.loads(ran.out)
    assert list(report["results"]) == ["concepts", "2 LoRAs", "3 LoRAs"]
    assert [key for key in report["results"]["2 LoRAs"] if key.endswith(",none") and "stderr" not in key] == [
        "recognised,none", "text_alignment,none", "image_alignment,none",
    ]  # fmt: skip
    assert list(report["averages"]) == ["recognised", "text_alignment", "image_alignment"]
    assert (EMOJI / "violin").is_dir()


def test_a_language_models_evaluation_has_nothing_to_go_on_from(
    mole: Callable[..., Any], gated_folder: Any, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    ran = mole("evaluate", gated_folder.folder, "--output", tmp_path / "out", "--resume")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == (
        "mole: --resume: an evaluation of a language model cannot be resumed. Write --overwrite to repeat it.\n"
    )


def test_a_flag_on_how_to_load_the_base_changes_the_compositions_own(
    mole: Callable[..., Any], picture_world: Any, tmp_path: Path
) -> None:
    folder, drawing = tmp_path / "drawn", ("--prompt", "a cat", "--denoise-steps", "1", "--dtype", "float32")
    ran = mole("sample", str(picture_world.gated), *drawing, "--output", str(folder))
    assert ran.code == 0, ran.err
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert (recipe["base"]["id"], recipe["base"]["dtype"]) == (str(picture_world.base), "float32")
