"""Command line: one stage, or `all` of them within a deadline; `pack` and `install` move files."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import torch

from molecli.catalog.builtin import BUILTIN_IMAGE_GUIDANCE

from .data import BUILTIN, pack
from .driver import Driver, run_all
from .export import install
from .loop import leave
from .stages import STAGES, Options


def parser() -> argparse.ArgumentParser:
    """The options of every stage."""
    options = argparse.ArgumentParser(prog="python -m tools.image_builtin", description=__doc__)
    options.add_argument("stage", choices=["all", "pack", "install", "loras", "judge-loras", "install-loras", *STAGES])
    options.add_argument("--data-dir", type=Path, default=Path("../shared/data/emoji"), help="folder, or a pack of it")
    options.add_argument("--work", type=Path, default=Path("/tmp/work"), help="folder of the stages' outputs")
    options.add_argument("--export", type=Path, default=Path("/tmp/export"), help="folder of the small files to keep")
    options.add_argument("--pack-to", type=Path, default=Path(".gpu/emoji.npz"), help="what `pack` writes")
    options.add_argument("--install-to", type=Path, default=BUILTIN, help="where `install` unpacks --export")
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--minutes", type=float, default=1.0, help="one stage's budget")
    options.add_argument("--minutes-vae", type=float, default=2.0)
    options.add_argument("--minutes-clip", type=float, default=1.5)
    options.add_argument("--minutes-recogniser", type=float, default=1.5)
    options.add_argument("--minutes-unet", type=float, help="this call's; by default the time that the deadline leaves")
    options.add_argument("--schedule", type=float, default=13.0, help="minutes of the UNet's training over all calls")
    options.add_argument("--last", action="store_true", help="the UNet's schedule ends with this call")
    options.add_argument("--deadline", type=float, default=9.5, help="minutes for `all`, with judging and packing")
    options.add_argument("--no-judge", action="store_true", help="`all`: do not judge; judge in a separate call")
    options.add_argument("--initial", type=Path, help="a folder like molecli/builtin to start from without checkpoints")
    options.add_argument("--spent", type=float, default=0.0, help="with --initial: minutes already spent")
    options.add_argument("--until", type=float, help="seconds since the epoch by which the stage ends")
    options.add_argument("--loras", type=Path, default=Path("runs/loras"), help="`loras`: the output folder")
    options.add_argument("--train", default="", help="`loras`: more flags of mole train-lora, as one text")
    options.add_argument(
        "--only", default="", help="`loras`, `judge-loras`: names, separated by commas; all by default"
    )
    options.add_argument("--at-once", type=int, default=1, help="`loras`: trainings side by side")
    options.add_argument(
        "--guidance",
        type=float,
        default=BUILTIN_IMAGE_GUIDANCE,
        help="`judge` and `judge-loras`: the base's by default",
    )
    options.add_argument(
        "--first-seed", type=int, default=0, help="`judge` and `judge-loras`: other pictures, of other prompts"
    )
    options.add_argument(
        "--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="`judge-loras`: the base's weights"
    )
    options.add_argument("--smoke", action="store_true", help="three tiny steps for each stage")
    options.add_argument("--warm", action="store_true", help="`unet`: only fill the compiler's cache")
    return options


def main() -> int:
    """Runs the stage that the command line names."""
    given = parser().parse_args()
    if given.stage == "pack":
        pack(given.data_dir, given.pack_to)
        print(f"{given.pack_to}: {given.pack_to.stat().st_size / 2**20:.1f} MiB")
        return 0
    if given.stage == "install":
        install(given.export, given.install_to)
        return 0
    if given.stage in ("loras", "judge-loras", "install-loras"):
        return loras(given)
    if given.stage == "all":
        common = ["--data-dir", str(given.data_dir), "--work", str(given.work), "--device", given.device]
        common += ["--smoke"] if given.smoke else []
        common += ["--initial", str(given.initial), "--spent", str(given.spent)] if given.initial else []
        return run_all(
            Driver(given.work, given.export, common, given.deadline),
            vae=given.minutes_vae,
            clip=given.minutes_clip,
            recogniser=given.minutes_recogniser,
            unet=given.minutes_unet,
            schedule=given.schedule,
            last=given.last,
            judge=not given.no_judge,
        )
    given.work.mkdir(parents=True, exist_ok=True)
    options = Options(
        source=given.data_dir,
        work=given.work,
        device=torch.device(given.device),
        minutes=given.minutes,
        schedule=given.schedule if given.stage == "unet" else None,
        smoke=given.smoke,
        last=given.last,
        warm=given.warm,
        initial=given.initial,
        spent=given.spent,
        until=given.until,
        guidance=given.guidance,
        first_seed=given.first_seed,
    )
    STAGES[given.stage](options)
    leave()
    return 0


def loras(given: argparse.Namespace) -> int:
    """The stages of the LoRAs, which need the installed base."""
    from .loras import install_loras, judge_loras, run_loras

    only = frozenset(name for name in given.only.split(",") if name)
    if given.stage == "loras":
        return run_loras(given.loras, tuple(shlex.split(given.train)), at_once=given.at_once, only=only)
    if given.stage == "install-loras":
        install_loras(given.loras)
    else:
        given.export.mkdir(parents=True, exist_ok=True)
        judge_loras(
            given.loras,
            given.export / "judge-loras.png",
            torch.device(given.device),
            guidance=given.guidance,
            first_seed=given.first_seed,
            only=only,
            dtype=given.dtype,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
