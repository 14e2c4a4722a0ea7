"""The real run: SmolLM2-135M, twelve LoRAs on instruction_induction and nli, gates over them, every method compared.

    python benchmarks/real_run.py prepare --gguf FOLDER/NAME.gguf --work RUN     # unpack the GGUF once, into RUN/base
    python benchmarks/real_run.py loras   --work RUN --data-dir DATA             # RUN/loras/<task>
    python benchmarks/real_run.py probe   --work RUN --data-dir DATA             # gate settings, on held-out training rows
    python benchmarks/real_run.py final   --work RUN --data-dir DATA             # gates x seeds, then the test sets

Each stage calls the `mole` commands a user would, side by side on the accelerators there are (`--jobs` at once).
`probe` sees the training split alone: its gates learn on 90% of it and are scored on the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

import torch
import yaml

RECIPES = Path(__file__).parents[1] / "recipes" / "text"
GRANULARITIES = ("network", "block", "layer", "matrix")
HOLDOUT = 0.1
HELD_OUT = (f"data.holdout={HOLDOUT}",)
PROBES: dict[str, tuple[str, ...]] = {
    "block": ("gate.granularity=block",),
    "layer": ("gate.granularity=layer",),
    "network": ("gate.granularity=network",),
    "matrix": ("gate.granularity=matrix",),
    "unit": ("gate.granularity=block", "gate.normalize=unit"),
    "token": ("gate.granularity=block", "gate.pool=token"),
    "running": ("gate.granularity=block", "gate.pool=running"),
    "layer-token": ("gate.pool=token", "gate.granularity=layer"),
    "experts": ("gate.granularity=block", "gate.input=experts"),
    "experts-unit": ("gate.granularity=block", "gate.input=experts", "gate.normalize=unit"),
    "none": ("gate.granularity=block", "gate.input=none", "train.lr=2e-2"),
    "paper": ("preset=paper", "gate.granularity=block", "train.steps=800"),
    "lr-1e-3": ("gate.granularity=block", "train.lr=1e-3",),
    "lr-2e-2": ("gate.granularity=block", "train.lr=2e-2",),
    "no-balance": ("gate.granularity=block", "train.balance=0",),
    "balance-0.1": ("gate.granularity=block", "train.balance=0.1",),
}


@dataclass(frozen=True)
class Job:
    """One `mole` command line and the log it writes."""

    name: str
    arguments: list[str]
    log: Path


def tasks() -> list[str]:
    """The twelve tasks, as the recipe names them."""
    return yaml.safe_load((RECIPES / "smollm2-gated.yaml").read_text())["data"]["tasks"]


def run(jobs: list[Job], *, at_once: int) -> None:
    """Runs the jobs, `at_once` side by side, spread evenly over the accelerators; stops at the first failure."""
    devices: Queue[int] = Queue()
    count = max(1, torch.cuda.device_count())
    for slot in range(at_once):
        devices.put(slot % count)

    def one(job: Job) -> None:
        device = devices.get()
        start_s = time.monotonic()
        job.log.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": str(device), "TOKENIZERS_PARALLELISM": "false"}
        environment.setdefault("OMP_NUM_THREADS", "2")
        with job.log.open("w") as log:
            command = [sys.executable, "-m", "molecli", *job.arguments, "--verbose"]
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode
        devices.put(device)
        print(f"{job.name}: exit {code}, {time.monotonic() - start_s:.0f} s", flush=True)
        if code:
            print(job.log.read_text()[-1500:], flush=True)

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(one, jobs))


def prepare(args: argparse.Namespace) -> None:
    """RUN/base: the GGUF unpacked to safetensors, so that every later command loads it in a second."""
    from molecli.backbones.loading import load_backbone
    from molecli.files.recipe import BaseConfig

    gguf = Path(args.gguf)
    backbone = load_backbone(BaseConfig(id=str(gguf.parent), gguf_file=gguf.name, dtype="float32"), "cpu")
    backbone.model.save_pretrained(args.work / "base")
    backbone.tokenizer.save_pretrained(args.work / "base")


def loras(args: argparse.Namespace) -> None:
    """RUN/loras/<task>, one train-lora each."""
    shared = ["--base", str(args.work / "base"), "--data-dir", args.data_dir]
    jobs = [
        Job(
            f"lora {task}",
            ["train-lora", str(RECIPES / "smollm2-lora.yaml"), *shared, "--tasks", task, "--output",
             str(args.work / "loras" / task), *sets(HELD_OUT if args.held_out else ())],
            args.work / "logs" / f"lora-{task}.log",
        )
        for task in tasks()
    ]  # fmt: skip
    run(jobs, at_once=args.jobs)


def probe(args: argparse.Namespace) -> None:
    """RUN/probes/<name>: a composition each, scored on the held-out tenth of the training split."""
    chosen = {name: PROBES[name] for name in args.only or PROBES}
    scored = ("evaluate.baselines=false", "evaluate.batch_size=128", f"evaluate.data.limit={args.limit}",
              "evaluate.data.split=train", f"evaluate.data.holdout={HOLDOUT}")  # fmt: skip
    jobs = [gates(args, f"probes/{name}", 0, (*HELD_OUT, *scored, *settings)) for name, settings in chosen.items()]
    held = ("eval.batch_size=128", f"eval.data.limit={args.limit}", "eval.data.split=train", f"eval.data.holdout={HOLDOUT}")
    jobs.append(evaluation(args, "probes/baselines", [], held))
    run(jobs, at_once=args.jobs)
    report_probes(args.work, chosen)


def final(args: argparse.Namespace) -> None:
    """RUN/gates/<granularity>-<seed> and RUN/evaluation on the test sets."""
    settings = {f"{g}-s{seed}": (g, seed) for g in GRANULARITIES for seed in range(args.seeds)}
    run(
        [gates(args, f"gates/{name}", seed, (f"gate.granularity={g}",)) for name, (g, seed) in settings.items()],
        at_once=args.jobs,
    )
    parts = [evaluation(args, "tests/baselines", [], ("eval.batch_size=128",))]
    parts += [
        evaluation(args, f"tests/{name}", [str(args.work / "gates" / name)], ("eval.batch_size=128",), modes="base")
        for name in settings
    ]
    run(parts, at_once=args.jobs)


def gates(args: argparse.Namespace, name: str, seed: int, settings: tuple[str, ...]) -> Job:
    """One `mole compose` over the LoRAs of RUN/loras."""
    paths = ",".join(f"{task}={args.work / 'loras' / task}" for task in tasks())
    arguments = ["compose", str(RECIPES / "smollm2-gated.yaml"), "--base", str(args.work / "base"), "--loras", paths,
                 "--data-dir", args.data_dir, "--seed", str(seed), "--output", str(args.work / name)]  # fmt: skip
    return Job(name, [*arguments, *sets(settings)], args.work / "logs" / f"{name.replace('/', '-')}.log")


def evaluation(
    args: argparse.Namespace, name: str, compositions: list[str], settings: tuple[str, ...], modes: str = ""
) -> Job:
    """One `mole evaluate` on the twelve tasks."""
    paths = ",".join(f"{task}={args.work / 'loras' / task}" for task in tasks())
    arguments = ["evaluate", *compositions, "--base", str(args.work / "base"), "--suite", "instruction_induction+nli",
                 "--data-dir", args.data_dir, "--tasks", ",".join(tasks()), "--output", str(args.work / name)]  # fmt: skip
    arguments += ["--modes", modes] if modes else ["--loras", paths]
    return Job(name, [*arguments, *sets(settings)], args.work / "logs" / f"{name.replace('/', '-')}.log")


def sets(settings: tuple[str, ...]) -> list[str]:
    """`--set` flags."""
    return [part for setting in settings for part in ("--set", setting)]


def report_probes(work: Path, names: dict[str, tuple[str, ...]]) -> None:
    """Prints each probe's average, its share of the own LoRAs' and the gates' last entropy; RUN/probes.json holds all."""
    baselines = json.loads((work / "probes/baselines/results.json").read_text())
    own = baselines["average"]["own LoRA"]
    rows = {}
    for name in names:
        path = work / "probes" / name / "report.json"
        if path.exists():
            report = json.loads(path.read_text())
            scores = {task: row for task, row in report["evaluation"]["results"].items()}
            rows[name] = {"average": report["evaluation"]["average"]["gated"], "last": report["last"],
                          "seconds": report["seconds"], "tasks": scores, "settings": names[name]}  # fmt: skip
    (work / "probes.json").write_text(json.dumps({"baselines": baselines, "probes": rows}))
    for name, value in baselines["average"].items():
        print(f"{name:24s} {value:6.1f}")
    for name, row in sorted(rows.items(), key=lambda item: -item[1]["average"]):
        last = row["last"]
        share = 100 * row["average"] / own
        print(f"{name:24s} {row['average']:6.1f} {share:6.1f}% of own  entropy {last['entropy']:.2f}  loss {last['loss']:.3f}  {row['seconds']:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("prepare", "loras", "probe", "final"))
    parser.add_argument("--work", type=Path, default=Path("runs/real"))
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--gguf", default="")
    parser.add_argument("--jobs", type=int, default=max(1, 4 * torch.cuda.device_count()))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=int, default=24, help="held-out rows of each task that a probe is scored on")
    parser.add_argument("--only", nargs="*", help="probes to run")
    parser.add_argument("--held-out", action="store_true", help="keep the probes' held-out rows out of the LoRAs too")
    args = parser.parse_args()
    {"prepare": prepare, "loras": loras, "probe": probe, "final": final}[args.stage](args)


if __name__ == "__main__":
    main()
