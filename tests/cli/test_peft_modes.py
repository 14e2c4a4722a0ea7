"""`arrow` and `xlora` through the program: composed, scored, sampled, and refused with a message and a code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Mole = Callable[..., Any]


@pytest.fixture(scope="module")
def job(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_folder: Callable[..., Path],
    make_tiny: Callable[..., Any],
    make_peft_adapter: Callable[..., Path],
    write_jsonl: Callable[..., Path],
) -> Callable[..., list[str]]:
    """`job("compose")` -> a short run of that command on a tiny Llama and two LoRAs of ranks 4 and 2."""
    folder, model = tmp_path_factory.mktemp("peft_modes"), make_tiny("llama").model
    ranks = {"a": 4, "b": 2}
    loras = [f"{name}={make_peft_adapter(model, folder / name, seed=rank, rank=rank)}" for name, rank in ranks.items()]
    data = write_jsonl(folder / "words.jsonl", [("a b", "b a"), ("c d", "d c"), ("e", "e")])

    def line(command: str, *more: Any) -> list[str]:
        short = ("--steps", "2", "--batch-size", "2", "--no-evaluate") if command == "compose" else ("--bootstrap", "0")
        shared = ("--base", tiny_folder("llama"), "--loras", ",".join(loras), "--files", data, "--device", "cpu")
        return [str(part) for part in (command, *shared, *short, *more)]

    return line


@pytest.mark.parametrize("mode", ["arrow", "xlora"])
def test_compose_evaluate_and_sample(mole: Mole, job: Callable[..., list[str]], mode: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert mole(*job("compose", "--mode", mode, "--output", run)).code == 0
    scored = mole(*job("evaluate", run, "--modes", "arrow", "--mask", "b", "--output", tmp_path / "out"))
    assert scored.code == 0, scored.err
    assert "| arrow without b | run without b |" in scored.out
    texts = [mole("sample", run, "--prompt", "a b", "--max-new-tokens", "3", "--only", "a") for _ in range(2)]
    assert texts[0].code == 0, texts[0].err
    assert texts[0].out == texts[1].out


def test_the_plan(mole: Mole, job: Callable[..., list[str]], tmp_path: Path) -> None:
    ran = mole(*job("compose", "--mode", "xlora", "--output", tmp_path / "run", "--dry-run", "--json"))
    plan = json.loads(ran.out)
    assert (plan["sites"], plan["trained_parameters"], plan["passes"]["train"]) == (1, 2 * 33, 4)
    assert plan["recipe"]["train"]["lr"] == 1e-3
    named = mole(*job("compose", "--mode", "xlora", "--lr", "0.5", "--output", tmp_path / "run", "--dry-run", "--json"))
    assert json.loads(named.out)["recipe"]["train"]["lr"] == 0.5
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--mode", "arrow", "--set", "method.top_k=3"), "method.top_k: 3 is more than the 2 LoRAs. Lower it."),
        (("--mode", "xlora", "--set", "method.top_k=3"), "method.top_k: 3 is more than the 2 LoRAs. Lower it."),
        (
            ("--mode", "xlora", "--top-k", "1"),
            "gate: mode xlora has no gates; PEFT routes as `method` says. Leave it out.",
        ),
        (
            ("--mode", "xlora", "--set", "method.xlora_depth=0"),
            "--set: method.xlora_depth is 0; it must be at least 1. Write for example method.xlora_depth: 1.",
        ),
    ],
)
def test_settings_that_cannot_be(
    mole: Mole, job: Callable[..., list[str]], flags: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    ran = mole(*job("compose", *flags, "--output", tmp_path / "run"))
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == f"mole: {message}\n"
    assert not (tmp_path / "run").exists()


def test_an_encoder_decoder_has_no_xlora(mole: Mole, gated_folder: Any, tmp_path: Path) -> None:
    loras = ",".join(f"{name}={path}" for name, path in gated_folder.loras.items())
    files = ("--base", gated_folder.base, "--loras", loras, "--files", gated_folder.data)
    ran = mole("compose", *files, "--mode", "xlora", "--output", tmp_path / "run")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == (
        "mole: --mode xlora: PEFT's X-LoRA reads the last hidden states of a decoder-only model, and the base is an "
        "encoder-decoder. Use --mode gated.\n"
    )
    assert mole("compose", *files, "--mode", "arrow", "--no-evaluate", "--output", tmp_path / "run").code == 0


@pytest.mark.parametrize(
    ("command", "flags", "where"),
    [
        ("compose", ("--mode", "arrow"), "--mode arrow"),
        ("compose", ("--mode", "xlora"), "--mode xlora"),
        ("compose", ("--mode", "linear", "--preview", "nla,arrow"), "--preview arrow"),
        ("evaluate", ("--modes", "base,arrow"), "--modes arrow"),
        ("sample", ("--modes", "arrow", "--prompt", "a cat"), "--mode arrow"),
    ],
)
def test_a_pipeline_has_neither(
    mole: Mole, picture_world: Any, command: str, flags: tuple[str, ...], where: str, tmp_path: Path
) -> None:
    named = ("--base", str(picture_world.base), "--loras", picture_world.named("cat", "hat"), "--device", "cpu")
    ran = mole(command, *named, *flags, "--output", tmp_path / "run")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == (
        f"mole: {where}: PEFT routes only in language models, and the base is a diffusion pipeline. "
        "Write gated, linear or another mode for a diffusion pipeline.\n"
    )


def test_a_language_models_xlora_is_no_fixed_mode(mole: Mole, job: Callable[..., list[str]], tmp_path: Path) -> None:
    ran = mole(*job("evaluate", "--modes", "xlora", "--output", tmp_path / "run"))
    assert (ran.code, ran.out) == (2, "")
    assert "'xlora', not one of base, single, linear" in ran.err
