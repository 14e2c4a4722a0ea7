"""The cost of gating compared with the base, PEFT with N active adapters and PEFT's X-LoRA: time and memory.

    python benchmarks/engine_cost.py --shape smol --experts 8,32            # CPU; --layers 6 for a first look
    python benchmarks/engine_cost.py --shape engine --experts 8,32          # CUDA, bf16

Every round calls each variant once, in a rotating order. A ratio is the median over rounds of the ratio of times in the
same round, so that a slow minute of the machine affects both. Models are random, because only their shapes matter.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from engine_hosts import (
    SHAPES,
    Host,
    Shape,
    base_host,
    make_batch,
    make_experts,
    make_model,
    mole_host,
    peft_host,
    xlora_host,
)
from live_bytes import LiveBytes
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from molecli.config import GateConfig

MIB = 2**20
# (device, work, experts) -> most times the base; what issue and README promise.
TARGETS = {("cpu", "step", 8): 1.5, ("cuda", "forward", 8): 1.5, ("cuda", "forward", 32): 1.6}
XLORA_TARGET = {("cuda", "forward", 8): 8.0}


@dataclass
class Row:
    """One kind of work on one host: seconds by round, and the memory of a step in bytes."""

    host: str
    work: str
    experts: int
    floor: float
    times_s: list[float] = field(default_factory=list)
    memory: dict[str, int] | None = None


@dataclass(frozen=True)
class Bench:
    """Everything that the hosts are built from."""

    shape: Shape
    device: str
    dtype: torch.dtype
    seed: int
    model: nn.Module
    batch: dict[str, torch.Tensor]
    experts: list[Any]
    folder: Path

    def makers(self, counts: Sequence[int], args: argparse.Namespace) -> list[Callable[[], Host]]:
        """A function for each host, base first."""
        methods = args.methods.split(",")
        made: list[Callable[[], Host]] = [lambda: base_host(self.model, self.batch)]
        for n in counts:
            experts = self.experts[:n]
            for spec in args.gates.split(",") if "mole" in methods else ():
                made.append(
                    lambda e=experts, s=spec: mole_host(self.model, self.batch, e, gate_config(s), f"mole, {s}")
                )
            if "peft" in methods:
                made.append(lambda e=experts: peft_host(self.model, self.batch, e))
            if "xlora" in methods and 1 < n <= args.xlora_experts:
                for cast in (True,) if self.dtype == torch.float32 else (True, False):
                    made.append(lambda e=experts, c=cast: xlora_host(self.model, self.batch, e, self.folder, cast=c))
        return made


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The results, as written to benchmarks/results/."""
    args = parse(argv)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.threads:
        torch.set_num_threads(args.threads)
    shape = SHAPES[args.shape]
    shape = replace(shape, **{k: v for k in ("layers", "ffn", "batch", "tokens") if (v := getattr(args, k))})
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    counts = [int(n) for n in args.experts.split(",")]
    model = make_model(shape, device=device, dtype=dtype, seed=args.seed)
    batch = make_batch(shape, device=device, seed=args.seed)
    experts = make_experts(shape, max(counts), dtype=dtype, seed=args.seed)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(shape, device, dtype, args.seed, model, batch, experts, Path(folder))
        memory = measure_memory(bench, bench.makers(sorted({1, *counts}), args))
        hosts = [make() for make in bench.makers(counts, args)]
    rounds = args.rounds or (12 if device == "cuda" else 5)
    rows = time_rounds(hosts, shape, device, rounds=rounds, warmup=args.warmup)
    for key, sizes in memory.items():
        row = next((r for r in rows if (r.host, r.experts, r.work) == (*key, "step")), None)
        if row is None:
            rows.append(row := Row(key[0], "step", key[1], shape.floor(key[1])))
        row.memory = sizes
    result = describe(args, shape, device, dtype) | {"rows": [summary(row, rows, shape, device) for row in rows]}
    folder_out = Path(args.output)
    folder_out.mkdir(parents=True, exist_ok=True)
    path = folder_out / f"{args.name or 'engine_cost-' + args.shape}-{device}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print_table(result, path)
    return result


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--shape", choices=SHAPES, default="smol")
    parser.add_argument("--experts", default="8,32", help="numbers of experts")
    parser.add_argument(
        "--gates", default="layer,block", help="granularity[:pool[:input]],...; x mole compares with the first"
    )
    parser.add_argument("--methods", default="mole,peft,xlora", help="which of these beside the base")
    parser.add_argument("--xlora-experts", type=int, default=8, help="X-LoRA up to this many experts")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, help="of PyTorch on CPU")
    parser.add_argument("--rounds", type=int, help="timed rounds (CPU: 5, CUDA: 12)")
    parser.add_argument("--warmup", type=int, default=2, help="untimed rounds")
    parser.add_argument("--seed", type=int, default=0)
    for name in ("layers", "ffn", "batch", "tokens"):
        parser.add_argument(f"--{name}", type=int, help="instead of the shape's")
    parser.add_argument("--name", help="of the results file")
    parser.add_argument("--output", default=str(Path(__file__).parent / "results"), help="folder of the results file")
    return parser.parse_args(argv)


