"""`mole train-lora` on a language model: one adapter, trained with the task loss, in a folder that PEFT can load.

train_lora          recipe -> report: the whole command
task_loss           the training loss
held_out_losses     the losses on held-out examples, without and with the adapter
write_adapter       writes the folder of a LoRA
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel

from molecli.bases import prompt_record
from molecli.bases.loading import load_backbone
from molecli.files.atomic import write_bytes, write_text
from molecli.protocols import Backbone, Example, Note, Progress
from molecli.training.adapter import adapted, left_out, trained_parameters, training_report, write_shifts
from molecli.training.checkpoints import REPORT_FILE, discard_checkpoints
from molecli.training.examples import Tasks, flatten, split_tasks
from molecli.training.loop import LossFunction, StepLoss, train
from molecli.training.ranks import StepContext
from molecli.training.shifted import Shifted

if TYPE_CHECKING:
    from accelerate import Accelerator

    from molecli.config import BaseConfig, TrainLoraRecipe


def train_lora(
    recipe: TrainLoraRecipe,
    accelerator: Accelerator,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    note: Note = lambda text: None,
) -> dict[str, Any]:
    """The report of the training, written to the output folder together with the adapter. Raises: UserError."""
    folder = Path(recipe.output)
    tasks, held_out = split_tasks(recipe.data)
    backbone = load_backbone(recipe.base, accelerator.device)
    prompt_record.tell(backbone, note, base=recipe.base)
    said = left_out(backbone.model, recipe.adapter.targets)
    if said is not None and accelerator.is_main_process:
        note(said)
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
            # B starts at zero, so A has no gradient yet; and a sparse model may route no token to some matrices.
            gradient_check="any",
        )
        learned: dict[str, Any] = {
            **prompt_record.stored(backbone),
            "examples": {task: len(examples) for task, examples in tasks.items()},
            "tokens": int(sum(record["count"] for record in history)),
        }
        matrices = [*model.targeted_module_names, *getattr(model, "targeted_parameter_names", ())]
        report = training_report(recipe, model, matrices, history, learned)
        report["held_out"] = held_out_losses(backbone, model, held_out, recipe.train.batch_size, accelerator)
        report["seconds"] = round(time.monotonic() - start_s, 1)
        if accelerator.is_main_process:
            write = write_shifts if isinstance(model, Shifted) else write_adapter
            write(model, folder, recipe.base)
            write_text(folder / REPORT_FILE, json.dumps(report, indent=2) + "\n")
            discard_checkpoints(folder)
    accelerator.wait_for_everyone()
    return report


def task_loss(backbone: Backbone) -> LossFunction:
    """The loss function for `train`: the summed cross-entropy of the targets."""

    def loss(examples: Sequence[Example], context: StepContext) -> StepLoss:
        total, count = backbone.token_loss(backbone.collate(examples))
        return StepLoss(total, count)

    return loss


@torch.no_grad()
def held_out_losses(
    backbone: Backbone, model: PeftModel | Shifted, tasks: Tasks, batch_size: int, accelerator: Accelerator
) -> dict[str, dict[str, float]]:
    """{task: {"base": mean token loss, "lora": that with the adapter}} on held-out examples. Collective."""
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
    """Writes adapter_model.safetensors, then adapter_config.json: last, because readers look for it first."""
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.revision = base.id, base.revision
    with tempfile.TemporaryDirectory() as scratch:
        # save_embedding_layers: by default PEFT asks the hub whether the vocabulary was resized.
        model.save_pretrained(scratch, save_embedding_layers=False)
        weights = (Path(scratch) / "adapter_model.safetensors").read_bytes()
        settings = json.loads((Path(scratch) / "adapter_config.json").read_text())
    # PEFT keeps targets in a set, whose order differs from run to run.
    for key in ("target_modules", "target_parameters"):
        settings[key] = sorted(settings[key]) if settings[key] else settings[key]
    write_bytes(folder / "adapter_model.safetensors", weights)
    write_text(folder / "adapter_config.json", json.dumps(settings, indent=2, sort_keys=True) + "\n")
