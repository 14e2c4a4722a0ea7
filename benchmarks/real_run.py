"""The real run: SmolLM2-135M, twelve LoRAs on instruction_induction and nli, gates over them, every method compared.

    python benchmarks/real_run.py prepare --gguf FOLDER/NAME.gguf --work RUN     # unpack the GGUF once, into RUN/base
    python benchmarks/real_run.py loras --work RUN --data-dir DATA               # RUN/loras/<task>
    python benchmarks/real_run.py gates --work RUN --data-dir DATA               # gates x seeds, variants, test sets
    python benchmarks/real_run.py table --work RUN --output benchmarks/results   # one JSON and the tables

Each stage calls the `mole` commands that a user would call, `--jobs` at a time over the accelerators. A tenth of every
training set is held out from LoRAs and gates: settings are compared on it, never on the test sets.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from statistics import fmean

import torch
import yaml

from molecli.functional.bootstrap import bootstrap, paired_bootstrap

RECIPES = Path(__file__).parents[1] / "recipes" / "text"
SUITE = "instruction_induction+nli"
SEEDS = (0, 1, 2)
GRANULARITIES = ("matrix", "layer", "block", "network")
HOLDOUT = 0.1
# With one seed each, for the analysis: the paper's settings, and single changes towards our defaults.
VARIANTS: dict[str, tuple[str, ...]] = {
    "paper": ("preset=paper", "train.steps=800", "gate.granularity=layer"),
    "paper, lr 2e-2": ("preset=paper", "train.lr=2e-2", "train.steps=300", "gate.granularity=layer"),
    "unit": ("gate.normalize=unit",),
    "experts": ("gate.input=experts",),
    "none": ("gate.input=none",),
    "token": ("gate.pool=token",),
    "running": ("gate.pool=running",),
    "balance 0": ("train.balance=0",),
    "lr 5e-3": ("train.lr=5e-3",),
    "lr 5e-2": ("train.lr=5e-2",),
    "600 steps": ("train.steps=600",),
}
DEVICE_FILE = "device.txt"  # what the run was made on; the table may be made elsewhere
Scores = dict[str, list[float]]  # task -> main score of every example, in [0, 1]


@dataclass(frozen=True)
class Job:
    """`mole` command lines that run one after the other, and their log."""

    name: str
    commands: Sequence[Sequence[str]]
    log: Path


def tasks() -> list[str]:
    """The twelve tasks that the recipe names."""
    return yaml.safe_load((RECIPES / "smollm2-gated.yaml").read_text())["data"]["tasks"]


def run(jobs: Sequence[Job], *, at_once: int) -> None:
    """Runs the jobs in order, `at_once` at a time, spread evenly over the accelerators; reports failed ones."""
    devices: Queue[int] = Queue()
    for slot in range(at_once):
        devices.put(slot % max(1, torch.cuda.device_count()))

    def one(job: Job) -> None:
        device, start_s = devices.get(), time.monotonic()
        job.log.parent.mkdir(parents=True, exist_ok=True)
        environment = {"OMP_NUM_THREADS": "2", **os.environ, "CUDA_VISIBLE_DEVICES": str(device)}
        code = 0
        with job.log.open("w") as log:
            for command in job.commands:
                line = [sys.executable, "-m", "molecli", *command, "--verbose"]
                code = code or subprocess.run(line, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode
        devices.put(device)
        print(f"{job.name}: exit {code}, {time.monotonic() - start_s:.0f} s", flush=True)
        if code:
            print(job.log.read_text()[-1000:], flush=True)

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(one, jobs))


def prepare(args: argparse.Namespace) -> None:
    """Writes RUN/base: the GGUF unpacked to safetensors, which every later command loads in a second."""
    from molecli.bases.loading import load_backbone
    from molecli.config import BaseConfig

    gguf = Path(args.gguf)
    backbone = load_backbone(BaseConfig(id=str(gguf.parent), gguf_file=gguf.name, dtype="float32"), "cpu")
    backbone.model.save_pretrained(args.work / "base")
    backbone.tokenizer.save_pretrained(args.work / "base")


def loras(args: argparse.Namespace) -> None:
    """Writes RUN/loras/<task>, with one train-lora each."""
    run([_lora(args, task) for task in tasks()], at_once=args.jobs)


def gates(args: argparse.Namespace) -> None:
    """Writes RUN/gates/<name> with its held-out score and RUN/tests/<name> with test scores, for every method."""
    runs = [(name, 0, settings) for name, settings in VARIANTS.items()]
    runs += [(f"{g} s{seed}", seed, (f"gate.granularity={g}",)) for g in GRANULARITIES for seed in SEEDS]
    jobs = [_gates(args, name, seed, settings) for name, seed, settings in runs]
    jobs.append(_tests(args, "fixed", ["--loras", _paths(args), "--modes", "base,linear,nla"]))
    for task in tasks():
        alone = ["--loras", f"{task}={args.work / 'loras' / task}", "--modes", "single", "--tasks", task]
        jobs.append(_tests(args, f"own {task}", alone))
    (args.work / DEVICE_FILE).write_text(device_name())
    run(jobs, at_once=args.jobs)


def _lora(args: argparse.Namespace, task: str) -> Job:
    output = args.work / "loras" / task
    command = [
        "train-lora",
        str(RECIPES / "smollm2-lora.yaml"),
        *_shared(args),
        "--tasks",
        task,
        "--output",
        str(output),
    ]
    return _job(args, f"lora {task}", [[*command, *_sets(f"data.holdout={HOLDOUT}", *_steps(args))]])


def _gates(args: argparse.Namespace, name: str, seed: int, settings: Sequence[str]) -> Job:
    folder = args.work / "gates" / _slug(name)
    held_out = ("evaluate.baselines=false", "evaluate.batch_size=128", "evaluate.data.split=train",
                f"evaluate.data.holdout={HOLDOUT}", "evaluate.data.limit=24")  # fmt: skip
    compose = ["compose", str(RECIPES / "smollm2-gated.yaml"), *_shared(args), "--loras", _paths(args),
               "--seed", str(seed), "--output", str(folder),
               *_sets(f"data.holdout={HOLDOUT}", *held_out, *settings, *_steps(args))]  # fmt: skip
    return _job(args, name, [compose, *_tests(args, name, [str(folder), "--set", "eval.baselines=false"]).commands])


def _tests(args: argparse.Namespace, name: str, what: Sequence[str]) -> Job:
    chosen = [] if "--tasks" in what else ["--tasks", ",".join(tasks())]
    limit = [] if args.limit is None else ["--limit", str(args.limit)]
    command = ["evaluate", *what, *_shared(args), "--suite", SUITE, *chosen, *limit, "--output",
               str(args.work / "tests" / _slug(name)), "--batch-size", "128", "--bootstrap", "0"]  # fmt: skip
    return _job(args, name, [command])


def _job(args: argparse.Namespace, name: str, commands: Sequence[Sequence[str]]) -> Job:
    return Job(name, commands, args.work / "logs" / f"{_slug(name)}.log")


def _shared(args: argparse.Namespace) -> list[str]:
    return ["--base", str(args.work / "base"), "--data-dir", args.data_dir]


def _paths(args: argparse.Namespace) -> str:
    return ",".join(f"{task}={args.work / 'loras' / task}" for task in tasks())


def _steps(args: argparse.Namespace) -> list[str]:
    return [] if args.steps is None else [f"train.steps={args.steps}", "train.warmup_steps=0"]


def _sets(*settings: str) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]


def _slug(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "-")


def table(args: argparse.Namespace) -> None:
    """Prints the tables and writes them, with every example's score, to real_run-<device>.md and .json."""
    device = (args.work / DEVICE_FILE).read_text()
    methods = {"base": _scores(args, "fixed", "base"), "own LoRA": _own(args)}
    methods |= {name: _scores(args, "fixed", mode) for name, mode in (("Eq. 1", "linear"), ("Eq. 2", "nla"))}
    seeds = {g: [_scores(args, f"{g} s{seed}") for seed in SEEDS] for g in reversed(GRANULARITIES)}
    methods |= {f"gated, {g}": _mean(runs) for g, runs in seeds.items()}
    single = {f"{g}, seed {i}": run for g, runs in seeds.items() for i, run in zip(SEEDS, runs, strict=True)}
    single |= {name: _scores(args, name) for name in VARIANTS}
    differences = _differences(methods)
    held_out = {name: _held_out(args, name.replace(", seed ", " s")) for name in single}
    text = "\n\n".join((_main_table(methods), _difference_table(differences), _gate_table(methods, single, held_out)))
    content = {
        "device": device,
        "differences": differences,
        "held_out": held_out,
        "scores": {**methods, **single},
    }
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"real_run-{device.lower().replace(' ', '-')}.json"
    path.write_text(json.dumps(content) + "\n")
    path.with_suffix(".md").write_text(text + "\n")
    print(f"{text}\n\n{path}")