def gate_config(spec: str) -> GateConfig:
    """`granularity[:pool[:input]]` with everything else at its default."""
    fields = dict(zip(("granularity", "pool", "input"), spec.split(":"), strict=False))
    return GateConfig(**fields)  # type: ignore[arg-type]


def measure_memory(bench: Bench, makers: Sequence[Callable[[], Host]]) -> dict[tuple[str, int], dict[str, int]]:
    """{(host, experts): bytes} of one training step, each host alone on the device."""
    sizes = {}
    base = sum(p.numel() * p.element_size() for p in bench.model.parameters())
    for make in makers:
        host = make()
        if host.loss is not None:
            host.step()  # lazily made workspaces are not part of a step
            weights = {"base": base, "experts": host.extra_bytes}
            measured = _cuda_memory(host) if bench.device == "cuda" else _cpu_memory(host)
            sizes[host.name, host.experts] = weights | measured
        del host
        gc.collect()
        if bench.device == "cuda":
            torch.cuda.empty_cache()
    return sizes


def _cuda_memory(host: Host) -> dict[str, int]:
    assert host.loss is not None
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = host.loss()
    kept = torch.cuda.memory_allocated() - before
    loss.backward()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    host.clear()
    return {"kept": kept, "beyond": peak - before, "peak": peak}


def _cpu_memory(host: Host) -> dict[str, int]:
    assert host.loss is not None
    gc.collect()
    with LiveBytes() as live:
        loss = host.loss()
        kept = live.now
        loss.backward()
    host.clear()
    return {"kept": kept, "beyond": live.peak}


def time_rounds(hosts: Sequence[Host], shape: Shape, device: str, *, rounds: int, warmup: int) -> list[Row]:
    """Every work of every host, timed once per round."""
    works: list[tuple[Row, Callable[[], Any], Callable[[], Any]]] = []
    for host in hosts:
        floor = shape.floor(host.experts)
        works.append((Row(host.name, "forward", host.experts, floor), lambda: None, host.forward))
        if host.loss is not None:
            works.append((Row(host.name, "step", host.experts, floor), lambda: None, host.step))
        if not host.name.startswith("PEFT"):  # X-LoRA decodes without a cache
            decode = partial(host.decode, shape.decode_tokens)
            works.append((Row(host.name, "decode", host.experts, floor), host.prefill, decode))
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for number in range(warmup + rounds):
        gc.collect()
        start = number % len(works)
        for row, prepare, work in works[start:] + works[:start]:
            prepare()
            wait()
            began = time.perf_counter()
            work()
            wait()
            if number >= warmup:
                row.times_s.append(time.perf_counter() - began)
    return [row for row, _, _ in works]


