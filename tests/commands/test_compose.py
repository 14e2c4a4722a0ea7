"""`run_compose` whole, on two LoRAs that contradict each other: what is written, scored, kept and taken up again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pair import Pair, examples, make_pair
from safetensors.torch import load_file, save_file
from torch import Tensor

from molecli import __version__
from molecli.bases.loading import load_backbone
from molecli.commands import compose
from molecli.commands.compose import ComposeReport, run_compose
from molecli.config import ComposeRecipe
from molecli.errors import UsageError
from molecli.files.composition import load_composition
from molecli.mixture.attach import attach
from molecli.training.checkpoints import newest_step, recipe_digest

MODES: dict[str, dict[str, Any]] = {
    "gated": {},
    "linear": {"loras": {"up": 0.8, "down": -0.3}},
    "nla": {"loras": {"up": 0.8, "down": 0.4}},
    "single": {"only": ["down"]},
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[..., Path]) -> Pair:
    return make_pair(tiny_folder("llama"), tmp_path_factory.mktemp("pair"))


@pytest.fixture
def evaluated(pair: Pair) -> dict[str, Any]:
    """The `evaluate` section that scores the pair's own two tasks."""
    return {"data": {"suite": "jsonl", "files": pair.files}, "max_new_tokens": 3, "bootstrap": 20}


def recipe_of(pair: Pair, output: Path, mode: str, **changes: Any) -> ComposeRecipe:
    fields = dict(MODES[mode])
    if "loras" in fields:
        weights = fields.pop("loras")
        fields["loras"] = [{"name": n, "source": pair.loras[n], "weight": w} for n, w in weights.items()]
    return pair.recipe(output, mode=mode, **fields, **changes)


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


