"""The parts of a run's plan that only language models have: numbers, computed without loading weights.

Contents: to_train, to_evaluate, kept_bytes, at_once, count_examples.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import TYPE_CHECKING, Any

from torch import nn

from molecli.bases.fused import fused_places
from molecli.catalog.methods import ALONE, BASE
from molecli.config import EvalDataConfig
from molecli.suites import load_suite, select_tasks
from molecli.suites.origins import find_sources
from molecli.text.evaluate import check
from molecli.training.examples import load_tasks, split_tasks
from molecli.training.planned_work import PlannedWork

if TYPE_CHECKING:
    from molecli.config import DataConfig, EvaluateRecipe, TrainLoraRecipe
    from molecli.files.composition import Composition
    from molecli.protocols import Shape

LEARNS_FROM = "examples"
# A guess for the length of an example (prompt and target): real lengths need the tokenizer and every line.
TOKENS_PER_EXAMPLE = 256


def to_train(recipe: TrainLoraRecipe, shapes: Mapping[str, Shape], *, fetch: bool) -> PlannedWork:
    """The matrices that would be adapted, and the number of examples. Raises: UserError like the run."""
    from molecli.training.adapter import offered, target_matrices  # imports PEFT, which other plans do not need

    targets = target_matrices(recipe.adapter.targets, offered(recipe.adapter, shapes))
    return PlannedWork(count_examples(recipe.data, fetch=fetch), {"train": find_sources(recipe.data)}, targets=targets)


def to_evaluate(recipe: EvaluateRecipe, compositions: Mapping[str, Composition], *, fetch: bool) -> PlannedWork:
    """The LoRAs that are needed, the number of examples and of passes. Raises: UserError like the run."""
    _, loras, modes = check(recipe, compositions)
    needed = loras if set(modes) - {BASE} else list(recipe.loras)
    sources, count = {"evaluate": find_sources(recipe.eval.data)}, count_examples(recipe.eval.data, fetch=fetch)
    unmixed = {BASE: 1, ALONE: len(needed)}
    methods = len(recipe.switched) * (len(compositions) + sum(mode not in unmixed for mode in modes))
    methods += sum(unmixed.get(mode, 0) for mode in modes)
    return PlannedWork(count, sources, loras=needed, passes=methods * ceil(count / recipe.eval.batch_size))


def kept_bytes(skeleton: nn.Module, shapes: Mapping[str, Shape], *, rows: int, width: int) -> int:
    """The bytes that the backward pass keeps for `rows` examples, with `width` bytes per number."""
    config: Any = skeleton.config
    vocabulary = int(getattr(config, "vocab_size", 0))
    fused = fused_places(skeleton)  # of the routed experts, few run for a token
    layers = [shape for name, shape in shapes.items() if name not in fused]
    # Each layer keeps its input and its output. The loss keeps the logits and their gradient in float32.
    return rows * TOKENS_PER_EXAMPLE * (sum(map(sum, layers)) * width + vocabulary * 8)


def at_once(rows: int) -> str:
    """The batch that the estimate of memory is for."""
    return f"{TOKENS_PER_EXAMPLE} tokens an example"


def count_examples(data: DataConfig, *, fetch: bool = True) -> int:
    """The number of examples. For online data, without `fetch`, it is the limit, or 0 without a limit."""
    if not fetch and find_sources(data).online:
        suite = load_suite(data.suite, files=data.files)
        return (data.limit or 0) * len(select_tasks(suite, data.tasks, data.data_dir))
    tasks = load_tasks(data) if data.holdout == 0 else split_tasks(data)[isinstance(data, EvalDataConfig)]
    return sum(map(len, tasks.values()))
