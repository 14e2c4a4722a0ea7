"""The cost of composing LoRAs in a diffusion pipeline, compared with the base, single passes and diffusers.

    python benchmarks/image_cost.py --shape sd15                    # CUDA, bf16, 512x512
    python benchmarks/image_cost.py --shape sd15 --pixels 256       # CPU
    python benchmarks/image_cost.py --shape tiny                    # the embedded pipeline

Every round calls each method once, in a rotating order. A ratio is the median over rounds of the ratio of times in the
same round, so that a slow minute of the machine affects both. A time is that of one denoising step with guidance, by
the pipeline's own call. Models and LoRAs are random, because only their shapes matter.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from image_hosts import PARTS, Host, Work, base_host, diffusers_host, make_experts, make_work, mole_host
from image_pipelines import SHAPES, build_pipeline
from image_tables import tables
from image_training import training_steps
from live_bytes import LiveBytes
from rich.console import Console

from molecli.config import GateConfig

# What the issue promises: of the base, and of as many single passes with one LoRA.
GATED_TARGET, COMPOSITE_TARGET, SWITCH_TARGET = 1.3, 1.1, 1.05

ALWAYS = ("base", "one LoRA")  # what the ratios are of


@dataclass
class Row:
    """One method: seconds of a step by round, and bytes beyond the weights while denoising and for a whole picture."""

    method: str
    loras: int
    rank: int
    passes: int
    weights: int
    times_s: list[float] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The results, as written to the output folder."""
    began = time.perf_counter()
    args = parse(argv)
    device = args.device
    if args.threads:
        torch.set_num_threads(args.threads)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe = build_pipeline(SHAPES[args.shape], device=device, dtype=dtype, seed=args.seed)
    work = make_work(pipe, batch=args.batch, pixels=args.pixels, encode="text" in args.parts, seed=args.seed)
    with tempfile.TemporaryDirectory() as folder:
        hosts = make_hosts(pipe, args, Path(folder))
    if args.only:
        hosts = [host for host in hosts if host.name in (*ALWAYS, *args.only)]
    rows = [Row(host.name, host.loras, host.rank, host.passes, host.bytes) for host in hosts]
    for row, host in zip(rows, hosts, strict=True):
        if args.memory and (host.loras in (0, 3) or host.passes == 1):
            row.memory = picture_memory(host, work, device)
    if args.replay:
        for host in hosts:
            host.replay()
    works = [partial(host.draw, work, max(args.steps, host.steps)) for host in hosts]
    settings = {"rounds": args.rounds, "warmup": args.warmup, "clock": args.clock}
    times = time_rounds(works, device, **settings, until=began + args.seconds)
    for row, host, taken in zip(rows, hosts, times, strict=True):
        row.times_s = [seconds / max(args.steps, host.steps) for seconds in taken]
    training = time_training(hosts, args) if args.train else []
    result = describe(args, dtype) | {"rows": [summary(row, rows) for row in rows], "training": training}
    result["seconds"] = time.perf_counter() - began
    write(result, Path(args.output), f"{args.name or 'image_cost-' + args.shape}-{device}")
    return result


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with defaults that depend on the device and on --smoke."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--shape", choices=SHAPES, default="sd15")
    parser.add_argument("--pixels", type=int, help="side of the pictures, instead of the shape's")
    parser.add_argument("--batch", type=int, default=1, help="pictures; the UNet's rows are twice as many")
    parser.add_argument("--parts", default="attention", help=f"what the LoRAs adapt: some of {','.join(PARTS)}")
    parser.add_argument("--rank", type=int, default=16, help="of the LoRAs that are composed")
    parser.add_argument("--composite", default="2,3,5", help="numbers of LoRAs")
    parser.add_argument("--only", type=lambda text: text.split("; "), help="time these methods alone, as 'NAME; NAME'")
    parser.add_argument(
        "--steps",
        type=int,
        help="denoising steps of a call: two turns of switch on CUDA, one on CPU; sd15 there 1",
    )
    parser.add_argument("--rounds", type=int, help="timed rounds (CPU: 3, CUDA: 9)")
    parser.add_argument("--warmup", type=int, default=1, help="untimed rounds")
    parser.add_argument("--seconds", type=float, help="begin no further round later than this (CPU: 150, CUDA: 50)")
    parser.add_argument(
        "--replay", action=argparse.BooleanOptionalAction, help="every method from recorded steps (CUDA: yes)"
    )
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="also the memory")
    parser.add_argument("--train", action=argparse.BooleanOptionalAction, help="also a training step of gates (CUDA)")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, help="of PyTorch on CPU")
    parser.add_argument(
        "--clock", choices=("wall", "process"), default="wall", help="process: its CPU time, for a shared machine"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="one round of one step of the embedded pipeline")
    parser.add_argument("--note", default="", help="a line for the results, such as what else the machine did")
    parser.add_argument("--name", help="of the results files")
    parser.add_argument("--output", default=str(Path(__file__).parent / "results"), help="folder of the results files")
    args = parser.parse_args(argv)
    if args.smoke:
        args.shape, args.pixels, args.rounds, args.warmup, args.train = "tiny", 16, 1, 0, True
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    cuda = args.device == "cuda"
    args.pixels = args.pixels or SHAPES[args.shape].pixels
    args.parts = args.parts.split(",")
    args.composite = [int(n) for n in args.composite.split(",")]
    args.train = cuda if args.train is None else args.train
    args.replay = cuda if args.replay is None else args.replay
    # What a call costs apart from its steps is a thousandth of one such step.
    slow = 1 if args.shape == "sd15" else 3
    for key, on_cuda, on_cpu in (("steps", 6, slow), ("rounds", 9, 3), ("seconds", 50, 150)):
        setattr(args, key, getattr(args, key) or (on_cuda if cuda else on_cpu))
    return args


