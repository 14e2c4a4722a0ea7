"""`mole train-lora`: one LoRA trained on a frozen base with the task loss, in a folder that PEFT loads.

run_train_lora    the whole command; on a diffusion base it is `engine.images.train_lora` that runs
adapted           a backbone with a fresh adapter in it, taken out again at the end: a LoRA, or shifts (SVDiff)
write_adapter     the folder of a LoRA
write_shifts      that of shifts
"""

from __future__ import annotations

import json
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from molecli import __version__
from molecli.backbones.loading import load_backbone
from molecli.backbones.shifted import Shifted
from molecli.backbones.sources import find_base
from molecli.backbones.weights import BaseWeights
from molecli.engine.checkpoints import REPORT_FILE, discard_checkpoints, finished_report, recipe_digest
from molecli.engine.data import Tasks, flatten, split_tasks
from molecli.engine.loop import LossFunction, Progress, Record, StepLoss, train
from molecli.engine.ranks import StepContext, accelerator_for, share_from_main
from molecli.errors import UsageError
from molecli.files.adapters import Origin, write_svdiff
from molecli.files.atomic import write_bytes, write_text
from molecli.files.near import suggestion
from molecli.protocols import Backbone, Example

if TYPE_CHECKING:
    from accelerate import Accelerator

    from molecli.files.recipe import AdapterConfig, BaseConfig, TrainLoraRecipe

ALL_LINEAR = "all-linear"
TASK_TYPES = {"seq2seq": "SEQ_2_SEQ_LM", "causal": "CAUSAL_LM"}