def summary(row: Row, rows: Sequence[Row], shape: Shape, device: str) -> dict[str, Any]:
    """A row with its ratios: to the base, and (for the others) to mole's first gates with as many experts."""
    out = {key: value for key, value in vars(row).items() if key != "floor"}
    if row.work == "forward":
        out["floor"] = row.floor
    if not row.times_s:
        return out
    out["median_ms"] = 1000 * median(row.times_s)
    if row.work == "decode":
        out["tokens_per_s"] = shape.batch * shape.decode_tokens / median(row.times_s)
    base = next(r for r in rows if r.host == "base" and r.work == row.work)
    out["times_base"] = _ratio(row, base)
    key = (device, row.work, row.experts)
    if row.host.startswith("mole") and key in TARGETS:
        out["target"] = f"<= {TARGETS[key]}", out["times_base"] <= TARGETS[key]
    peers = (r for r in rows if r.work == row.work and r.experts == row.experts)
    mole = next((r for r in peers if r.host.startswith("mole")), None)
    if row.host.startswith("PEFT") and mole is not None:
        out["times_mole"] = _ratio(row, mole)
        if "X-LoRA" in row.host and key in XLORA_TARGET:
            out["target"] = f">= {XLORA_TARGET[key]} of mole", out["times_mole"] >= XLORA_TARGET[key]
    return out


def _ratio(row: Row, other: Row) -> float:
    return median(a / b for a, b in zip(row.times_s, other.times_s, strict=True))


def describe(args: argparse.Namespace, shape: Shape, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """The facts about the measurement: machine, versions, settings."""
    packages = {name: version(name) for name in ("torch", "transformers", "peft")}
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype),
        "seed": args.seed,
        "shape": {"name": args.shape, **vars(shape)},
        "versions": {"python": platform.python_version(), **packages},
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def print_table(result: dict[str, Any], path: Path) -> None:
    """One Markdown table; memory is that of a training step, in MiB."""
    console = Console(width=240)
    shape, versions = result["shape"], result["versions"]
    model = f"{shape['layers']} layers, width {shape['width']}, ffn {shape['ffn']}, vocabulary {shape['vocab']}"
    work = f"rank {shape['rank']}, {shape['batch']} x {shape['tokens']} tokens, seed {result['seed']}"
    console.print(f"{result['device']}, {result['threads']} threads, {result['dtype']}, {versions}", soft_wrap=True)
    console.print(f"{model}, {work}; raw times: {path}\n", soft_wrap=True)
    columns = ("method", "experts", "work", "ms", "tok/s", "x base", "floor", "x mole", "target")
    columns += ("base + experts MiB", "kept for backward MiB", "peak beyond weights MiB")
    table = Table(box=box.MARKDOWN)
    for column in columns:
        table.add_column(column, no_wrap=True)
    order = {"forward": 0, "step": 1, "decode": 2}
    for row in sorted(result["rows"], key=lambda r: (order[r["work"]], r["experts"], r["host"] != "base")):
        table.add_row(*_cells(row))
    console.print(table)


def _cells(row: dict[str, Any]) -> list[str]:
    work = "forward + backward" if row["work"] == "step" and row["host"] == "base" else row["work"]
    cells = [row["host"], str(row["experts"] or "-"), work]
    for key, places in (("median_ms", 1), ("tokens_per_s", 0), ("times_base", 2), ("floor", 2), ("times_mole", 1)):
        cells.append(f"{row[key]:.{places}f}" if key in row else "-")
    target, met = row.get("target", ("-", True))
    cells.append(target if target == "-" else f"{target}: {'met' if met else 'MISSED'}")
    memory = row["memory"]
    if memory is None:
        return cells + ["-"] * 3
    sizes = memory["base"] + memory["experts"], memory["kept"], memory["beyond"]
    return cells + [f"{size / MIB:.1f}" for size in sizes]


if __name__ == "__main__":
    main()