def make_hosts(pipe: Any, args: argparse.Namespace, folder: Path) -> list[Host]:
    """Every method that is compared, the base first."""
    small = make_experts(pipe, 1, rank=8, parts=args.parts, seed=args.seed)
    experts = make_experts(pipe, max(3, *args.composite), rank=args.rank, parts=args.parts, seed=args.seed)
    three = experts[:3]
    hosts = [base_host(pipe), mole_host(pipe, small, "one LoRA, rank 8", mode="linear")]
    hosts.append(mole_host(pipe, experts[:1], "one LoRA", mode="linear", passes=1))
    for granularity in ("layer", "block"):
        for pool in ("mean", "token"):
            gate = GateConfig(granularity=granularity, pool=pool)  # type: ignore[arg-type]
            hosts.append(mole_host(pipe, three, f"gated, {granularity}, {pool}", mode="gated", gate=gate))
    hosts.append(mole_host(pipe, three, "linear", mode="linear"))
    hosts.append(mole_host(pipe, three, "switch", mode="switch", passes=1, steps=3))
    for n in args.composite:
        for name, at_once in ((f"composite of {n}", None), (f"composite of {n}, one at once", 1)):
            hosts.append(mole_host(pipe, experts[:n], name, mode="composite", at_once=at_once, passes=n))
    hosts.append(mole_host(pipe, three, "loratorio", mode="loratorio", passes=4))
    hosts += [diffusers_host(pipe, three, folder, fused=fused) for fused in (False, True)]
    return hosts


