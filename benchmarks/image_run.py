"""The first result: the embedded LoRAs composed by every method, two to five at once, scored by recogniser and CLIP.

    python benchmarks/image_run.py gates --work RUN                      # gated compositions: ours, and variants of it
    python benchmarks/image_run.py draw --work RUN                       # every method on the emoji suite, test scenes
    python benchmarks/image_run.py table --work RUN --output benchmarks/results

Each stage calls the `mole` commands that a user would call, `--jobs` at a time. `gated` is one setting, chosen on the
suite's training scenes; `variants` change one thing each and are drawn only on these training scenes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

import torch

from molecli.functional.bootstrap import Interval, bootstrap, paired_bootstrap

BASE = "builtin:tiny-sd"
SIZES = ("2 LoRAs", "3 LoRAs", "4 LoRAs", "5 LoRAs")
METRICS = ("recognised", "text_alignment", "image_alignment")
OURS = "gated"
# Columns of the table, with a process each, so that a GPU never waits.
FIXED = (("linear", "nla"), ("composite",), ("switch",), ("base",), ("w_switch",), ("w_composite",), ("loratorio",))
VARIANTS: dict[str, tuple[str, ...]] = {
    OURS: (),
    "pool mean": ("gate.pool=mean",),
    "input none": ("gate.input=none",),
    "collages": ("objective.collage=0.5",),
    "clip too": ("objective.clip=1.0",),
    "clip alone": ("objective.denoise=0", "objective.clip=1.0"),
    "matrix": ("gate.granularity=matrix",),
    "block": ("gate.granularity=block",),
}
Scores = dict[tuple[str, str], float]  # (scene, seed) -> score


@dataclass(frozen=True)
class Job:
    """A `mole` command line and its name in the log."""

    name: str
    command: Sequence[str]


def run(jobs: Sequence[Job], logs: Path, *, at_once: int) -> int:
    """The number of failed jobs, after running `at_once` at a time over the GPUs."""
    logs.mkdir(parents=True, exist_ok=True)
    devices: Queue[str] = Queue()
    seen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(max(1, torch.cuda.device_count()))))
    for slot in range(at_once):
        devices.put(seen.split(",")[slot % len(seen.split(","))])

    def one(job: Job) -> bool:
        device, start_s = devices.get(), time.monotonic()
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "CUDA_VISIBLE_DEVICES": device}
        file = logs / f"{job.name.replace(' ', '_')}.log"
        with file.open("w") as log:
            command = [sys.executable, "-m", "molecli", *job.command]
            code = subprocess.run(command, stdout=log, stderr=log, env=environment, check=False).returncode
        devices.put(device)
        print(f"{job.name}: {time.monotonic() - start_s:.0f} s, code {code}", flush=True)
        if code:
            print(file.read_text()[-1500:], flush=True)
        return bool(code)

    with ThreadPoolExecutor(at_once) as pool:
        return sum(pool.map(one, jobs))


def gates(given: argparse.Namespace) -> int:
    """Learns the gates of every requested variant."""
    common = ["--base", BASE, "--mode", "gated", "--no-preview", "--seed", str(given.seed), "--dtype", given.dtype]
    jobs = []
    for name in given.variants or VARIANTS:
        sets = [word for setting in VARIANTS[name] for word in ("--set", setting)]
        target = given.work / "gates" / _slug(name)
        more = ["--steps", str(given.steps)] if given.steps else []
        jobs.append(Job(name, ["compose", *common, *more, *sets, "--output", str(target), "--overwrite"]))
    return run(jobs, given.work / "logs", at_once=given.jobs)


def draw(given: argparse.Namespace) -> int:
    """Draws the test scenes with every method, or with --split train the training scenes with the variants."""
    flags = ["--base", BASE, "--suite", "emoji", "--tasks", ",".join(given.sizes), "--split", given.split]
    flags += ["--images", str(given.images), "--batch-size", str(given.batch_size), "--bootstrap", "0"]
    flags += ["--denoise-steps", str(given.denoise_steps), "--dtype", given.dtype]
    flags += ["--guidance", str(given.guidance)] if given.guidance is not None else []
    flags += ["--resume" if given.resume else "--overwrite"]
    folder = given.work / given.split
    if given.split == "train":
        names = given.variants or list(VARIANTS)
        jobs = [Job(name, _learned(given, name, flags, folder)) for name in names]
    else:
        wanted = [modes for modes in FIXED if not given.modes or set(modes) & set(given.modes)]
        jobs = [
            Job(modes[0], ["evaluate", "--modes", ",".join(modes), *flags, "--output", str(folder / modes[0])])
            for modes in wanted
        ]
        if not given.modes or OURS in given.modes:
            jobs.insert(0, Job(OURS, _learned(given, OURS, flags, folder)))
    return run(jobs, given.work / "logs" / given.split, at_once=given.jobs)


def _learned(given: argparse.Namespace, name: str, flags: Sequence[str], folder: Path) -> list[str]:
    composition = str(given.work / "gates" / _slug(name))
    sets = ["--set", "eval.baselines=false", "--output", str(folder / _slug(name))]
    return ["evaluate", composition, *flags, *sets]


def table(given: argparse.Namespace) -> int:
    """Print the tables, and write them with every picture's scores to --output."""
    lines = [f"# Compositions of the embedded LoRAs ({device_name(given)})", ""]
    kept: dict[str, object] = {"device": device_name(given)}
    columns = {"test": [*(mode for modes in FIXED for mode in modes), OURS], "train": list(VARIANTS)}
    for split, wanted in columns.items():
        found = read(given.work / split)
        order = [name for name in wanted if name in found]
        if not order:
            continue
        lines += [f"## {'Test' if split == 'test' else 'Training'} scenes", ""]
        for metric in METRICS:
            lines += _table(found, order, metric)
        lines += _differences(found, order, OURS)
        kept[split] = _columns(found)
    text = "\n".join(lines) + "\n"
    sys.stdout.write(text)
    if given.output:
        given.output.mkdir(parents=True, exist_ok=True)
        stem = f"image_run-{device_name(given).lower().replace(' ', '-')}"
        (given.output / f"{stem}.md").write_text(text, "utf-8")
        (given.output / f"{stem}.json").write_text(json.dumps(kept) + "\n", "utf-8")
    return 0


