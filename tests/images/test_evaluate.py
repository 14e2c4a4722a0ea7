"""`mole evaluate` on a tiny pipeline: pairing, masks, going on, failures, the judge, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import standin
import torch
from PIL import Image
from tiny_clip import build_tiny_clip

from molecli.bases.diffusion import Diffusion
from molecli.commands.evaluate import run_evaluate
from molecli.commands.plan import make_plan
from molecli.config import EvaluateRecipe, load_recipe
from molecli.errors import RunError, UsageError
from molecli.evaluation.report import EvaluationReport
from molecli.images.scenes import plan_pictures
from molecli.protocols import Scene

SCENES = (
    {"prompt": "a cat in a hat", "loras": ["cat", "hat"]},
    {"prompt": "a cat at sea", "loras": ["cat", "sea"], "name": "two"},
    {"prompt": "all three", "loras": ["hat", "cat", "sea"]},
)
Run = Callable[..., EvaluationReport]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def make(picture_world: Any, clip_folder: Path, tmp_path: Path) -> Callable[..., EvaluateRecipe]:
    """`make(scenes, key=value, ...)` -> a recipe for them: two pictures a scene, two steps."""

    def recipe(scenes: Any = SCENES, **changes: Any) -> EvaluateRecipe:
        file = tmp_path / "mine.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in scenes))
        values = {
            "base.id": str(picture_world.base),
            "loras": [f"{name}={path}" for name, path in picture_world.loras.items()],
            "eval.data.suite": "pictures",
            "eval.data.files": [str(file)],
            "eval.metrics": ["text_alignment"],
            "eval.clip.model": str(clip_folder),
            "eval.images": 2,
            "eval.bootstrap": 20,
            "image.steps": 2,
            "modes": ["base", "linear"],
            "output": str(tmp_path / "out"),
            "device": "cpu",
        }
        return load_recipe(None, "evaluate", {**values, **{k.replace("__", "."): v for k, v in changes.items()}})  # type: ignore[return-value]

    return recipe


def samples(recipe: EvaluateRecipe) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(recipe.output) / "samples_mine.jsonl").read_text().splitlines()]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that were drawn, as they are."""
    drawn: list[str] = []
    generate = Diffusion.generate

    def counted(self: Diffusion, prompts: Any, **options: Any) -> Any:
        drawn.extend(prompts)
        return generate(self, prompts, **options)

    monkeypatch.setattr(Diffusion, "generate", counted)
    return drawn


def test_the_results_have_the_shape_of_a_language_models(make: Callable[..., EvaluateRecipe]) -> None:
    recipe = make(eval__metrics=["text_alignment", "image_alignment"], **references(Path(make().output).parent))
    report = run_evaluate(recipe)
    stored = json.loads((Path(recipe.output) / "results.json").read_text())
    assert set(stored) >= {"model_name", "results", "methods", "average", "comparisons", "versions", "config", "suite"}
    assert list(stored["methods"]) == ["base", "linear"]
    assert set(stored["results"]["mine"]) >= {"text_alignment,none", "text_alignment_stderr,none"}
    assert [(row["metric"], row["second"]) for row in stored["comparisons"]] == [
        ("text_alignment", "base"),
        ("image_alignment", "base"),
    ]
    assert stored["n-samples"]["mine"] == {"original": 6, "effective": 6}
    assert stored["failed"] == []
    low, high = stored["intervals"]["image_alignment"]["base"]["average"]
    assert low <= stored["averages"]["image_alignment"]["base"] <= high
    assert [table.corner for table in (report.table, *report.more)] == ["text_alignment (%)", "image_alignment (%)"]
    rows = samples(recipe)
    mean = sum(row["text_alignment"] for row in rows if row["method"] == "base") / 6
    assert stored["methods"]["base"]["mine"]["text_alignment,none"] == pytest.approx(mean)


