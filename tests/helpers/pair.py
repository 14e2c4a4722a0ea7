"""Two LoRAs that contradict each other, and what a gate must learn to use both.

Whatever the prompt, `up` says one thing and `down` another; prompts of the first kind want the first, prompts of the
second kind the second. Neither LoRA, nor any fixed mixture of both, answers both kinds.

Run as a program it composes them as a recipe file says, for the tests that kill a run or share it out:
`python pair.py --help` lists the options.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from molecli.commands.train_lora import run_train_lora
from molecli.config import ComposeRecipe, TrainLoraRecipe
from molecli.protocols import Example

NAMES = ("up", "down")
ANSWERS = {"up": "x", "down": "y"}
PROMPTS = {"up": ("aaaa", "abab", "aab", "ba"), "down": ("0000", "0101", "001", "10")}

# Spelled out, so that the tests do not follow the defaults.
GATE = {"granularity": "block", "input": "hidden", "pool": "prompt", "head": "full", "normalize": "standardize"}


def examples() -> list[Example]:
    """What the gates learn from: both kinds of prompt, each with the answer of its own LoRA."""
    return [Example(name, prompt, ANSWERS[name]) for name in NAMES for prompt in PROMPTS[name]]


@dataclass(frozen=True)
class Pair:
    """A base, the LoRAs `up` and `down` on it, and a file of examples for each kind of prompt."""

    base: str
    loras: dict[str, str]
    files: dict[str, str]

    def recipe(self, output: Path | str, **changes: Any) -> ComposeRecipe:
        """Learned gates for the pair; `changes` are sections of the recipe, laid over these."""
        tree: dict[str, Any] = {
            "base": {"id": self.base},
            "loras": [{"name": name, "source": source} for name, source in self.loras.items()],
            "gate": GATE,
            "data": {"suite": "jsonl", "files": self.files},
            "train": {
                "steps": 8,
                "batch_size": 4,
                "lr": 0.02,
                "warmup_steps": 2,
                "balance": 0.01,
                "checkpoint_every": 2,
            },
            "evaluate": None,
            "output": str(output),
            "seed": 5,
            "device": "cpu",
        }
        for key, value in changes.items():
            tree[key] = {**tree[key], **value} if isinstance(tree.get(key), dict) else value
        return ComposeRecipe.model_validate(tree)


def make_pair(base: Path, folder: Path) -> Pair:
    """The pair on the tiny base saved at `base`, trained here in a few seconds."""
    both = [prompt for name in NAMES for prompt in PROMPTS[name]]
    loras, files = {}, {}
    for name in NAMES:
        wanted = _write(folder / "wanted" / f"{name}.jsonl", both, ANSWERS[name])
        recipe = {
            "base": {"id": str(base)},
            "adapter": {"rank": 4, "alpha": 8},
            "data": {"suite": "jsonl", "files": {name: wanted}},
            "train": {"steps": 60, "batch_size": 8, "lr": 0.01, "warmup_steps": 5, "checkpoint_every": 60},
            "output": str(folder / name),
            "device": "cpu",
        }
        run_train_lora(TrainLoraRecipe.model_validate(recipe))
        loras[name] = str(folder / name)
        files[name] = _write(folder / f"{name}.jsonl", PROMPTS[name], ANSWERS[name])
    return Pair(str(base), loras, files)


def _write(path: Path, prompts: Any, answer: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"input": prompt, "target": answer}) + "\n" for prompt in prompts))
    return str(path)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe", type=Path, help="a ComposeRecipe as JSON")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds to wait after each step")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--calibration", type=Path, help="folder for what each rank standardised its gates with")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    from molecli.commands import compose
    from molecli.training import fit_gates as fit

    calibrate = fit.calibrate

    def watched(backbone: Any, mixture: Any, *others: Any) -> None:
        calibrate(backbone, mixture, *others)
        rank = compose.accelerator_for("cpu").process_index
        kept = {name: t.clone() for name, t in mixture.state_dict().items() if name.endswith(("/mean", "/std"))}
        save_file(kept, arguments.calibration / f"rank{rank}.safetensors")

    if arguments.calibration:
        fit.calibrate = watched
    recipe = ComposeRecipe.model_validate_json(arguments.recipe.read_text())
    compose.run_compose(recipe, resume=arguments.resume, progress=lambda *_: time.sleep(arguments.pause))


if __name__ == "__main__":
    main()
