"""Studies of pictures: which commands one asks for, and the tables of what was drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from studies import run_here
from tiny_clip import build_tiny_clip

from molecli.config import StudyRecipe, load_recipe
from molecli.errors import UsageError
from molecli.study.run import jobs_of, run_study

PROMPTS = """\
subject_name,class
cat,cat
hat,hat
sea,place

Object Prompts
'a {0} {1} in the jungle'.format(unique_token, class_token)
Live Subject Prompts
'a {0} {1} in the jungle'.format(unique_token, class_token)
"""
TRAIN = {"steps": 2, "batch_size": 2}
PAIRS = [{"task": "two", "loras": ["cat", "hat"]}, {"task": "two", "loras": ["hat", "sea"]}]
THREE = {"task": "three", "loras": ["cat", "hat", "sea"]}


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def subjects(tmp_path: Path) -> Path:
    from PIL import Image

    folder = tmp_path / "subjects"
    for shade, name in enumerate(("cat", "hat", "sea"), start=1):
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (32, 32), (60 * shade, 20, 90)).save(folder / name / "0.png")
    (folder / "prompts_and_classes.txt").write_text(PROMPTS)
    return folder


@pytest.fixture
def make(picture_world: Any, clip_folder: Path, subjects: Path, tmp_path: Path) -> Any:
    def recipe(**changes: Any) -> StudyRecipe:
        tree: dict[str, Any] = {
            "base": str(picture_world.base),
            "experts": {"loras": [f"{name}={path}" for name, path in picture_world.loras.items()]},
            "concepts": {n: {"prompt": f"a {n}", "pictures": str(subjects / n)} for n in ("cat", "hat", "sea")},
            "methods": {"NLA": {"mode": "nla"}, "MoLE": {"mode": "gated", "train": TRAIN}},
            "image": {"steps": 2},
            "test": {
                "data": {"suite": "dreambooth", "data_dir": str(subjects), "scenes": [*PAIRS, THREE]},
                "images": 2,
                "bootstrap": 20,
                "clip": {"model": str(clip_folder)},
            },
            "output": str(tmp_path / "out"),
            "device": "cpu",
        }
        return StudyRecipe.model_validate({**tree, **changes})

    return recipe


def test_a_learned_method_composes_the_loras_of_each_scene(make: Any, tmp_path: Path) -> None:
    jobs = {job.name: job for job in jobs_of(make(seeds=[0, 1], gates=True))}
    assert [name for name in jobs if name.startswith("compositions/all/seed-0")] == [
        "compositions/all/seed-0/cat+hat/MoLE",
        "compositions/all/seed-0/hat+sea/MoLE",
        "compositions/all/seed-0/cat+hat+sea/MoLE",
    ]
    assert [name for name in jobs if name.startswith("scores")] == [
        "scores/all/fixed/NLA",
        "scores/all/seed-0/MoLE/scenes-1",
        "scores/all/seed-0/MoLE/scenes-2",
        "scores/all/seed-1/MoLE/scenes-1",
        "scores/all/seed-1/MoLE/scenes-2",
    ]
    first = jobs["compositions/all/seed-1/cat+hat/MoLE"].tree
    assert [lora["name"] for lora in first["loras"]] == ["cat", "hat"]
    assert list(first["concepts"]) == ["cat", "hat"]
    assert (first["seed"], first["preview"], first["image"]) == (1, [], {"steps": 2})
    drawn = jobs["scores/all/seed-0/MoLE/scenes-1"].tree
    assert drawn["compositions"] == [
        str(tmp_path / "out/study-steps/compositions/all/seed-0" / n / "MoLE") for n in ("cat+hat", "hat+sea")
    ]
    assert drawn["eval"]["data"]["scenes"] == PAIRS
    assert len(jobs["scores/all/fixed/NLA"].tree["eval"]["data"]["scenes"]) == 3
    assert jobs["scores/all/fixed/NLA"].tree["modes"] == ["nla"]
    assert "gates/all/seed-0/cat+hat/MoLE" in jobs
    for job in jobs.values():
        load_recipe(None, job.tree["command"], job.tree)  # a user could run each


def test_loras_of_pictures_are_trained_first_and_shifts_beside_them(make: Any, subjects: Path) -> None:
    pictures = {
        name: {"instance_dir": str(subjects / name), "instance_prompt": f"a {name}"} for name in ("cat", "hat", "sea")
    }
    svdiff = {"experts": {"adapter": {"method": "svdiff"}, "train": {"lr": 1e-3}}}
    jobs = jobs_of(make(experts={"pictures": pictures, "adapter": {"rank": 2}}, methods={"svdiff": svdiff}))
    trained = {job.name: job.tree for job in jobs if job.phase == "loras"}
    assert list(trained)[2:4] == ["loras/sea", "own-loras/svdiff/cat"]
    assert trained["loras/cat"]["pictures"] == pictures["cat"]
    inside = {"cat": {"instance_dir": "cat", "instance_prompt": "a cat"}}
    alone = {"suite": "dreambooth", "scenes": [["cat"]]}
    (first, *_) = jobs_of(make(experts={"pictures": inside}, data_dir="D", test={"data": alone}))
    assert first.tree["pictures"]["instance_dir"] == "D/cat"
    assert trained["loras/cat"]["adapter"] == {"rank": 2}
    assert trained["own-loras/svdiff/cat"]["adapter"] == {"method": "svdiff"}
    assert "data" not in trained["loras/cat"]
    fewer = {"suite": "dreambooth", "data_dir": str(subjects), "scenes": [["cat", "sea"]]}
    some = jobs_of(make(experts={"pictures": pictures}, methods={"svdiff": svdiff}, test={"data": fewer}))
    assert [job.name for job in some if job.phase == "loras"] == [
        "loras/cat",
        "loras/sea",
        "own-loras/svdiff/cat",
        "own-loras/svdiff/sea",
    ]
    (scored,) = [job for job in jobs if job.phase == "scores"]
    assert all("own-loras" in lora["source"] for lora in scored.tree["loras"])


def test_without_scenes_of_its_own_a_study_composes_all_loras(make: Any, subjects: Path) -> None:
    data = {"suite": "composlora", "data_dir": str(subjects)}
    jobs = jobs_of(make(test={"data": data}))
    assert [job.name for job in jobs] == [
        "compositions/all/seed-0/cat+hat+sea/MoLE",
        "scores/all/fixed/NLA",
        "scores/all/seed-0/MoLE/scenes-1",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"numbers": [2]}, "numbers: it is for language models"),
        ({"per_task": True}, "per_task: it is for language models"),
        ({"fit": {"suite": "nli"}}, "fit: it is for language models"),
        ({"methods": {"single": None}}, "single is one LoRA alone"),
        ({"methods": {"g": {"mode": "gated", "objective": {"clipp": 1}}}}, r"methods\.g\.objective\.clipp"),
        ({"test": {"data": {"suite": "dreambooth", "scenes": [["cat", "hut"]]}}}, "needs the LoRA 'hut'.*hat"),
    ],
)
def test_what_cannot_be_a_study_of_pictures(make: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        jobs_of(make(**changes))


def test_a_study_of_pictures_ends_in_tables(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = run_here(monkeypatch)
    notes: list[str] = []
    published = {"two text_alignment": {"MoLE": 75.9}, "three image_alignment": {"NLA": 69.4}}
    methods = {"base": None, "NLA": {"mode": "nla"}, "MoLE": {"mode": "gated", "train": TRAIN}}
    chosen = make(published=published, methods=methods, gates=True)
    report = run_study(chosen, at_once=1, note=notes.append)
    assert notes == []
    text, image = (contest for contest, _ in report.comparisons["all"].contests)
    assert (text.label, image.label) == ("text_alignment", "image_alignment")
    assert list(text.methods) == ["base", "NLA", "MoLE"]
    assert list(text.rows()) == ["two", "three", "average"]
    assert text.examples == 6  # three scenes in one place, two pictures each
    lines = (tmp_path / "out" / "study.md").read_text().splitlines()
    assert (
        f"| two text_alignment | {text.rows()['two']['MoLE']:.1f} | 75.9 | {text.rows()['two']['NLA']:.1f} | – |"
        in lines
    )
    (look,) = report.looks
    assert (look.name, look.compositions) == ("MoLE", 3)
    before = list(made)
    run_study(chosen, at_once=1)
    assert made == before