def time_rounds(
    works: Sequence[Callable[[], Any]], device: str, *, rounds: int, warmup: int, until: float, clock: str
) -> list[list[float]]:
    """Seconds of every work in every round; only the first round can begin after `until`."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    now = time.perf_counter if clock == "wall" else time.process_time
    times: list[list[float]] = [[] for _ in works]
    for number in range(warmup + rounds):
        if number > warmup and time.perf_counter() > until:
            break
        gc.collect()
        order = [(number + i) % len(works) for i in range(len(works))]
        for i in order:
            wait()
            began = now()
            works[i]()
            wait()
            if number >= warmup:
                times[i].append(now() - began)
    return times


def picture_memory(host: Host, work: Work, device: str) -> dict[str, int]:
    """Most bytes alive beyond the weights: while denoising, and for the whole picture, VAE included."""
    found: dict[str, int] = {}
    with _peak(device) as peak:
        host.draw(work, 2, decode=True, on_step=lambda: found.update(denoising=peak()))
        found["picture"] = peak()
    return found


@contextmanager
def _peak(device: str) -> Iterator[Callable[[], int]]:
    """A function that returns the most bytes alive since this call, beyond those at this call."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        yield lambda: torch.cuda.max_memory_allocated() - before
    else:
        with LiveBytes() as live:
            yield lambda: live.peak


def time_training(hosts: Sequence[Host], args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for the base and for each of two gated hosts, with checkpointing and without; batch 2."""
    chosen = [host for host in hosts if host.name in ("base", "gated, layer, mean", "gated, block, mean")]
    steps = training_steps(chosen, batch=2, pixels=args.pixels, seed=args.seed)
    until = time.perf_counter() + args.seconds / 5
    works = list(steps.values())
    settings = {"rounds": args.rounds, "warmup": args.warmup, "clock": args.clock}
    times = time_rounds(works, args.device, **settings, until=until)
    rows: list[dict[str, Any]] = []
    for ((name, checkpointed), step), taken in zip(steps.items(), times, strict=True):
        with _peak(args.device) as peak:
            step()
            most = peak()
        base = times[list(steps).index(("base", checkpointed))]
        row = {
            "method": name,
            "checkpointed": checkpointed,
            "ms": 1000 * median(taken),
            "times_base": ratio(taken, base),
        }
        rows.append(row | {"memory": most, "times_s": taken})
    return rows


def summary(row: Row, rows: Sequence[Row]) -> dict[str, Any]:
    """A row with its ratios, to the base and to as many single passes with one LoRA, and whether targets are met."""
    base, one = rows[0], next(r for r in rows if r.method == "one LoRA")
    out: dict[str, Any] = vars(row) | {"ms": 1000 * median(row.times_s), "times_base": ratio(row.times_s, base.times_s)}
    if row.passes:
        out["times_passes"] = ratio(row.times_s, one.times_s) / row.passes
    kind, measured = row.method.split(",")[0].split(" ")[0], "times_passes"
    targets = {"gated": GATED_TARGET, "composite": COMPOSITE_TARGET, "switch": SWITCH_TARGET}
    if kind in targets:
        measured = "times_base" if kind == "gated" else measured
        out["target"] = {"of": measured, "most": targets[kind], "met": out[measured] <= targets[kind]}
    return out


def ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """The median of time by time."""
    return median(a / b for a, b in zip(times, others, strict=True))


def describe(args: argparse.Namespace, dtype: torch.dtype) -> dict[str, Any]:
    """The facts about the measurement: machine, versions, settings."""
    cuda = args.device == "cuda"
    packages = {name: version(name) for name in ("torch", "diffusers", "transformers", "peft")}
    settings = {
        key: getattr(args, key)
        for key in ("shape", "pixels", "batch", "parts", "rank", "steps", "clock", "replay", "seed", "note")
    }
    return {
        "device": torch.cuda.get_device_name() if cuda else _cpu_name(),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype)[6:],
        **settings,
        "versions": {"python": platform.python_version(), **packages},
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def write(result: dict[str, Any], folder: Path, name: str) -> None:
    """Writes the result as JSON and as Markdown, and prints the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    text = tables(result)
    (folder / f"{name}.md").write_text(text)
    Console(width=1000, soft_wrap=True).out(text, highlight=False, end="")


if __name__ == "__main__":
    main()
