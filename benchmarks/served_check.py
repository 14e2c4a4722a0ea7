"""The cost of the check after every pass that each adapted matrix was served: time with it over time without it.

    python benchmarks/served_check.py --shape smol            # CPU; --layers 6 for a first look
    python benchmarks/served_check.py --shape engine          # CUDA, bf16

Every round times both in a rotating order; a ratio is the median over rounds of the ratios of one round, with its 95%
bootstrap interval. Work: a decode step, the shortest pass there is, and a forward pass.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from engine_hosts import SHAPES, Host, make_batch, make_experts, make_model
from rich.console import Console
from rich.table import Table

from molecli.mixture.build import build_mixture
from molecli.mixture.served import Served


@contextmanager
def unchecked() -> Iterator[None]:
    """A context in which mixtures are attached without the hooks of the check."""
    with patch.object(Served, "watch", lambda _: []):
        yield


def timed(host: Host, work: str, tokens: int) -> float:
    """Seconds of one pass."""
    if work == "decode":
        host.prefill()
    _wait(host)
    start = time.perf_counter()
    host.decode(tokens) if work == "decode" else host.forward()
    _wait(host)
    return (time.perf_counter() - start) / (tokens if work == "decode" else 1)


def _wait(host: Host) -> None:
    if next(host.model.parameters()).is_cuda:
        torch.cuda.synchronize()


def ratios(host: Host, mixture: Any, work: str, tokens: int, rounds: int) -> tuple[list[float], list[float]]:
    """(time with the check over time without it, milliseconds with it), by round; the first round is a warm-up."""
    found, ms = [], []
    for turn in range(rounds + 1):
        times = {}
        for checked in (True, False) if turn % 2 else (False, True):
            if checked:
                with mixture:
                    times[checked] = timed(host, work, tokens)
            else:
                with unchecked(), mixture:
                    times[checked] = timed(host, work, tokens)
        if turn:
            found.append(times[True] / times[False])
            ms.append(1000 * times[True])
    return found, ms


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=list(SHAPES), default="smol")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(argv)
    shape = SHAPES[args.shape]
    shape = replace(shape, layers=args.layers or shape.layers)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    model = make_model(shape, device=args.device, dtype=dtype, seed=args.seed)
    batch = make_batch(shape, device=args.device, seed=args.seed)
    experts = make_experts(shape, args.experts, dtype=dtype, seed=args.seed)
    rows = []
    for mode in ("linear", "gated"):
        mixture = build_mixture(model, experts, mode=mode)
        for work in ("decode", "forward"):
            found, ms = ratios(Host(mode, args.experts, model, batch), mixture, work, shape.decode_tokens, args.rounds)
            drawn = np.random.default_rng(args.seed).choice(found, (2000, len(found)))
            low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
            ratio = float(np.median(found))
            rows.append(
                {"mode": mode, "work": work, "ms": float(np.median(ms)), "ratio": ratio, "low": low, "high": high}
            )
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    table = Table("mode", "work", "ms", "with / without the check", title=f"{args.shape}, {args.experts} LoRAs, {name}")
    for row in rows:
        interval = f"{row['ratio']:.4f} [{row['low']:.4f}, {row['high']:.4f}]"
        table.add_row(row["mode"], row["work"], f"{row['ms']:.2f}", interval)
    Console().print(table)
    if args.output is not None:
        told = {"device": name, "shape": args.shape, "layers": shape.layers, "rounds": args.rounds, "seed": args.seed}
        args.output.write_text(json.dumps({**told, "torch": torch.__version__, "rows": rows}, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
