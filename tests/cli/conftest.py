"""`mole(...)` runs one command line in this process; `gated_folder` is a composition of two LoRAs on a tiny T5."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest


class Ran(NamedTuple):
    """What a command line left: its exit code and its two streams."""

    code: int
    out: str
    err: str


class Composed(NamedTuple):
    """A composition and what it was made of."""

    folder: Path
    base: Path
    loras: dict[str, Path]
    data: Path


@pytest.fixture
def mole(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """`mole("compose", "--json")` -> what the program did."""
    from molecli.cli.app import run

    def call(*arguments: str) -> Ran:
        capfd.readouterr()
        code = run([str(argument) for argument in arguments])
        return Ran(code, *capfd.readouterr())

    return call


@pytest.fixture(scope="session")
def write_jsonl() -> Callable[[Path, Sequence[tuple[str, str]]], Path]:
    """`write_jsonl(path, [(input, target), ...])` -> the path."""
    import json

    def write(path: Path, rows: Sequence[tuple[str, str]]) -> Path:
        path.write_text("".join(json.dumps({"input": i, "target": t}) + "\n" for i, t in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def gated_folder(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_folder: Callable[..., Path],
    make_tiny: Callable[..., Any],
    make_peft_adapter: Callable[..., Path],
    write_jsonl: Callable[..., Path],
) -> Composed:
    """A saved gated composition whose gates are not uniform, with a training log beside it."""
    import torch

    from molecli.catalog.methods import get_method
    from molecli.config import dump_recipe, load_recipe
    from molecli.files.composition import Composition, record_of, save_composition
    from molecli.functional.fingerprint import fingerprint
    from molecli.mixture.attach import attach

    root = tmp_path_factory.mktemp("composed")
    base, tiny = tiny_folder("t5"), make_tiny("t5")
    loras = {name: make_peft_adapter(tiny.model, root / name, seed=i + 1) for i, name in enumerate("ab")}
    data = write_jsonl(root / "words.jsonl", [("a b", "b a"), ("c d", "d c"), ("e", "e")])
    recipe = load_recipe(
        None,
        "compose",
        {
            "base.id": str(base),
            "loras": [f"{name}={path}" for name, path in loras.items()],
            "gate.granularity": "block",
            "data": {"suite": "jsonl", "files": {"words": str(data)}},
            "output": str(root / "run"),
        },
    )
    mixture = attach(tiny.model, loras=loras, mode="gated", gate=recipe.gate)  # type: ignore[union-attr]
    with torch.no_grad():
        torch.manual_seed(0)
        for parameter in mixture.named_parameters().values():
            parameter.add_(torch.randn_like(parameter))
    composition = Composition(
        mode="gated",
        level=get_method("gated").level,
        base=str(base),
        base_fingerprint=fingerprint(tiny.model),
        experts=tuple(record_of(expert) for expert in mixture.bank.experts),
        gate=recipe.gate.model_dump(mode="json"),  # type: ignore[union-attr]
        settings={},
        recipe=dump_recipe(recipe),
        tensors=mixture.state_dict(),
    )
    save_composition(root / "run", composition)
    log = '{"step": 1, "loss": 2.0, "entropy": 0.69}\n{"step": 2, "loss": 1.0, "entropy": 0.40}\n'
    (root / "run" / "train_log.jsonl").write_text(log)
    return Composed(root / "run", base, loras, data)
