"""Merged compositions whose LoRAs are gone, through the program: sampled, scored, planned and exported all the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

Mole = Callable[..., Any]


class Merged(NamedTuple):
    """A composition of mode ties of LoRAs that are gone, what is said of that, and how to bring them back."""

    folder: Path
    said: str
    refusal: str
    restore: Callable[[], object]


def merge(mole: Mole, folder: Path, base: Path, loras: dict[str, Path], *flags: str) -> Merged:
    """The composition of copies of these LoRAs, the first of which is deleted then."""
    copies = {name: Path(shutil.copytree(path, folder / name)) for name, path in loras.items()}
    named = ",".join(f"{name}={path}" for name, path in copies.items())
    job = ("compose", "--base", base, "--loras", named, "--mode", "ties", "--device", "cpu", *flags)
    assert mole(*job, "--output", folder / "run").code == 0
    first = next(iter(copies))
    shutil.rmtree(copies[first])
    lost = f"no {first} at {copies[first]}"
    return Merged(
        folder / "run",
        f"mole: the LoRAs of this composition (ties) are not all there: {lost}. The merge is used as it is; --mask "
        "and --only need the LoRAs\n",
        f"mole: LoRAs: --mask and --only merge the remaining LoRAs again, but there is {lost}. "
        "Put it back, or name all of them with --loras.\n",
        lambda: shutil.copytree(loras[first], copies[first]),
    )


FORMAT = "prompts: plain text\n"


@pytest.fixture(autouse=True)
def _notes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warnings as the program shows them: `main` is not what the tests call."""
    import warnings

    from molecli.cli import app

    monkeypatch.setattr(warnings, "showwarning", app._as_messages(warnings.showwarning))
    warnings.filterwarnings("always", category=UserWarning, module=r"molecli\b")


@pytest.fixture
def merged(mole: Mole, gated_folder: Any, tmp_path: Path) -> Merged:
    return merge(mole, tmp_path, gated_folder.base, gated_folder.loras, "--no-evaluate")


def test_it_samples(mole: Mole, merged: Merged) -> None:
    job = ("sample", merged.folder, "--prompt", "a b", "--prompt", "c d e", "--device", "cpu")
    without = mole(*job)
    assert (without.code, without.err) == (0, f"{merged.said}{FORMAT}")
    assert mole(*job, "--only", "a,b") == without
    for flags in (("--mask", "b"), ("--only", "b")):
        assert mole(*job, *flags) == (2, "", merged.said + merged.refusal)
    merged.restore()
    assert mole(*job) == (0, without.out, FORMAT)


def test_it_is_scored_beside_the_base(mole: Mole, merged: Merged, gated_folder: Any, tmp_path: Path) -> None:
    job = ("evaluate", merged.folder, "--files", gated_folder.data, "--device", "cpu")
    note = "mole: some LoRAs are missing (a): of the fixed methods, only the base is scored\n"
    dry = mole(*job, "--dry-run", "--json", "--output", tmp_path / "out")
    assert (dry.code, dry.err) == (0, note)
    ran = mole(*job, "--output", tmp_path / "out")
    assert (ran.code, ran.err) == (0, f"{note}{merged.said}{FORMAT}Written: {tmp_path / 'out'}\n")
    found = json.loads((tmp_path / "out" / "results.json").read_text())["methods"]
    assert list(found) == ["base", "run"]
    asked = mole(*job, "--modes", "linear", "--output", tmp_path / "linear")
    assert (asked.code, asked.out) == (2, "")
    assert "no such built-in LoRA, folder or file" in asked.err
    merged.restore()
    mole(*job, "--output", tmp_path / "again")
    whole = json.loads((tmp_path / "again" / "results.json").read_text())["methods"]
    assert list(whole) == ["base", "a", "b", "linear", "nla", "run"]
    assert whole["run"] == found["run"]


def test_it_is_planned_and_exported(mole: Mole, merged: Merged, tmp_path: Path) -> None:
    dry = mole("export", merged.folder, "--dry-run", "--json", "--output", tmp_path / "one")
    assert (dry.code, dry.err) == (0, merged.said)
    assert [lora["name"] for lora in json.loads(dry.out)["loras"]] == ["b"]
    for folder in ("one", "two"):
        ran = mole("export", merged.folder, "--verify", "--device", "cpu", "--output", tmp_path / folder)
        assert (ran.code, ran.err) == (0, ("" if folder == "two" else merged.said) + f"Written: {tmp_path / folder}\n")
        merged.restore() if folder == "one" else None
    one, two = ((tmp_path / folder / "adapter_model.safetensors").read_bytes() for folder in ("one", "two"))
    assert one == two


def test_a_mask_is_refused_before_anything_is_exported(mole: Mole, merged: Merged, tmp_path: Path) -> None:
    ran = mole("export", merged.folder, "--mask", "a", "--device", "cpu", "--output", tmp_path / "out")
    assert ran == (2, "", merged.said + merged.refusal)
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_pipeline_draws_and_exports_it(mole: Mole, picture_world: Any, tmp_path: Path) -> None:
    loras = {name: picture_world.loras[name] for name in ("cat", "hat")}
    merged = merge(mole, tmp_path, picture_world.base, loras, "--no-preview")
    shown = ("--prompt", "a cat", "--set", "image.steps=2", "--device", "cpu")
    ran = mole("sample", merged.folder, *shown, "--output", tmp_path / "gone")
    assert (ran.code, ran.err) == (0, f"{merged.said}Written: {tmp_path / 'gone'}\n")
    out = mole("export", merged.folder, "--verify", "--device", "cpu", "--output", tmp_path / "adapter")
    assert (out.code, out.err) == (0, f"{merged.said}Written: {tmp_path / 'adapter'}\n")
    merged.restore()
    assert mole("sample", merged.folder, *shown, "--output", tmp_path / "there").code == 0
    gone, there = (next((tmp_path / folder).glob("0-*.png")).read_bytes() for folder in ("gone", "there"))
    assert gone == there


def test_scenes_of_all_its_loras_are_drawn_and_others_refused(mole: Mole, picture_world: Any, tmp_path: Path) -> None:
    loras = {name: picture_world.loras[name] for name in ("cat", "hat")}
    merged = merge(mole, tmp_path, picture_world.base, loras, "--no-preview")
    for names, code in ((["cat", "hat"], 0), (["hat"], 2)):
        scenes = tmp_path / "mine.jsonl"
        scenes.write_text(json.dumps({"prompt": "a cat in a hat", "loras": names, "classes": ["dog"]}) + "\n")
        job = ("evaluate", merged.folder, "--suite", "pictures", "--files", scenes, "--metrics", "recognised")
        out = tmp_path / f"scores-{code}"
        ran = mole(*job, "--set", "image.steps=2", "--device", "cpu", "--output", out)
        said = merged.said.removeprefix("mole: ")
        assert (ran.code, said in ran.err, merged.refusal in ran.err) == (code, True, bool(code)), ran.err
        assert ("of the fixed methods, only the base" in ran.err) == (not code)
        assert (out / "sheet.png").exists() == (not code)