def run_train_lora(
    recipe: TrainLoraRecipe,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    note: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:
    """Trains the LoRA of `recipe` into its output folder; returns the report, which is also written there.

    On a diffusion base `note` is told what a prompt loses. A run that is already finished is returned as it is (with
    `resume`). Raises: UserError.
    """
    folder = Path(recipe.output)
    accelerator = accelerator_for(recipe.device)
    found = finished_report(folder, recipe) if resume and accelerator.is_main_process else None
    done: Any = share_from_main(found, accelerator)
    if done is not None:
        return done
    if recipe.pictures is not None or find_base(recipe.base).pipeline:
        from molecli.engine.images.train_lora import train_on_pictures  # which needs diffusers, and this module

        return train_on_pictures(recipe, accelerator, resume=resume, progress=progress, note=note)
    tasks, held_out = split_tasks(recipe.data)
    backbone = load_backbone(recipe.base, accelerator.device)
    start_s = time.monotonic()
    with adapted(backbone, recipe.adapter, seed=recipe.seed, progress=progress) as model:
        history = train(
            parameters=trained_parameters(model),
            loss_fn=task_loss(backbone),
            examples=flatten(tasks),
            settings=recipe.train,
            seed=recipe.seed,
            folder=folder,
            resume=resume,
            accelerator=accelerator,
            progress=progress,
            # B starts at zero, so that A has no gradient yet; and a sparse model routes no token to some matrices.
            gradient_check="any",
        )
        report = _report(recipe, model, tasks, history)
        report["held_out"] = held_out_losses(backbone, model, held_out, recipe.train.batch_size, accelerator)
        report["seconds"] = round(time.monotonic() - start_s, 1)
        if accelerator.is_main_process:
            write = write_shifts if isinstance(model, Shifted) else write_adapter
            write(model, folder, recipe.base)
            write_text(folder / REPORT_FILE, json.dumps(report, indent=2) + "\n")
            discard_checkpoints(folder)
    accelerator.wait_for_everyone()
    return report


@contextmanager
def adapted(
    backbone: Backbone,
    adapter: AdapterConfig,
    *,
    seed: int,
    targets: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Iterator[PeftModel | Shifted]:
    """The backbone's model with a fresh adapter in it, of the adapter's method; when the block ends, the backbone is as
    it was.

    Only the adapter trains, in float32 whatever the base's dtype. The base stays in eval mode: of all dropouts only the
    adapter's own is active. `targets` are full names, by default those that the adapter's mean.
    Raises: UsageError for targets that name no adaptable matrix.
    """
    if targets is None:
        targets = target_matrices(adapter.targets, backbone.matrices())
    if adapter.method == "svdiff":
        told = None if progress is None else partial(progress, "singular values")
        with Shifted(BaseWeights(backbone.model), targets, told=told) as shifted:
            yield shifted
        return
    with _lora(backbone, adapter, seed, targets) as model:
        yield model


@contextmanager
def _lora(backbone: Backbone, adapter: AdapterConfig, seed: int, targets: Sequence[str]) -> Iterator[PeftModel]:
    """The backbone's model with a fresh LoRA in it."""
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=int(adapter.alpha) if float(adapter.alpha).is_integer() else adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=list(targets),
        use_rslora=adapter.rslora,
        bias="none",
        task_type=TASK_TYPES.get(backbone.family),
        fan_in_fan_out=any(isinstance(backbone.model.get_submodule(name), Conv1D) for name in targets),
    )
    # PEFT draws A from the global generator.
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        # PEFT asks transformers 5 a question by its old name; a user can do nothing about it.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        model = get_peft_model(backbone.model, config, autocast_adapter_dtype=True)
    try:
        yield model
    finally:
        model.unload()


def target_matrices(targets: str | Sequence[str], matrices: Collection[str]) -> list[str]:
    """The full names of the matrices that `targets` means: all-linear, a regex, or a list of names or name endings.

    Resolved here and not by PEFT, which would also adapt the output head or an embedding where a name or regex
    matches it, and passes over a listed name that matches nothing.
    """
    if targets == ALL_LINEAR:
        return list(matrices)
    if isinstance(targets, str) and not re.fullmatch(r"[\w.,\s]+", targets):
        return _matching(targets, matrices)
    names = [part.strip() for part in targets.split(",")] if isinstance(targets, str) else targets
    chosen: set[str] = set()
    for target in names:
        matched = {name for name in matrices if name == target or name.endswith(f".{target}")}
        if not matched:
            what = f"no matrix is called {target!r}"
            raise UsageError("adapter.targets", what, suggestion(target, _endings(matrices)))
        chosen |= matched
    return [name for name in matrices if name in chosen]


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train: the adapter's."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def task_loss(backbone: Backbone) -> LossFunction:
    """The loss that `train` asks for: summed cross-entropy of the targets."""

    def loss(examples: Sequence[Example], context: StepContext) -> StepLoss:
        total, count = backbone.token_loss(backbone.collate(examples))
        return StepLoss(total, count)

    return loss


@torch.no_grad()
def held_out_losses(
    backbone: Backbone, model: PeftModel | Shifted, tasks: Tasks, batch_size: int, accelerator: Accelerator
) -> dict[str, dict[str, float]]:
    """{task: {"base": mean token loss, "lora": the same with the adapter}} on held-out examples. Collective."""
    losses: dict[str, dict[str, float]] = {}
    context, model_is = StepContext(0, accelerator), {"base": model.disable_adapter, "lora": nullcontext}
    training = model.training
    model.eval()
    for task, examples in tasks.items():
        mine, row = examples[accelerator.process_index :: accelerator.num_processes], {}
        for name, switched in model_is.items():
            sums = torch.zeros(2, device=accelerator.device)
            with switched():
                for start in range(0, len(mine), batch_size):
                    total, count = backbone.token_loss(backbone.collate(mine[start : start + batch_size]))
                    sums += torch.stack([total.float(), count.float()])
            total, count = context.total(sums).tolist()
            row[name] = total / max(count, 1.0)
        losses[task] = row
    model.train(training)
    return losses


def write_adapter(model: PeftModel, folder: Path, base: BaseConfig) -> None:
    """Writes adapter_model.safetensors and adapter_config.json; the config last, as readers look for it first."""
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.revision = base.id, base.revision
    with tempfile.TemporaryDirectory() as scratch:
        # save_embedding_layers: left to itself, PEFT asks the hub whether the vocabulary was resized.
        model.save_pretrained(scratch, save_embedding_layers=False)
        weights = (Path(scratch) / "adapter_model.safetensors").read_bytes()
        settings = json.loads((Path(scratch) / "adapter_config.json").read_text())
    # PEFT keeps targets in a set, whose order differs from run to run.
    settings["target_modules"] = sorted(settings["target_modules"])
    write_bytes(folder / "adapter_model.safetensors", weights)
    write_text(folder / "adapter_config.json", json.dumps(settings, indent=2, sort_keys=True) + "\n")


def write_shifts(model: Shifted, folder: Path, base: BaseConfig) -> None:
    """Writes svdiff.safetensors, which says in its metadata which base it belongs to."""
    weights, names = model.weights, model.targeted_module_names
    digests = {name: weights.digest(name) for name in names}
    shapes = {name: weights.shape(name) for name in names}
    origin = Origin(base.id, weights.dtype(names[0]), weights.fingerprint(), digests)
    write_svdiff(folder, model.shifts(), shapes, origin)


def _matching(regex: str, matrices: Collection[str]) -> list[str]:
    try:
        found = [name for name in matrices if re.fullmatch(regex, name)]
    except re.error as error:
        raise UsageError("adapter.targets", f"{regex!r} is not a valid regex ({error})", "Mend it.") from None
    if not found:
        known = ", ".join(_endings(matrices))
        raise UsageError("adapter.targets", f"the regex {regex!r} matches no matrix", f"Names end in {known}.")
    return found


def _endings(matrices: Collection[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in matrices})


def _report(
    recipe: TrainLoraRecipe,
    model: PeftModel | Shifted,
    tasks: Mapping[str, Sequence[Example]],
    history: Sequence[Record],
) -> dict[str, Any]:
    tail = history[-max(1, len(history) // 10) :]
    return {
        "command": recipe.command,
        "molecli_version": __version__,
        "recipe_digest": recipe_digest(recipe),
        "base": recipe.base.id,
        "method": recipe.adapter.method,
        "matrices": len(model.targeted_module_names),
        "parameters": sum(parameter.numel() for parameter in trained_parameters(model).values()),
        "examples": {task: len(examples) for task, examples in tasks.items()},
        "steps": len(history),
        "tokens": int(sum(record["count"] for record in history)),
        "loss": {"first": history[0]["loss"], "last_tenth": sum(record["loss"] for record in tail) / len(tail)},
    }