def read(folder: Path) -> dict[str, dict[str, Scores]]:
    """method -> metric -> (task, picture) -> score, from every evaluation below `folder`."""
    slugs = {_slug(name): name for name in VARIANTS}
    found: dict[str, dict[str, Scores]] = {}
    for file in sorted(folder.glob("*/samples_*.jsonl")):
        for line in file.read_text("utf-8").splitlines():
            row = json.loads(line)
            method = slugs.get(row["method"], row["method"])
            for metric in METRICS:
                place = (f"{len(row['loras'])} LoRAs", f"{row['scene']} #{row['seed']}")
                found.setdefault(method, {}).setdefault(metric, {})[place] = float(row[metric])
    return found


def _columns(found: Mapping[str, Mapping[str, Scores]]) -> dict[str, object]:
    """The pictures (task | scene and seed), and their scores in that order by method and metric."""
    pictures = sorted({place for by in found.values() for scores in by.values() for place in scores})
    scores = {
        name: {metric: [round(of[p], 4) if p in of else None for p in pictures] for metric, of in by.items()}
        for name, by in found.items()
    }
    return {"pictures": [" | ".join(place) for place in pictures], "scores": scores}


def _of(scores: Scores, tasks: Iterable[str]) -> list[torch.Tensor]:
    """A tensor of scores in percent for each task, the pictures in one order."""
    return [torch.tensor([100 * scores[k] for k in sorted(scores) if k[0] == task]) for task in tasks]