def test_every_method_draws_the_same_scenes_from_the_same_seeds(make: Callable[..., EvaluateRecipe]) -> None:
    recipe = make()
    run_evaluate(recipe)
    by_method: dict[str, list[Any]] = {}
    for row in samples(recipe):
        by_method.setdefault(row["method"], []).append((row["scene"], row["seed"], row["prompt"]))
        with Image.open(Path(recipe.output) / row["picture"]) as picture:
            facts = picture.text  # type: ignore[attr-defined]
        assert (facts["seed"], facts["method"], facts["prompt"]) == (str(row["seed"]), row["method"], row["prompt"])
    assert by_method["base"] == by_method["linear"]
    assert len({seed for _, seed, _ in by_method["base"]}) == 6
    assert (Path(recipe.output) / "sheet.png").is_file()


def test_permuting_scenes_and_loras_changes_nothing(make: Callable[..., EvaluateRecipe], picture_world: Any) -> None:
    named = [{**row, "name": str(i)} for i, row in enumerate(SCENES)]
    first = run_evaluate(make(named, output="{}".format(Path(make().output) / "a")))
    turned = [f"{name}={path}" for name, path in reversed(picture_world.loras.items())]
    other = [{**row, "loras": list(reversed(row["loras"]))} for row in reversed(named)]
    second = run_evaluate(make(other, loras=turned, output="{}".format(Path(make().output) / "b")))
    for method in ("base", "linear"):
        scores = [report["methods"][method]["mine"]["text_alignment,none"] for report in (first, second)]
        assert scores[0] == pytest.approx(scores[1], abs=2e-3)


def test_a_scenes_seeds_depend_on_no_other_scene() -> None:
    one, two = (Scene("t", name, "p", ()) for name in ("a", "b"))
    alone = plan_pictures([two], 3, 5)
    assert plan_pictures([one, two], 3, 5)[3:] == alone
    assert plan_pictures([two], 2, 5) == alone[:2]
    assert not {picture.seed for picture in plan_pictures([one], 3, 5)} & {picture.seed for picture in alone}


def test_a_composition_draws_each_scene_with_the_others_masked(
    make: Callable[..., EvaluateRecipe], picture_world: Any
) -> None:
    recipe = make(compositions=[str(picture_world.gated)], modes=["base"])
    report = run_evaluate(recipe)
    assert list(report["methods"]) == ["base", "gated"]
    drawn = {row["scene"]: row["picture"] for row in samples(recipe) if row["method"] == "gated"}
    for scene, loras in {"000": "cat: 1, hat: 1", "two": "cat: 1, sea: 1", "002": "cat: 1, hat: 1, sea: 1"}.items():
        with Image.open(Path(recipe.output) / drawn[scene]) as picture:
            assert picture.text["loras"] == loras  # type: ignore[attr-defined]


def test_a_composition_of_some_of_the_loras_is_read_with_those_alone(
    make: Callable[..., EvaluateRecipe], picture_world: Any
) -> None:
    more = [f"{name}={path}" for name, path in picture_world.loras.items()]
    recipe = make(
        loras=[f"extra={picture_world.loras['cat']}", *reversed(more)],
        compositions=[str(picture_world.gated)],
        modes=["linear"],
        eval__images=1,
    )
    assert list(run_evaluate(recipe)["methods"]) == ["linear", "gated"]


def test_single_draws_every_scene_with_each_lora_alone(make: Callable[..., EvaluateRecipe]) -> None:
    report = run_evaluate(make(SCENES[:1], modes=["single"], eval__images=1))
    assert list(report["methods"]) == ["cat", "hat"]


def test_masked_loras_are_off_in_every_scene(make: Callable[..., EvaluateRecipe]) -> None:
    recipe = make(mask=["cat", "hat", "sea"], modes=["base", "nla"], eval__images=1)
    report = run_evaluate(recipe)
    scores = [report["methods"][name]["mine"]["text_alignment,none"] for name in ("base", "nla")]
    assert scores[0] == scores[1]


