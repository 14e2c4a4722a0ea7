"""Exporting a composition on a language model: the examples over which its gates are averaged, and the PEFT adapter.

prepare     recipe -> TextExport, checked
TextExport    what `commands.export` needs from a kind of base
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from molecli.adapters import write_peft
from molecli.bases.fused import fused_parameters, taken_for_experts
from molecli.catalog.suites import OWN_TEXTS
from molecli.config import DataConfig
from molecli.config.unread import check_fields
from molecli.errors import UsageError
from molecli.evaluation.export_error import Observed
from molecli.experts import LowRank
from molecli.files.composition import Composition
from molecli.mixture.constant import read_gates
from molecli.mixture.mixture import Mixture
from molecli.protocols import Backbone, Example, Note, Progress
from molecli.suites.origins import Sources, find_sources
from molecli.text.plan import count_examples
from molecli.training.adapter import TASK_TYPES
from molecli.training.examples import Tasks, load_tasks, split_tasks

if TYPE_CHECKING:
    from molecli.config import ExportRecipe


PICTURE_FIELDS = ("image", "concepts")
PROBED = 4
# Read by both models if there are no other inputs: any tokens show a difference.
_PROBES = (("the old fox runs", "fox"), ("1 2 3 4 5 6 7", "8"), ("translate: good morning", "guten Morgen"))


def prepare(recipe: ExportRecipe, composition: Composition, note: Note = lambda text: None) -> TextExport:
    """The task of a recipe. Raises: UsageError for settings that would be ignored."""
    check_fields(recipe, PICTURE_FIELDS, "pictures")
    if recipe.calibration.prompts:
        what = "a language model's gates are averaged over examples, which have answers"
        raise UsageError("--prompt", what, "Write --calibrate FILE.jsonl.")
    return TextExport(recipe, composition)


class TextExport:
    """A `commands.export.Task` on a language model."""

    layouts: tuple[str, ...] = ("peft",)
    of, unit = "examples", "mean token loss of an example"

    def __init__(self, recipe: ExportRecipe, composition: Composition) -> None:
        self.recipe, self.composition = recipe, composition

    @property
    def data(self) -> DataConfig:
        """The `data` section that names the calibration inputs."""
        config = self.recipe.calibration
        if config.examples is not None:
            return DataConfig(suite=OWN_TEXTS, files=config.examples, limit=config.limit)
        own = DataConfig.model_validate(yaml.safe_load(self.composition.recipe)["data"])
        limit = min(config.limit, own.limit or config.limit)
        return own.model_copy(update={"limit": limit, "data_dir": config.data_dir or own.data_dir})

    @cached_property
    def tasks(self) -> Tasks:
        """The calibration inputs. Raises: UsageError if there are none."""
        if self.recipe.calibration.examples is not None:
            return load_tasks(self.data)
        try:
            return split_tasks(self.data)[0]
        except UsageError as error:
            remedy = "Write --calibrate FILE.jsonl, or --data-dir DIR."
            raise UsageError(error.where, f"{error.what}, and the composition was learned from it", remedy) from None

    @property
    def sources(self) -> Mapping[str, Sources]:
        return {"calibrate": find_sources(self.data)}

    def count(self, *, fetch: bool) -> int:
        """The number of inputs. For data sets that are online it is the limit, unless `fetch` allows to read them."""
        online = any(found.online for found in self.sources.values())
        return count_examples(self.data, fetch=fetch) if online else self.inputs

    @property
    def inputs(self) -> int:
        return sum(map(len, self.tasks.values()))

    @torch.no_grad()
    def observe(
        self, backbone: Backbone, mixture: Mixture | None, *, gates: bool, label: str, progress: Progress | None
    ) -> Observed:
        """Each input's loss with the mixture (None: the base) and, with `gates`, its gates averaged over its tokens."""
        losses: dict[str, list[Tensor]] = {task: [] for task in self.tasks}
        seen: dict[str, list[Tensor]] = {}
        done, size = 0, self.recipe.calibration.batch_size
        with mixture or nullcontext():
            for task, examples in self.tasks.items():
                for start in range(0, len(examples), size):
                    batch = examples[start : start + size]
                    losses[task].append(backbone.example_losses(backbone.collate(batch)).float().cpu())
                    for site, gate in read_gates(mixture).items() if gates and mixture is not None else ():
                        seen.setdefault(site, []).append(gate.expand(len(batch), -1))
                    done += len(batch)
                    if progress is not None:
                        progress(label, done, self.inputs)
        return Observed(
            {task: torch.cat(parts) for task, parts in losses.items()},
            {site: torch.cat(parts) for site, parts in seen.items()},
        )

    def write(self, folder: Path, layout: str, factors: Mapping[str, LowRank], backbone: Backbone) -> Path:
        """The folder with a PEFT adapter."""
        model, task_type = backbone.model, TASK_TYPES.get(backbone.family)
        parameters = fused_parameters(model) | {(n, "weight"): [n] for n in taken_for_experts(model, factors)}
        fused = {name for names in parameters.values() for name in names}
        transposed = any(isinstance(model.get_submodule(name), Conv1D) for name in factors if name not in fused)
        return write_peft(
            folder,
            factors,
            self.composition.base,
            task_type=task_type,
            fan_in_fan_out=transposed,
            parameters=parameters,
        )

    @contextmanager
    def loaded(self, backbone: Backbone, folder: Path, layout: str) -> Iterator[None]:
        """A context in which the base has the adapter in `folder`, loaded by PEFT."""
        from peft import PeftModel

        with warnings.catch_warnings():
            # PEFT uses an old name of transformers 5; the user can do nothing about it.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            # PEFT looks for patterns of parameters among modules alone, and then applies them all the same.
            warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys", RuntimeWarning)
            adapted = PeftModel.from_pretrained(backbone.model, str(folder), torch_device=str(backbone.device))
        try:
            yield
        finally:
            adapted.unload()

    @torch.no_grad()
    def probe(self, backbone: Backbone) -> Tensor:
        """The logits of the model as it is now, on a few calibration inputs."""
        known: list[Example] = []
        if "tasks" in self.__dict__:
            known = [examples[0] for examples in self.tasks.values()][:PROBED]
        examples = known or [Example("probe", *pair) for pair in _PROBES]
        logits = [backbone.model(**backbone.collate([example])).logits.flatten() for example in examples]
        return torch.cat(logits).float().cpu()

    def library(self, layout: str) -> str:
        """The name and version of the library that loads the adapter."""
        return f"PEFT {version('peft')}"
