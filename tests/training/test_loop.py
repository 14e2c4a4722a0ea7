"""The training loop: what it computes, on any number of processes, and what survives a kill."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toy import Toy, toy_examples, toy_settings, train_toy

from molecli.errors import RunError, UsageError
from molecli.training.checkpoints import newest_step
from molecli.training.examples import Batches
from molecli.training.loop import StepLoss, learning_rate
from molecli.training.ranks import StepContext, accelerator_for

WORKER = Path(__file__).parents[1] / "helpers" / "toy.py"


def parameters_of(toy: Toy) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in toy.named_parameters()}


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]


def worker(folder: Path, *options: str, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    root = str(WORKER.parents[2])
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root, **(env or {})}
    return subprocess.Popen([sys.executable, str(WORKER), str(folder), *options], env=variables)


# -- what is computed --------------------------------------------------------------------------------------------------


def test_training_equals_a_plain_loop_over_the_same_batches(tmp_path: Path) -> None:
    toy, plain, settings = Toy(), Toy(), toy_settings()
    train_toy(tmp_path, toy)
    optimizer = torch.optim.AdamW(plain.parameters(), weight_decay=0.0)
    batches = Batches(toy_examples(), batch_size=4, seed=3)
    for step in range(1, 9):
        loss = plain.loss(batches[step], StepContext(step, accelerator_for("cpu")))
        optimizer.zero_grad()
        (loss.sum / loss.count + loss.regulariser).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate(step, settings)
        optimizer.step()
    torch.testing.assert_close(parameters_of(toy), parameters_of(plain), rtol=0, atol=1e-6)


def test_micro_batches_give_the_same_task_gradient(tmp_path: Path) -> None:
    whole, pieces = Toy(), Toy()
    for toy, micro in ((whole, None), (pieces, 1)):
        loss_fn = lambda examples, context, toy=toy: toy.loss(examples, context, balance=0.0)  # noqa: E731
        train_toy(tmp_path / str(micro), toy, settings=toy_settings(micro_batch_size=micro), loss_fn=loss_fn)
    torch.testing.assert_close(parameters_of(whole), parameters_of(pieces), rtol=0, atol=1e-6)


def test_the_regulariser_moves_the_parameters(tmp_path: Path) -> None:
    with_balance, without = Toy(), Toy()
    train_toy(tmp_path / "a", with_balance)
    train_toy(tmp_path / "b", without, loss_fn=lambda e, c: without.loss(e, c, balance=0.0))
    assert not torch.allclose(with_balance.gate.weight, without.gate.weight, atol=1e-4)


def test_a_regulariser_may_be_a_function(tmp_path: Path) -> None:
    plain, called = Toy(), Toy()

    def loss(examples: Any, context: Any) -> StepLoss:
        result = called.loss(examples, context)
        return StepLoss(result.sum, result.count, result.extras, lambda: result.regulariser)

    train_toy(tmp_path / "a", plain)
    train_toy(tmp_path / "b", called, loss_fn=loss)
    torch.testing.assert_close(parameters_of(plain), parameters_of(called), rtol=0, atol=0)


def test_training_lowers_the_loss_and_logs_every_step_once(tmp_path: Path) -> None:
    history = train_toy(tmp_path, Toy(), settings=toy_settings(steps=30, lr=0.05))
    assert history == log_of(tmp_path)
    assert [record["step"] for record in history] == list(range(1, 31))
    assert {"loss", "lr", "grad_norm", "count", "regulariser", "entropy"} <= set(history[0])
    first, last = history[:5], history[-5:]
    assert sum(r["loss"] for r in last) < sum(r["loss"] for r in first)


def test_what_on_step_returns_joins_the_record_and_progress_hears_every_step(tmp_path: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    history = train_toy(
        tmp_path,
        Toy(),
        on_step=lambda step: {"validation": step / 2} if step % 4 == 0 else None,
        progress=lambda label, step, steps: heard.append((label, step, steps)),
    )
    assert [r["validation"] for r in history if "validation" in r] == [2.0, 4.0]
    assert heard == [("training", step, 8) for step in range(1, 9)]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_learning_rate_warms_up_to_its_peak_and_never_rises_after(schedule: str) -> None:
    settings = toy_settings(steps=20, warmup_steps=5, schedule=schedule, lr=1.0)
    rates = [learning_rate(step, settings) for step in range(1, 21)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5] == pytest.approx(1.0)
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[4:]))
    assert rates[-1] > 0


# -- two processes -----------------------------------------------------------------------------------------------------


def test_two_processes_train_what_one_trains(tmp_path: Path) -> None:
    # The balance loss is over a micro batch of all ranks: two ranks with one example each match one rank with two.
    alone = Toy()
    history = train_toy(tmp_path / "one", alone, settings=toy_settings(micro_batch_size=2))
    run_pair(tmp_path / "two", "--micro", "1")
    together = load_file(tmp_path / "two/result.safetensors")
    torch.testing.assert_close(together, parameters_of(alone), rtol=0, atol=1e-6)
    for expected, record in zip(history, log_of(tmp_path / "two"), strict=True):
        assert record == pytest.approx(expected, rel=1e-4, abs=1e-6)


def run_pair(folder: Path, *options: str) -> None:
    """Two ranks on gloo, with the variables that `accelerate launch` sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    ranks = [worker(folder, *options, env={**shared, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(2)]
    try:
        assert [rank.wait(90) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()


def test_a_batch_that_does_not_divide_by_the_processes_is_refused(tmp_path: Path) -> None:
    class Five:
        num_processes = 5

    with pytest.raises(UsageError) as caught:
        train_toy(tmp_path, Toy(), accelerator=Five())
    assert str(caught.value) == (
        "train.batch_size: 4 examples cannot be shared equally by 5 processes. Write a multiple of 5."
    )


# -- killed, interrupted, resumed --------------------------------------------------------------------------------------


def test_a_run_killed_at_any_step_and_resumed_ends_bit_identical(tmp_path: Path) -> None:
    whole, options = Toy(dropout=0.1), ["--steps", "40", "--pause", "0.02", "--dropout", "0.1"]
    history = train_toy(tmp_path / "whole", whole, settings=toy_settings(steps=40))
    killed = worker(tmp_path / "killed", *options)
    deadline = time.monotonic() + 60
    while (newest_step(tmp_path / "killed") or 0) < 9 and time.monotonic() < deadline:
        time.sleep(0.005)
    # Anywhere between two checkpoints: in a forward, an update or a write.
    time.sleep(0.001 * (os.getpid() % 60))
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed/result.safetensors").exists()
    assert worker(tmp_path / "killed", *options, "--resume").wait(60) == 0
    resumed = load_file(tmp_path / "killed/result.safetensors")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in parameters_of(whole).items())
    assert log_of(tmp_path / "killed") == history


def test_resuming_from_every_step_ends_bit_identical(tmp_path: Path) -> None:
    whole = Toy(dropout=0.2)
    train_toy(tmp_path / "whole", whole)
    for stop in range(1, 9):
        toy, folder = Toy(dropout=0.2), tmp_path / str(stop)

        def interrupt(step: int, stop: int = stop) -> None:
            if step == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train_toy(folder, toy, on_step=interrupt)
        assert newest_step(folder) == stop
        resumed = Toy(dropout=0.2)
        train_toy(folder, resumed, resume=True)
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
        assert log_of(folder) == log_of(tmp_path / "whole")


def test_an_interrupt_inside_a_forward_keeps_the_steps_before_it(tmp_path: Path) -> None:
    toy = Toy()

    def loss(examples: Any, context: Any) -> StepLoss:
        if context.step == 6:
            raise KeyboardInterrupt
        return toy.loss(examples, context)

    with pytest.raises(KeyboardInterrupt):
        train_toy(tmp_path, toy, loss_fn=loss)
    assert newest_step(tmp_path) == 5
    assert [record["step"] for record in log_of(tmp_path)] == [1, 2, 3, 4, 5]


def test_ctrl_c_during_the_update_waits_for_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    update = torch.optim.AdamW.step

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.param_groups[0]["lr"] == learning_rate(4, toy_settings()):
            signal.raise_signal(signal.SIGINT)
        return update(self, *args, **kwargs)

    whole = Toy()
    train_toy(tmp_path / "whole", whole)
    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_toy(tmp_path / "cut", Toy())
    monkeypatch.undo()
    resumed = Toy()
    train_toy(tmp_path / "cut", resumed, resume=True)
    assert torch.equal(whole.gate.weight, resumed.gate.weight)


def test_a_log_line_cut_by_a_kill_is_dropped_on_resume(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train_toy(tmp_path, Toy(), on_step=_interrupt_at(5))
    with (tmp_path / "train_log.jsonl").open("a") as log:
        log.write('{"step": 6, "lr": 0.01}\n{"step": 7, "lo')
    train_toy(tmp_path, Toy(), resume=True)
    assert [record["step"] for record in log_of(tmp_path)] == list(range(1, 9))


def test_without_resume_a_run_starts_afresh(tmp_path: Path) -> None:
    train_toy(tmp_path, Toy())
    train_toy(tmp_path, Toy(), settings=toy_settings(steps=2))
    assert newest_step(tmp_path) == 2
    assert [record["step"] for record in log_of(tmp_path)] == [1, 2]


def test_resuming_another_run_is_refused_and_says_what_differs(tmp_path: Path) -> None:
    train_toy(tmp_path, Toy())
    with pytest.raises(UsageError) as caught:
        train_toy(tmp_path, Toy(), settings=toy_settings(lr=0.02), resume=True)
    assert str(caught.value) == (
        f"--resume {tmp_path}: train.lr is 0.02 now and was 0.01 when step 8 was saved. "
        "Restore that setting, or start again with --overwrite."
    )
    with pytest.raises(UsageError, match="hash of the training data is"):
        train_toy(tmp_path, Toy(), examples=toy_examples(19), resume=True)


def _interrupt_at(stop: int) -> Any:
    def interrupt(step: int) -> None:
        if step == stop:
            raise KeyboardInterrupt

    return interrupt


# -- failures ----------------------------------------------------------------------------------------------------------


def test_a_parameter_without_gradient_is_an_error_that_names_it(tmp_path: Path) -> None:
    toy = Toy()
    unused = dict(toy.named_parameters()) | {"unused": torch.nn.Parameter(torch.ones(2))}
    with pytest.raises(RunError) as caught:
        train_toy(tmp_path, toy, parameters=unused)
    assert str(caught.value) == (
        "train step 1: no gradient reaches unused: training would not change it. "
        "Check that it is used by the model and that targets are not empty."
    )


def test_a_parameter_may_be_exempt_from_the_gradient_check(tmp_path: Path) -> None:
    toy = Toy()
    unused = dict(toy.named_parameters()) | {"unused": torch.nn.Parameter(torch.ones(2))}
    train_toy(tmp_path / "a", toy, parameters=unused, unchecked=["unused"])
    train_toy(tmp_path / "b", toy, parameters=unused, gradient_check="any")


def test_a_loss_that_is_not_finite_is_an_error_and_spoils_no_checkpoint(tmp_path: Path) -> None:
    toy = Toy()

    def loss(examples: Any, context: Any) -> StepLoss:
        result = toy.loss(examples, context)
        return StepLoss(result.sum * (math.nan if context.step == 5 else 1.0), result.count)

    with pytest.raises(RunError) as caught:
        train_toy(tmp_path, toy, loss_fn=loss)
    assert str(caught.value) == (
        "train step 5: the loss is nan. Lower train.lr (now 0.01), lengthen train.warmup_steps or use "
        "--dtype float32. The checkpoint of step 3 is kept."
    )
    assert newest_step(tmp_path) == 3


def test_a_batch_without_scored_tokens_is_an_error(tmp_path: Path) -> None:
    toy = Toy()
    with pytest.raises(RunError, match="train step 1: the batch has no scored token"):
        train_toy(tmp_path, toy, loss_fn=lambda e, c: StepLoss(toy.loss(e, c).sum * 1.0, 0))


def test_running_out_of_memory_says_what_to_write(tmp_path: Path) -> None:
    def loss(examples: Any, context: Any) -> StepLoss:
        raise torch.OutOfMemoryError

    with pytest.raises(RunError) as caught:
        train_toy(tmp_path, Toy(), loss_fn=loss)
    assert str(caught.value) == (
        "train step 1: 4 examples at once do not fit in memory. Write --set train.micro_batch_size=2."
    )


def test_training_without_examples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        train_toy(tmp_path, Toy(), examples=[])
    assert str(caught.value) == ("data: there are no training examples. Give a training file with at least one line.")


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(UsageError, match="--device tpu: no such device"):
        accelerator_for("tpu")