def test_several_masks_are_columns_whose_pictures_are_those_of_runs_of_their_own(
    make: Callable[..., EvaluateRecipe], picture_world: Any, tmp_path: Path
) -> None:
    values = {"modes": ["base", "single", "nla"], "compositions": [str(picture_world.gated)], "eval__images": 1}
    masks = {" without cat": ["cat"], " without hat, sea": ["hat", "sea"], "": []}
    together = make(SCENES[:1], mask=list(masks.values()), **values)
    columns = [f"{name}{label}" for name in ("nla", "gated") for label in masks]
    assert list(run_evaluate(together)["methods"]) == ["base", "cat", "hat", *columns]
    drawn = {row["method"]: Path(together.output) / row["picture"] for row in samples(together)}
    assert len(set(drawn.values())) == 3 + len(columns)
    digests = {}
    for label, mask in masks.items():
        alone = make(SCENES[:1], mask=mask, **values, output=str(tmp_path / f"alone{label}"))
        run_evaluate(alone)
        for row in samples(alone):
            if row["method"] in ("nla", "gated"):
                name = row["method"] + label
                with Image.open(Path(alone.output) / row["picture"]) as one, Image.open(drawn[name]) as other:
                    assert one.tobytes() == other.tobytes(), name
                    assert one.text["digest"] == other.text["digest"]  # type: ignore[attr-defined]
                    assert (one.text["method"], other.text["method"]) == (row["method"], name)  # type: ignore[attr-defined]
                    digests[name] = other.text["digest"]  # type: ignore[attr-defined]
    assert len(set(digests.values())) == len(columns)


def test_going_on_with_another_mask_draws_its_column_alone(
    make: Callable[..., EvaluateRecipe], drawn: list[str]
) -> None:
    values = {"modes": ["nla"], "eval__images": 1}
    first = run_evaluate(make(mask=[["cat"], []], **values))
    assert len(drawn) == 6
    drawn.clear()
    assert dict(run_evaluate(make(mask=[["cat"], []], **values))) == dict(first)
    assert drawn == []
    report = run_evaluate(make(mask=[["cat"], ["hat"], []], **values))
    assert list(report["methods"]) == ["nla without cat", "nla without hat", "nla"]
    assert len(drawn) == 3
    drawn.clear()
    # The column has no mask in its name any more, and the unmasked pictures lie in its place.
    run_evaluate(make(mask=["cat"], **values))
    assert len(drawn) == 3


def test_the_plan_names_and_counts_what_the_run_draws(make: Callable[..., EvaluateRecipe], picture_world: Any) -> None:
    recipe = make(
        mask=[["cat"], []],
        modes=["base", "single", "composite"],
        compositions=[str(picture_world.gated)],
        eval__images=1,
    )
    plan = make_plan(recipe)
    report = run_evaluate(recipe)
    assert plan.examples["evaluate"] == 3 * len(report["methods"]) == 3 * (1 + 3 + 2 + 2)
    # Composite runs each of a scene's 2, 2 and 3 LoRAs, whatever is masked, all else once; two steps each.
    assert plan.passes["evaluate"] == 2 * (3 * (1 + 3 + 2) + 2 * (2 + 2 + 3))


def test_going_on_draws_nothing_twice(make: Callable[..., EvaluateRecipe], drawn: list[str]) -> None:
    first = run_evaluate(make())
    assert len(drawn) == 12
    drawn.clear()
    second = run_evaluate(make())
    assert drawn == []
    assert dict(second) == dict(first)
    run_evaluate(make(image__guidance=7.5))
    assert drawn == [], "the base's own scale is the same whether it is said or not"
    run_evaluate(make(eval__images=3, modes=["base", "linear", "nla"]))
    assert len(drawn) == 3 + 3 + 9
    drawn.clear()
    run_evaluate(make(image__steps=3))
    assert len(drawn) == 12, "pictures of other settings are not taken over"


