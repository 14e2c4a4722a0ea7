"""`mole inspect-gates` on a language model: the gates over examples of each task, with teacher forcing.

inspect_gates    recipe -> GateReport
defaults         the recipe's defaults that depend on the composition: its examples
collect          the gates of an attached mixture on examples
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import Tensor

from molecli.bases import prompt_record
from molecli.bases.loading import load_backbone
from molecli.config.unread import check_fields
from molecli.errors import UsageError
from molecli.evaluation.gate_report import GateReport, entropy_course, summarise, switch_some
from molecli.mixture.attach import attach, base_of
from molecli.training.examples import load_examples

if TYPE_CHECKING:
    from molecli.config import InspectGatesRecipe
    from molecli.files.composition import Composition
    from molecli.mixture.mixture import Mixture
    from molecli.protocols import Backbone, Example, Note, Progress


def inspect_gates(
    recipe: InspectGatesRecipe,
    composition: Composition,
    *,
    progress: Progress | None = None,
    note: Note = lambda text: None,
) -> GateReport:
    """The report on the examples that the recipe names. Raises: UsageError, MismatchError."""
    if recipe.prompts:
        what = "a language model's gates are inspected on examples, which have answers"
        raise UsageError("--prompt", what, "Write --files FILE.jsonl.")
    check_fields(recipe, ("image",), "pictures")
    tasks, path = load_examples(recipe.data), str(recipe.composition)
    base = base_of(recipe.base, composition)
    backbone = load_backbone(base, recipe.device)
    loras: dict[str, Any] = {lora.name: lora.source for lora in recipe.loras}
    with attach(backbone.model, loras=loras or None, composition=path) as mixture:
        switch_some(recipe, mixture)
        prompt_record.tell(backbone, note, base=base, loras=recipe.loras, compositions={path: composition.settings})
        values = collect(backbone, mixture, tasks, batch_size=recipe.batch_size, progress=progress)
        return summarise(values, mixture.names, composition=path, course=entropy_course(path))


def defaults(composition: Composition) -> dict[str, Any]:
    """The examples that the composition was scored on (otherwise learned from), as keys of a recipe."""
    own = yaml.safe_load(composition.recipe)
    scored = (own.get("evaluate") or {}).get("data")
    # All the data that the gates learned from, with its held-out part.
    data = scored or {**own["data"], "holdout": 0.0}
    return {f"data.{key}": value for key, value in data.items() if key != "limit"}


@torch.no_grad()
def collect(
    backbone: Backbone,
    mixture: Mixture,
    tasks: Mapping[str, Sequence[Example]],
    *,
    batch_size: int,
    progress: Progress | None = None,
) -> dict[str, dict[str, Tensor]]:
    """{task: {site: [examples, N]}}: the gates with teacher forcing, averaged over each example's tokens."""
    values: dict[str, dict[str, Tensor]] = {}
    done, total = 0, sum(map(len, tasks.values()))
    for task, examples in tasks.items():
        parts: dict[str, list[Tensor]] = {}
        for start in range(0, len(examples), batch_size):
            batch = examples[start : start + batch_size]
            backbone.token_loss(backbone.collate(batch))
            for site, gate in mixture.gates().items():
                parts.setdefault(site, []).append(gate.float().cpu().expand(len(batch), -1))
            done += len(batch)
            if progress is not None:
                progress("gates", done, total)
        values[task] = {site: torch.cat(gates) for site, gates in parts.items()}
    return values