def in_the_run(recipe: ComposeRecipe, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Composes; the logits of the mixture that the run itself holds when it writes."""
    held: list[Tensor] = []
    write = compose._composition

    def watched(recipe: Any, backbone: Any, experts: Any, mixture: Any) -> Any:
        with mixture:
            held.append(logits(backbone.model, backbone.collate(examples())))
        return write(recipe, backbone, experts, mixture)

    monkeypatch.setattr(compose, "_composition", watched)
    run_compose(recipe)
    return held[0]


def same_gates(first: Path, second: Path) -> bool:
    a, b = (load_file(folder / "composition.safetensors") for folder in (first, second))
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


# -- what is written ---------------------------------------------------------------------------------------------------


def test_what_the_base_lacks_of_a_lora_is_told_and_reported(pair: Pair, tmp_path: Path) -> None:
    wider = tmp_path / "wider"
    shutil.copytree(pair.loras["up"], wider)
    (weights,) = wider.glob("*.safetensors")
    tensors = load_file(weights)
    more = {key.replace(".layers.0.", ".layers.9."): tensor.clone() for key, tensor in tensors.items()}
    save_file({**tensors, **more}, weights)
    other, notes = replace(pair, loras={**pair.loras, "up": str(wider)}), list[str]()
    report = run_compose(recipe_of(other, tmp_path / "run", "linear", allow_partial=True), note=notes.append)
    missing = [key for key in more if ".layers.9." in key and key.endswith("lora_A.weight")]
    format, note = sorted(notes)
    assert format == "prompts: plain text"
    assert note.startswith(f"up: the base lacks {len(missing)} of its matrices, such as model.layers.9.")
    assert note.endswith("; they are left out")
    written = json.loads((tmp_path / "run" / "report.json").read_text())
    assert written["left_out"] == {"up": list(report["left_out"]["up"])}
    assert len(written["left_out"]["up"]) == len(missing)


@pytest.mark.parametrize("mode", list(MODES))
def test_a_composition_of_each_mode_reloads_to_the_same_bits(
    mode: str, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(pair, tmp_path / "run", mode)
    expected = in_the_run(recipe, monkeypatch)
    backbone = load_backbone(recipe.base, "cpu")
    batch = backbone.collate(examples())
    base = logits(backbone.model, batch)
    with attach(backbone.model, composition=tmp_path / "run") as mixture:
        assert torch.equal(logits(backbone.model, batch), expected)
        mixture.mask("up", "down")
        assert torch.equal(logits(backbone.model, batch), base)
    assert float((expected - base).abs().max()) > 0.1
    assert torch.equal(logits(backbone.model, batch), base)


@pytest.mark.parametrize(
    ("mode", "weights"), [("linear", [0.8, -0.3]), ("nla", [2 / 3, 1 / 3]), ("single", [0.0, 1.0])]
)
def test_the_tensors_of_a_fixed_mode_are_its_weights(
    mode: str, weights: list[float], pair: Pair, tmp_path: Path
) -> None:
    report = run_compose(recipe_of(pair, tmp_path, mode))
    assert load_file(tmp_path / "composition.safetensors")["site/network/weights"].tolist() == pytest.approx(weights)
    assert (report["mode"], report["trained_parameters"], report["steps"]) == (mode, 0, 0)
    assert {path.name for path in tmp_path.iterdir()} == {"composition.safetensors", "recipe.yaml", "report.json"}


def test_a_gated_folder_says_what_it_is_and_how_it_was_made(pair: Pair, tmp_path: Path) -> None:
    recipe = recipe_of(pair, tmp_path, "gated", gate={"granularity": "layer", "top_k": 2})
    run_compose(recipe)
    names = {"composition.safetensors", "recipe.yaml", "report.json", "train_log.jsonl"}
    assert {path.name for path in tmp_path.iterdir()} == names
    made = load_composition(tmp_path)
    assert (made.mode, made.level, made.base, made.version) == ("gated", "site", pair.base, __version__)
    assert made.gate == recipe.gate.model_dump(mode="json")
    assert [(expert.name, expert.rank, expert.alpha) for expert in made.experts] == [("up", 4, 8), ("down", 4, 8)]
    assert made.recipe == (tmp_path / "recipe.yaml").read_text()
    sites = {name.split("/")[1] for name in made.tensors}
    assert sites == {f"model.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn", "mlp")}


def test_the_report_counts_what_was_learned_and_is_in_the_folder(pair: Pair, tmp_path: Path) -> None:
    recipe = recipe_of(pair, tmp_path, "gated")
    report = run_compose(recipe)
    log = [json.loads(line) for line in (tmp_path / "train_log.jsonl").read_text().splitlines()]
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert report.pop("seconds") > 0
    assert report == {
        "output": str(tmp_path),
        "mode": "gated",
        "base": pair.base,
        "experts": ["up", "down"],
        "sites": 2,
        "trained_parameters": 2 * (2 * 32 + 2 + 1),  # a weight and a bias per expert, and a temperature, at each site
        "steps": 8,
        "last": log[-1],
        "recipe_digest": recipe_digest(recipe),
        "molecli_version": __version__,
    }


@pytest.mark.parametrize("gate", [{"head": "full"}, {"head": "low_rank"}, {"init_std": 0.5}])
def test_the_same_recipe_writes_the_same_bits_and_another_seed_does_not(
    gate: dict[str, Any], pair: Pair, tmp_path: Path
) -> None:
    for draws, (name, seed) in enumerate((("a", 5), ("b", 5), ("c", 6))):
        torch.rand(draws)  # what happened before in this process must not show
        run_compose(recipe_of(pair, tmp_path / name, "gated", gate=gate, train={"steps": 2}, seed=seed))
    assert same_gates(tmp_path / "a", tmp_path / "b")
    assert not same_gates(tmp_path / "a", tmp_path / "c")


# -- what is scored ----------------------------------------------------------------------------------------------------


def test_gates_are_scored_beside_the_base_each_lora_and_the_fixed_mixtures(
    pair: Pair, tmp_path: Path, evaluated: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    report = run_compose(recipe_of(pair, tmp_path, "gated", train={"steps": 40, "batch_size": 8}, evaluate=evaluated))
    methods = report["evaluation"]["methods"]
    assert list(methods) == ["base", "own LoRA", "up", "down", "linear", "nla", "gated"]
    scores = {m: [row[task]["exact_match,none"] for task in ("up", "down")] for m, row in methods.items()}
    assert (scores["base"], scores["up"], scores["down"]) == ([0, 0], [1, 0], [0, 1])
    assert scores["own LoRA"] == scores["gated"] == [1, 1]
    assert sum(scores["linear"]) < 2 > sum(scores["nla"])
    assert report["evaluation"]["model_name"] == "gated"
    assert (tmp_path / "gates.png").read_bytes().startswith(b"\x89PNG")
    assert [c["second"] for c in report["evaluation"]["comparisons"]] == list(methods)[:-1]
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(report))
    report.show()
    shown = capsys.readouterr().out
    assert shown.startswith("| exact_match (%) | base | own LoRA | up | down | linear | nla | gated |\n")
    assert "gated − nla: +" in shown


@pytest.mark.parametrize(
    ("mode", "baselines", "columns"),
    [
        ("linear", True, ["base", "own LoRA", "up", "down", "linear", "nla"]),
        ("single", True, ["base", "own LoRA", "up", "down", "linear", "nla", "single"]),
        ("nla", False, ["nla"]),
    ],
)
def test_a_fixed_mode_stands_in_the_table_once(
    mode: str, baselines: bool, columns: list[str], pair: Pair, tmp_path: Path, evaluated: dict[str, Any]
) -> None:
    evaluate = {**evaluated, "baselines": baselines, "bootstrap": 0}
    report = run_compose(recipe_of(pair, tmp_path, mode, evaluate=evaluate))
    assert list(report["evaluation"]["methods"]) == columns
    assert report["evaluation"]["model_name"] == mode
    methods = report["evaluation"]["methods"]
    if baselines:
        assert methods["base"] != methods["up"] != methods["down"]
    if mode == "single":
        assert methods["single"] == methods["down"] != methods["up"]


def test_without_an_evaluation_the_folder_is_what_is_shown(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_compose(recipe_of(pair, tmp_path, "linear")).show()
    assert capsys.readouterr().out == f"{tmp_path}\n"


def test_progress_tells_of_gates_and_then_of_each_method(pair: Pair, tmp_path: Path, evaluated: dict[str, Any]) -> None:
    heard: list[tuple[str, int, int]] = []
    recipe = recipe_of(pair, tmp_path, "gated", train={"steps": 3}, evaluate=evaluated)
    run_compose(recipe, progress=lambda *told: heard.append(told))
    assert heard[:3] == [("gates", step, 3) for step in (1, 2, 3)]
    scored = list(dict.fromkeys(label for label, _, _ in heard[3:]))
    assert scored[:6] == ["base", "up", "down", "linear", "nla", "gated"]


# -- interrupted, resumed ----------------------------------------------------------------------------------------------


def interrupt_at(label: str, done: int) -> Callable[[str, int, int], None]:
    def progress(heard: str, step: int, _: int) -> None:
        if (heard, step) == (label, done):
            raise KeyboardInterrupt

    return progress


def test_a_run_interrupted_while_learning_keeps_its_steps_and_is_taken_up(pair: Pair, tmp_path: Path) -> None:
    run_compose(recipe_of(pair, tmp_path / "whole", "gated"))
    cut = recipe_of(pair, tmp_path / "cut", "gated")
    with pytest.raises(KeyboardInterrupt):
        run_compose(cut, progress=interrupt_at("gates", 5))
    assert newest_step(tmp_path / "cut") == 5
    assert len((tmp_path / "cut/train_log.jsonl").read_text().splitlines()) == 5
    assert not (tmp_path / "cut/composition.safetensors").exists()
    report = run_compose(cut, resume=True)
    assert newest_step(tmp_path / "cut") is None
    assert report["steps"] == 8
    assert same_gates(tmp_path / "whole", tmp_path / "cut")
    whole, resumed = ((tmp_path / run / "train_log.jsonl").read_text() for run in ("whole", "cut"))
    assert whole == resumed


def test_a_run_interrupted_while_scoring_keeps_its_composition_and_learns_nothing_again(
    pair: Pair, tmp_path: Path, evaluated: dict[str, Any]
) -> None:
    recipe = recipe_of(pair, tmp_path, "gated", evaluate=evaluated)
    with pytest.raises(KeyboardInterrupt):
        run_compose(recipe, progress=interrupt_at("up", 8))
    assert not (tmp_path / "report.json").exists()
    kept = load_composition(tmp_path).tensors
    heard: list[tuple[str, int, int]] = []
    report = run_compose(recipe, resume=True, progress=lambda *told: heard.append(told))
    assert heard[0][0] == "base"
    assert report["steps"] == 8
    assert list(report["evaluation"]["methods"])[-1] == "gated"
    again = load_composition(tmp_path).tensors
    assert kept.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in kept.items())


def test_a_finished_run_is_returned_as_it_is(
    pair: Pair, tmp_path: Path, evaluated: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(pair, tmp_path, "linear", evaluate=evaluated)
    first = run_compose(recipe)
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()}
    monkeypatch.setattr(compose, "load_backbone", lambda *_: pytest.fail("the base was loaded again"))
    again = run_compose(recipe, resume=True)
    assert isinstance(again, ComposeReport)
    assert again == json.loads(json.dumps(first))
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()} == before


def test_a_finished_run_shows_its_table_again(
    pair: Pair, tmp_path: Path, evaluated: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of(pair, tmp_path, "linear", evaluate=evaluated)
    run_compose(recipe).show()
    first = capsys.readouterr().out
    run_compose(recipe, resume=True).show()
    again = capsys.readouterr().out
    assert again.startswith("| exact_match (%) | base |")
    assert first.startswith(again)  # without the intervals


def test_what_is_wrong_with_the_examples_to_score_shows_before_anything_is_learned(
    pair: Pair, tmp_path: Path, evaluated: dict[str, Any]
) -> None:
    missing = {**evaluated, "data": {"suite": "jsonl", "files": {"up": str(tmp_path / "none.jsonl")}}}
    with pytest.raises(UsageError, match=r"none\.jsonl"):
        run_compose(recipe_of(pair, tmp_path / "run", "gated", evaluate=missing))
    assert not (tmp_path / "run").exists()


def test_a_finished_run_of_another_recipe_is_not_resumed(pair: Pair, tmp_path: Path) -> None:
    run_compose(recipe_of(pair, tmp_path, "linear"))
    with pytest.raises(UsageError) as caught:
        run_compose(recipe_of(pair, tmp_path, "nla"), resume=True)
    assert str(caught.value) == (
        f"--resume {tmp_path}: the run there is finished, and it had another recipe. "
        "Choose another --output, or start again with --overwrite."
    )
    assert caught.value.exit_code == 2


def test_without_examples_nothing_is_loaded(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    monkeypatch.setattr(compose, "load_backbone", lambda *_: pytest.fail("the base was loaded"))
    with pytest.raises(UsageError) as caught:
        run_compose(recipe_of(pair, tmp_path / "run", "gated", data={"files": [str(empty)]}))
    assert str(caught.value) == f'{empty}: holds no examples. Write one {{"input": ..., "target": ...}} per line.'