def test_a_picture_that_fails_costs_no_other_and_no_pairing(
    make: Callable[..., EvaluateRecipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = Diffusion.generate
    broken = {"on": True}

    def sometimes(self: Diffusion, prompts: Any, **options: Any) -> Any:
        if broken["on"] and "a cat at sea" in prompts:
            raise RuntimeError("the sea is rough")
        return generate(self, prompts, **options)

    monkeypatch.setattr(Diffusion, "generate", sometimes)
    recipe = make(modes=["base"])
    with pytest.raises(RunError) as caught:
        run_evaluate(recipe)
    assert "2 of 6 pictures could not be drawn" in str(caught.value)
    stored = json.loads((Path(recipe.output) / "results.json").read_text())
    assert stored["n-samples"]["mine"] == {"original": 6, "effective": 4}
    assert [row["picture"] for row in stored["failed"]] == ["drawn/mine/two/base-0.png", "drawn/mine/two/base-1.png"]
    broken["on"] = False
    assert run_evaluate(make())["n-samples"]["mine"] == {"original": 6, "effective": 6}


def test_limit_keeps_so_many_scenes_of_each_task(make: Callable[..., EvaluateRecipe]) -> None:
    report = run_evaluate(make(eval__data__limit=1, modes=["base"]))
    assert report["n-samples"]["mine"]["original"] == 2


def test_the_judge_compares_every_method_with_the_baseline(
    make: Callable[..., EvaluateRecipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", standin.KEY)
    answer = standin.says(standin.lines((8, 7), (6, 7)))
    with standin.serve(lambda asked: answer) as endpoint:
        recipe = make(modes=["base", "linear", "nla"], judge__endpoint=endpoint.url, judge__pause_s=0, eval__images=1)
        report = run_evaluate(recipe)
        assert len(endpoint.asked) == 2 * 3 * 2
    contests = report["judge"]["contests"]
    assert {(row["method"], row["baseline"]) for row in contests} == {("base", "linear"), ("nla", "linear")}
    assert all(row["ties"] == 3 for row in contests)  # it likes whatever comes first, and both orders are asked
    assert any("against linear" in line for line in report.comparisons)
    assert (Path(recipe.output) / "judgements.jsonl").is_file()
    assert "cat" in endpoint.asked[0].text


def test_an_endpoint_that_is_down_loses_no_picture_and_no_score(
    make: Callable[..., EvaluateRecipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", standin.KEY)
    with standin.serve(lambda asked: standin.says("")) as endpoint:
        url = endpoint.url
    recipe = make(judge__endpoint=url, judge__retries=0, judge__pause_s=0)
    with pytest.raises(RunError, match="judge: "):
        run_evaluate(recipe)
    assert json.loads((Path(recipe.output) / "results.json").read_text())["methods"].keys() == {"base", "linear"}


def test_a_judge_that_cannot_be_asked_is_refused_before_a_picture_is_drawn(
    make: Callable[..., EvaluateRecipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", standin.KEY)
    recipe = make(modes=["base", "nla"], judge__model="x")
    with pytest.raises(UsageError) as caught:
        run_evaluate(recipe)
    assert str(caught.value).startswith("judge.baseline: the baseline 'linear' is not among the methods.")
    assert not (Path(recipe.output) / "drawn").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval__clip__model": "ViT-B-33"}, "CLIP ViT-B-33: open_clip has no such model"),
        (
            {"eval__metrics": ["image_alignment"]},
            "metrics image_alignment: there is no folder of pictures for the concept 'cat'.",
        ),
        ({"eval__metrics": ["recognised"]}, "metrics recognised: the scene 000 does not say what a recogniser"),
        ({"eval__metrics": ["bleu"]}, "metrics: 'bleu' scores texts, not pictures."),
        (
            {"eval__max_new_tokens": 3},
            "eval.max_new_tokens: it is for language models, not for scenes. Leave it out.",
        ),
        ({"eval__data__holdout": 0.5}, "eval.data.holdout: it is for language models, not for scenes. Leave it out."),
        ({"mask": ["dog"]}, "--mask: no LoRA is called 'dog'. There are: cat, hat, sea."),
        ({"only": [["cat"], ["dog"]]}, "--mask: no LoRA is called 'dog'. There are: cat, hat, sea."),
        ({"eval__data__tasks": ["min"]}, "suite pictures: no task is called 'min'. Did you mean 'mine'?"),
        (
            {"scenes": [{"prompt": "a", "loras": ["cap"]}]},
            "task mine, scene 000: it needs the LoRA 'cap', and no LoRA of this name is given. Did you mean 'cat'?",
        ),
        (
            {"scenes": [{"prompt": "a", "name": "x"}, {"prompt": "b", "name": "x"}]},
            "task mine: two scenes are called 'x'. Give each its own name.",
        ),
        (
            {"scenes": [{"prompt": "a"}]},
            "--modes: 'linear' needs LoRAs, but no scene names one. Write --modes base.",
        ),
    ],
)
def test_mistakes_are_explained(make: Callable[..., EvaluateRecipe], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        run_evaluate(make(**changes))
    assert str(caught.value).startswith(message)


def test_a_missing_folder_of_reference_pictures_is_explained(make: Callable[..., EvaluateRecipe]) -> None:
    changes = references(Path(make().output).parent)
    changes["concepts__hat__pictures"] = "nowhere"
    with pytest.raises(UsageError) as caught:
        run_evaluate(make(eval__metrics=["image_alignment"], **changes))
    assert str(caught.value) == "nowhere: no such folder of pictures. Check the path."


def test_compositions_of_parts_of_the_loras_make_one_column(make: Callable[..., EvaluateRecipe]) -> None:
    from molecli.images.columns import Column
    from molecli.images.scene_columns import Learned, scene_columns
    from molecli.images.scenes import SceneBench

    class Stub:
        def __init__(self, *names: str) -> None:
            self.names, self.mode = names, "gated"
            self.on: tuple[str, ...] = names
            self.bank = self

        def index(self, name: str) -> int:
            return self.names.index(name)

        def mask(self, *off: str) -> None:
            self.on = tuple(name for name in self.names if name not in off)

    file = Path(make().output).parent / "mine.jsonl"
    stubs = {name: Stub(*name.split("+")) for name in ("a+b", "b+c", "b+c+d")}
    learned = {
        name: Learned(stub, str(file), Column(name, stub, dict.fromkeys(stub.names, 1.0)))  # type: ignore[arg-type]
        for name, stub in stubs.items()
    }
    scenes = [Scene("t", "1", "p", ("a", "b")), Scene("t", "2", "p", ("c",))]
    bench = SceneBench(("s", "1"), {"t": scenes}, {}, {})
    (column,) = scene_columns(None, bench, [], learned)  # type: ignore[arg-type]
    assert column.name == "gated"
    assert column.of(("a", "b")).mixture is stubs["a+b"]
    assert column.of(("c",)).mixture is stubs["b+c"]
    assert stubs["b+c"].on == ("c",)
    bench = SceneBench(("s", "1"), {"t": [*scenes, Scene("t", "3", "p", ("a", "d"))]}, {}, {})
    with pytest.raises(UsageError, match="which the scene 3 of t needs"):
        scene_columns(None, bench, [], learned)  # type: ignore[arg-type]


def references(folder: Path) -> dict[str, str]:
    """Recipe keys that give every LoRA a folder with one picture."""
    changes = {}
    for name in ("cat", "hat", "sea"):
        place = folder / "references" / name
        place.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(len(name))
        Image.fromarray((torch.rand(20, 20, 3) * 255).byte().numpy()).save(place / "0.png")
        changes |= {f"concepts__{name}__prompt": f"a {name}", f"concepts__{name}__pictures": str(place)}
    return changes
