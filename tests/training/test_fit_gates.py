"""Learning the gates: they find the right LoRA, nothing else moves, and neither a kill nor a second process shows."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pair
import pytest
import torch
from pair import GATE, NAMES, Pair, make_pair
from safetensors.torch import load_file
from torch import Tensor

from molecli.bases.loading import load_backbone
from molecli.commands.compose import run_compose
from molecli.config import ComposeRecipe, GateConfig, TrainConfig
from molecli.errors import RunError
from molecli.mixture.attach import read_experts
from molecli.mixture.build import build_mixture
from molecli.mixture.mixture import Mixture
from molecli.protocols import Backbone, Example
from molecli.training.checkpoints import newest_step
from molecli.training.examples import Batches
from molecli.training.fit_gates import CALIBRATION_BATCHES, calibrate, fit

WORKER = Path(pair.__file__)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[..., Path]) -> Callable[[str], Pair]:
    made: dict[str, Pair] = {}

    def get(kind: str) -> Pair:
        if kind not in made:
            made[kind] = make_pair(tiny_folder(kind), tmp_path_factory.mktemp(f"pair-{kind}"))
        return made[kind]

    return get


@pytest.fixture
def live(pairs: Callable[[str], Pair]) -> Callable[..., tuple[Backbone, Mixture]]:
    """`live(kind, mode=..., **gate)` -> a backbone with the pair of LoRAs on it, not attached yet."""

    def build(kind: str, *, mode: str = "gated", **gate: Any) -> tuple[Backbone, Mixture]:
        recipe = pairs(kind).recipe("unused")
        backbone = load_backbone(recipe.base, "cpu")
        experts = read_experts(backbone.model, recipe.loras)
        return backbone, build_mixture(backbone.model, experts, mode=mode, gate=GateConfig(**(GATE | gate)))

    return build


def settings(**changes: Any) -> TrainConfig:
    values = {"steps": 4, "batch_size": 8, "lr": 0.02, "warmup_steps": 0, "balance": 0.01, "checkpoint_every": 100}
    return TrainConfig(**(values | changes))


def log_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]


def loss_of(backbone: Backbone, examples: list[Example]) -> float:
    with torch.no_grad():
        total, count = backbone.example_loss(backbone.collate(examples))
    return float(total / count)


# -- what is learned ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_gates_learn_which_lora_each_prompt_needs(
    kind: str, live: Callable[..., tuple[Backbone, Mixture]], tmp_path: Path
) -> None:
    backbone, mixture = live(kind, granularity="block")
    with mixture:
        history = fit(backbone, mixture, pair.examples(), settings(steps=40, balance=0.01), seed=0, folder=tmp_path)
        assert history[0]["entropy"] == pytest.approx(math.log(2), rel=1e-5)
        assert history[-1]["entropy"] < 0.7 * math.log(2)
        assert history[-1]["loss"] < 0.5 * history[0]["loss"]
        for name in NAMES:
            wanted = [example for example in pair.examples() if example.task == name]
            said = backbone.generate([example.prompt for example in wanted], max_new_tokens=3)
            assert said == [example.target for example in wanted]
            gates = torch.stack(list(mixture.gates().values())).mean(0)[:, NAMES.index(name)]
            assert float(gates.min()) > 0.6, (name, gates)
        learned = loss_of(backbone, pair.examples())
    assert learned < 0.5 * history[0]["loss"]


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_the_first_step_starts_at_the_normalised_sum(
    kind: str, live: Callable[..., tuple[Backbone, Mixture]], tmp_path: Path
) -> None:
    backbone, fixed = live(kind, mode="nla")
    base = loss_of(backbone, pair.examples())
    with fixed:
        even = loss_of(backbone, pair.examples())
    backbone, mixture = live(kind)
    with mixture:
        history = fit(backbone, mixture, pair.examples(), settings(steps=1), seed=0, folder=tmp_path)
    assert history[0]["loss"] == pytest.approx(even, rel=1e-5)
    assert abs(even - base) > 0.1


def test_every_step_is_logged_with_the_entropy_and_each_experts_share(
    live: Callable[..., tuple[Backbone, Mixture]], tmp_path: Path
) -> None:
    backbone, mixture = live("llama")
    with mixture:
        history = fit(backbone, mixture, pair.examples(), settings(), seed=0, folder=tmp_path)
    assert history == log_of(tmp_path)
    assert [record["step"] for record in history] == [1, 2, 3, 4]
    for record in history:
        assert {"loss", "lr", "grad_norm", "regulariser", "entropy", "gate/up", "gate/down"} <= set(record)
        assert record["gate/up"] + record["gate/down"] == pytest.approx(1.0, abs=1e-5)
        q = torch.tensor([record["gate/up"], record["gate/down"]])
        assert record["regulariser"] == pytest.approx(float(-0.01 * q.log().sum()), rel=1e-4)


def test_only_the_gates_change(live: Callable[..., tuple[Backbone, Mixture]], tmp_path: Path) -> None:
    backbone, mixture = live("t5")
    weights = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    factors = [(f.A.clone(), f.B.clone()) for expert in mixture.bank.experts for f in expert.factors.values()]
    gates = {name: parameter.detach().clone() for name, parameter in mixture.named_parameters().items()}
    with mixture:
        fit(backbone, mixture, pair.examples(), settings(), seed=0, folder=tmp_path)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in backbone.model.state_dict().items())
    now = [factor for expert in mixture.bank.experts for factor in expert.factors.values()]
    assert all(torch.equal(f.A, A) and torch.equal(f.B, B) for f, (A, B) in zip(now, factors, strict=True))
    assert all(not torch.equal(parameter, gates[name]) for name, parameter in mixture.named_parameters().items())
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())


def test_the_temperature_moves_once_the_gates_differ(
    live: Callable[..., tuple[Backbone, Mixture]], tmp_path: Path
) -> None:
    for steps, moved in ((1, False), (2, True)):
        backbone, mixture = live("llama", temperature=0.5)
        with mixture:
            fit(backbone, mixture, pair.examples(), settings(steps=steps), seed=0, folder=tmp_path / str(steps))
        taus = [p.detach() for name, p in mixture.named_parameters().items() if name.endswith("log_temperature")]
        assert taus
        assert all((float(tau) != pytest.approx(math.log(0.5), abs=1e-6)) == moved for tau in taus)


def test_a_temperature_that_is_not_learned_stays(live: Callable[..., tuple[Backbone, Mixture]], tmp_path: Path) -> None:
    backbone, mixture = live("llama", temperature=0.5, learn_temperature=False)
    assert not any(name.endswith("log_temperature") for name in mixture.named_parameters())
    with mixture:
        fit(backbone, mixture, pair.examples(), settings(steps=2), seed=0, folder=tmp_path)
    kept = [t for name, t in mixture.state_dict().items() if name.endswith("log_temperature")]
    assert kept
    assert all(float(t) == pytest.approx(math.log(0.5)) for t in kept)


def test_the_balance_loss_keeps_the_experts_in_use(
    live: Callable[..., tuple[Backbone, Mixture]], tmp_path: Path
) -> None:
    one_sided = [example for example in pair.examples() if example.task == "up"]
    shares = {}
    for balance in (0.0, 1.0):
        backbone, mixture = live("llama", input="none")
        with mixture:
            history = fit(
                backbone, mixture, one_sided, settings(steps=20, batch_size=4, lr=0.1, balance=balance), seed=0,
                folder=tmp_path / str(balance),
            )  # fmt: skip
        shares[balance] = history[-1]["gate/down"]
        assert ("regulariser" in history[0]) == (balance > 0)
    assert shares[0.0] < 0.3 < shares[1.0]


def test_a_gate_that_gets_no_gradient_is_an_error_that_names_it(
    live: Callable[..., tuple[Backbone, Mixture]], tmp_path: Path
) -> None:
    # With one expert kept its weight is 1 whatever the logits are: there is nothing to learn from.
    backbone, mixture = live("llama", granularity="network", input="none")
    mixture.only("up")
    with mixture, pytest.raises(RunError) as caught:
        fit(backbone, mixture, pair.examples(), settings(balance=0.0), seed=0, folder=tmp_path)
    assert str(caught.value) == (
        "train step 1: no gradient reaches site/network/logits: training would not change it. "
        "Check that it is used by the model and that targets are not empty."
    )


# -- calibration -------------------------------------------------------------------------------------------------------


def seen(backbone: Backbone, mixture: Mixture, batches: list[list[Example]]) -> dict[str, Tensor]:
    """What each gate reads of the batches, row by row, before it is standardised."""
    rows: dict[str, list[Tensor]] = {}
    gates: dict[str, Any] = dict(mixture.gate_modules())
    handles = [
        gate.register_forward_pre_hook(
            lambda module, args, name=name: rows.setdefault(name, []).append(module.features(args[0]).detach())
        )
        for name, gate in gates.items()
    ]
    with torch.no_grad():
        for batch in batches:
            backbone.example_loss(backbone.collate(batch))
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts).double() for name, parts in rows.items()}


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_gates_standardise_with_the_mean_and_spread_of_the_first_batches(
    kind: str, live: Callable[..., tuple[Backbone, Mixture]]
) -> None:
    backbone, mixture = live(kind, granularity="block")
    batches = Batches(pair.examples(), batch_size=2, seed=1)
    base = loss_of(backbone, pair.examples())
    with mixture:
        assert abs(loss_of(backbone, pair.examples()) - base) > 0.1
        rows = seen(backbone, mixture, [batches[step] for step in range(1, 5)])  # 8 examples: one epoch
        calibrate(backbone, mixture, batches)
    assert rows.keys() == mixture.gate_modules().keys()
    for name, gate in mixture.gate_modules().items():
        spread = rows[name].std(0, correction=0)
        floor = 1e-3 * spread.mean() + 1e-8
        torch.testing.assert_close(gate.mean.double(), rows[name].mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gate.std.double(), spread.clamp_min(float(floor)), rtol=1e-3, atol=1e-4)
        assert float(gate.std.max()) > 0.01


def test_a_random_start_changes_nothing_of_what_gates_standardise_with(
    live: Callable[..., tuple[Backbone, Mixture]],
) -> None:
    measured = []
    for init_std in (0.0, 3.0):
        backbone, mixture = live("llama", granularity="layer", init_std=init_std)
        with mixture:
            calibrate(backbone, mixture, Batches(pair.examples(), batch_size=2, seed=1))
        measured.append([(gate.mean, gate.std) for gate in mixture.gate_modules().values()])
    for even, drawn in zip(*measured, strict=True):
        assert torch.equal(even[0], drawn[0])
        assert torch.equal(even[1], drawn[1])


def test_calibration_reads_a_few_batches_and_no_more_than_an_epoch(
    live: Callable[..., tuple[Backbone, Mixture]],
) -> None:
    class Counted(Batches):
        asked: list[int]

        def __getitem__(self, step: int) -> list[Example]:
            self.asked.append(step)
            return super().__getitem__(step)

    backbone, mixture = live("llama")
    many = pair.examples() * 8
    with mixture:
        for size, steps in ((3, CALIBRATION_BATCHES), (40, 2), (64, 1)):
            batches = Counted(many, batch_size=size, seed=0)
            batches.asked = []
            calibrate(backbone, mixture, batches)
            assert batches.asked == list(range(1, steps + 1))


# -- killed, and shared out --------------------------------------------------------------------------------------------


def worker(recipe: ComposeRecipe, *options: str, **env: str) -> subprocess.Popen[bytes]:
    folder = Path(recipe.output)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder.with_suffix(".json")
    file.write_text(recipe.model_dump_json())
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[2]), **env}
    return subprocess.Popen([sys.executable, str(WORKER), str(file), *options], env=variables)


def gates_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "composition.safetensors")


def test_a_run_killed_at_any_step_and_resumed_writes_the_same_bits(
    pairs: Callable[[str], Pair], tmp_path: Path
) -> None:
    llama = pairs("llama")
    changes = {"train": {"steps": 14, "checkpoint_every": 2}, "gate": {"granularity": "layer", "head": "low_rank"}}
    run_compose(llama.recipe(tmp_path / "whole", **changes))
    recipe, folder = llama.recipe(tmp_path / "cut", **changes), tmp_path / "cut"
    killed = worker(recipe, "--pause", "0.05")
    deadline = time.monotonic() + 90
    while (newest_step(folder) or 0) < 4 and time.monotonic() < deadline and killed.poll() is None:
        time.sleep(0.005)
    time.sleep(0.002 * (os.getpid() % 60))  # anywhere between two checkpoints
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (folder / "composition.safetensors").exists()
    assert 4 <= (newest_step(folder) or 0) < 14
    run_compose(recipe, resume=True)
    whole, resumed = gates_of(tmp_path / "whole"), gates_of(folder)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    assert log_of(folder) == log_of(tmp_path / "whole")


def test_two_processes_learn_the_gates_that_one_learns(pairs: Callable[[str], Pair], tmp_path: Path) -> None:
    llama, (one, two) = pairs("llama"), (tmp_path / "one", tmp_path / "two")
    changes: dict[str, Any] = {"train": {"steps": 5}, "gate": {"granularity": "layer"}}
    run_compose(llama.recipe(one, **changes))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    recipe = llama.recipe(two, **changes)
    ranks = [
        worker(recipe, "--calibration", str(tmp_path), RANK=str(rank), LOCAL_RANK=str(rank), **shared)
        for rank in range(2)
    ]
    try:
        assert [rank.wait(90) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    alone, together = gates_of(one), gates_of(two)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert any(float(tensor.abs().max()) > 0.05 for name, tensor in alone.items() if name.endswith("head.weight"))
    for expected, record in zip(log_of(one), log_of(two), strict=True):
        assert record == pytest.approx(expected, rel=1e-4, abs=1e-6)
    first, second = (load_file(tmp_path / f"rank{rank}.safetensors") for rank in range(2))
    assert first.keys() == second.keys()
    assert len(first) == 8  # mean and spread at each of four layers
    assert all(torch.equal(tensor, second[name]) and torch.equal(tensor, alone[name]) for name, tensor in first.items())