def _table(found: Mapping[str, Mapping[str, Scores]], order: Sequence[str], metric: str) -> list[str]:
    rows = [f"| {metric} (%) | " + " | ".join(order) + " |", "|---|" + "---:|" * len(order)]
    sizes = _sizes(found)
    for label, tasks in (*((size, (size,)) for size in sizes), ("average", sizes)):
        cells = []
        for name in order:
            interval = _interval(_of(found[name][metric], tasks))
            half = (interval.high - interval.low) / 2
            cells.append(f"{interval.estimate:.1f} ± {half:.1f}")
        rows.append(f"| {label} | " + " | ".join(cells) + " |")
    return [*rows, ""]


def _differences(found: Mapping[str, Mapping[str, Scores]], order: Sequence[str], subject: str) -> list[str]:
    lines = [f"{subject} minus each, recognised, in points with 95% intervals (paired bootstrap over pictures):", ""]
    if subject not in found:
        return []
    for name in order:
        if name == subject:
            continue
        parts = []
        sizes = _sizes(found)
        for label, tasks in (*((size, (size,)) for size in sizes), ("3 and more", [s for s in sizes if s != SIZES[0]])):
            mine, other = (_of(found[n]["recognised"], tasks) for n in (subject, name))
            i = paired_bootstrap(mine, other, generator=torch.Generator().manual_seed(0), samples=2000)
            parts.append(f"{label} {i.estimate:+.1f} [{i.low:+.1f}, {i.high:+.1f}]")
        lines.append(f"- {name}: " + "; ".join(parts))
    return [*lines, ""]


def _sizes(found: Mapping[str, Mapping[str, Scores]]) -> list[str]:
    """The tasks that were drawn."""
    drawn = {task for by_metric in found.values() for task, _ in by_metric[METRICS[0]]}
    return [size for size in SIZES if size in drawn]


def _interval(tasks: Sequence[torch.Tensor]) -> Interval:
    return bootstrap(list(tasks), generator=torch.Generator().manual_seed(0), samples=2000)


def device_name(given: argparse.Namespace) -> str:
    """The device that drew the pictures; `draw` notes it, for a table that is made elsewhere."""
    file = given.work / "device.txt"
    if not file.exists():
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu {platform.machine()}"
        given.work.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
    return file.read_text().strip()


def _slug(name: str) -> str:
    return name.replace(" ", "_")


def parser() -> argparse.ArgumentParser:
    """The options of every stage."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("stage", choices=["gates", "draw", "table"])
    options.add_argument("--work", type=Path, default=Path("runs/image"), help="folder of the stages' outputs")
    options.add_argument("--jobs", type=int, default=1, help="commands side by side")
    options.add_argument("--variants", type=lambda text: text.split(","), help="of the gates; all by default")
    options.add_argument(
        "--modes", type=lambda text: text.split(","), help="`draw`: some of the methods, `gated` among them"
    )
    options.add_argument("--split", choices=["test", "train"], default="test")
    options.add_argument("--images", type=int, default=20, help="pictures a scene; there are ten scenes a size")
    options.add_argument("--batch-size", type=int, default=40)
    options.add_argument("--guidance", type=float, help="`draw`: the base's own by default")
    options.add_argument("--denoise-steps", type=int, default=25)
    options.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options.add_argument("--resume", action="store_true", help="`draw`: only pictures that are not there yet")
    options.add_argument("--sizes", type=lambda text: text.split(","), default=list(SIZES), help="`draw`: some tasks")
    options.add_argument("--steps", type=int, help="`gates`: training steps, by default the recipe's")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--output", type=Path, help="`table`: folder for the tables and all scores")
    return options


def main() -> int:
    """Runs the stage that the command line names."""
    given = parser().parse_args()
    device_name(given)
    return {"gates": gates, "draw": draw, "table": table}[given.stage](given)


if __name__ == "__main__":
    sys.exit(main())