def device_name() -> str:
    """The name of the accelerator or of the processor."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()


def _main_table(methods: Mapping[str, Scores]) -> str:
    own = _average(methods["own LoRA"])
    rows = {task: [f"{100 * fmean(scores[task]):.1f}" for scores in methods.values()] for task in tasks()}
    rows["**average**"] = [f"**{_average(scores):.1f}**" for scores in methods.values()]
    rows["share of own LoRA"] = [_share(scores, own) for scores in methods.values()]
    return _markdown("exact match (%)", list(methods), rows)


def _difference_table(differences: Mapping[str, Sequence[float]]) -> str:
    rows = {name: [f"{middle:+.1f}", f"{low:+.1f} … {high:+.1f}"] for name, (middle, low, high) in differences.items()}
    return _markdown("percentage points", ["average", "95% interval"], rows)


def _gate_table(
    methods: Mapping[str, Scores], single: Mapping[str, Scores], held_out: Mapping[str, Mapping[str, float]]
) -> str:
    own, rows = _average(methods["own LoRA"]), {}
    for name, scores in single.items():
        held = held_out[name]
        kept = [f"{held['average']:.1f}", f"{_average(scores):.1f}", _share(scores, own)]
        rows[name] = [*kept, f"{held['entropy']:.2f}", f"{held['loss']:.3f}"]
    return _markdown("gates", ["held-out (%)", "test (%)", "share of own LoRA", "entropy", "loss"], rows)


def _markdown(corner: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    lines = [[corner, *columns], ["---", *["---:"] * len(columns)], *([name, *cells] for name, cells in rows.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _share(scores: Scores, own: float) -> str:
    return f"{100 * _average(scores) / own:.1f}%" if own else "-"


def _scores(args: argparse.Namespace, name: str, method: str | None = None) -> Scores:
    """Main scores by task from the samples of one evaluation; `method` among several."""
    folder = args.work / "tests" / _slug(name)
    scores: Scores = {}
    for task in json.loads((folder / "results.json").read_text())["results"]:
        lines = [json.loads(line) for line in (folder / f"samples_{task}.jsonl").open()]
        scores[task] = [row["exact_match"] for row in lines if row["method"] == (method or row["method"])]
    return scores


def _own(args: argparse.Namespace) -> Scores:
    return {task: _scores(args, f"own {task}", task)[task] for task in tasks()}


def _mean(runs: Sequence[Scores]) -> Scores:
    return {task: [fmean(values) for values in zip(*(run[task] for run in runs), strict=True)] for task in runs[0]}


def _average(scores: Scores) -> float:
    return 100 * fmean(fmean(scores[task]) for task in tasks())


def _differences(methods: dict[str, Scores]) -> dict[str, tuple[float, float, float]]:
    """Percentage points with 95% intervals: each method's average, and each gated method minus each other one."""
    tensors = {name: [100 * torch.tensor(scores[task]) for task in tasks()] for name, scores in methods.items()}
    found = {}
    for name, rows in tensors.items():
        interval = bootstrap(rows, generator=torch.Generator().manual_seed(0), samples=5000)
        found[name] = (interval.estimate, interval.low, interval.high)
    for name, rows in tensors.items():
        for other in ("base", "own LoRA", "Eq. 1", "Eq. 2") if name.startswith("gated") else ():
            interval = paired_bootstrap(rows, tensors[other], generator=torch.Generator().manual_seed(0), samples=5000)
            found[f"{name} − {other}"] = (interval.estimate, interval.low, interval.high)
    return found


def _held_out(args: argparse.Namespace, name: str) -> dict[str, float]:
    """A gate's score on the held-out rows, and entropy and loss over its last 30 steps."""
    path = args.work / "gates" / _slug(name) / "report.json"
    report = json.loads(path.read_text())
    log = [json.loads(line) for line in path.with_name("train_log.jsonl").open()][-30:]
    return {
        "average": report["evaluation"]["average"]["gated"],
        "entropy": fmean(row["entropy"] for row in log),
        "loss": fmean(row["loss"] for row in log),
        "seconds": report["seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("prepare", "loras", "gates", "table"))
    parser.add_argument("--work", type=Path, default=Path("runs/real"))
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--gguf", default="")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--jobs", type=int, default=max(1, 4 * torch.cuda.device_count()))
    parser.add_argument("--steps", type=int, help="training steps of LoRAs and gates, to try the script out")
    parser.add_argument("--limit", type=int, help="test rows of each task, to try the script out")
    args = parser.parse_args()
    {"prepare": prepare, "loras": loras, "gates": gates, "table": table}[args.stage](args)


if __name__ == "__main__":
    main()
