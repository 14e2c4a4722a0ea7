"""A new adapter on a base's matrices: a LoRA through PEFT, or SVDiff's shifts of singular values.

Contents: adapted, target_matrices, left_out, trained_parameters, training_report, write_shifts.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from molecli import __version__
from molecli.adapters import Origin, write_svdiff
from molecli.bases.fused import fused_places, taken_for_experts
from molecli.bases.peft_layers import explained
from molecli.bases.weights import BaseWeights
from molecli.errors import UsageError, suggestion
from molecli.protocols import Backbone, Matrices, Progress, Shape
from molecli.training.checkpoints import recipe_digest
from molecli.training.shifted import Shifted

if TYPE_CHECKING:
    from molecli.config import AdapterConfig, BaseConfig, TrainLoraRecipe
    from molecli.training.loop import Record


ALL_LINEAR = "all-linear"
TASK_TYPES = {"seq2seq": "SEQ_2_SEQ_LM", "causal": "CAUSAL_LM"}


@contextmanager
def adapted(
    backbone: Backbone,
    adapter: AdapterConfig,
    *,
    seed: int,
    targets: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Iterator[PeftModel | Shifted]:
    """A context with the backbone's model and a new adapter in it. Afterwards the backbone is as it was before.

    Only the adapter is trained, in float32 whatever the base's dtype. The base stays in eval mode, so only the
    adapter's own dropout is active. `targets` are full names, by default those that the adapter's `targets` select.
    Raises: UsageError for targets that match no matrix.
    """
    if targets is None:
        targets = target_matrices(adapter.targets, offered(adapter, backbone.matrices()))
    if adapter.method == "svdiff":
        with Shifted(BaseWeights(backbone.model), targets, progress=progress) as shifted:
            yield shifted
        return
    with _lora(backbone, adapter, seed, targets) as model:
        yield model


@contextmanager
def _lora(backbone: Backbone, adapter: AdapterConfig, seed: int, targets: Sequence[str]) -> Iterator[PeftModel]:
    """A context with the backbone's model and a new LoRA in it."""
    as_parameters = taken_for_experts(backbone.model, targets)
    if as_parameters and adapter.dropout:
        what = f"PEFT takes {as_parameters[0]} for a layer of routed experts, unless it is adapted without dropout"
        raise UsageError("adapter.dropout", what, "Write 0, or leave that layer out of --targets.")
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=int(adapter.alpha) if float(adapter.alpha).is_integer() else adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=[name for name in targets if name not in as_parameters],
        target_parameters=[f"{name}.weight" for name in as_parameters] or None,
        use_rslora=adapter.rslora,
        bias="none",
        task_type=TASK_TYPES.get(backbone.family),
        fan_in_fan_out=any(isinstance(backbone.model.get_submodule(name), Conv1D) for name in targets),
    )
    # PEFT draws A from the global generator.
    torch.manual_seed(seed)
    with warnings.catch_warnings(), explained("adapter.targets", "Leave it out, or use an unquantised base."):
        # PEFT uses an old name of transformers 5; the user can do nothing about it.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        model = get_peft_model(backbone.model, config, autocast_adapter_dtype=True)
    try:
        yield model
    finally:
        model.unload()


def offered(adapter: AdapterConfig, matrices: Mapping[str, Shape]) -> Mapping[str, Shape]:
    """Those of the base's matrices that the adapter may train: SVDiff moves weights, and a tied head's are shared."""
    return dict(matrices) if adapter.method == "svdiff" else matrices


def target_matrices(targets: str | Sequence[str], matrices: Collection[str]) -> list[str]:
    """The full names of the matrices that `targets` selects: all-linear, a regex, or a list of names or name endings.

    Resolved here and not by PEFT, because PEFT would also adapt an embedding that matches, and would ignore a listed
    name that matches nothing. The output head is selected only where its name is written.
    """
    if targets == ALL_LINEAR:
        return list(matrices)
    text = targets if isinstance(targets, str) else " ".join(targets)
    head = Matrices.of(matrices).head if isinstance(matrices, Mapping) else {}
    matrices = [*matrices, *(name for name in head if name.rpartition(".")[2] in text)]
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


def left_out(model: nn.Module, targets: str | Sequence[str]) -> str | None:
    """A line that says what "all-linear" leaves out of a mixture-of-experts model; None for other models or targets."""
    experts = {(place.module, place.parameter) for place in fused_places(model).values() if place.expert is not None}
    if targets != ALL_LINEAR or not experts:
        return None
    count = sum(getattr(model.get_submodule(module), parameter).numel() for module, parameter in experts)
    total = sum(parameter.numel() for parameter in model.parameters())
    first = min(experts)
    return (
        f"{ALL_LINEAR} leaves out the weights of the routed experts, which have no linear layers (such as "
        f"{first[0]}.{first[1]}): {count:,} of the base's {total:,} parameters"
    )


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained: the adapter's."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def training_report(
    recipe: TrainLoraRecipe,
    model: PeftModel | Shifted,
    matrices: Sequence[str],
    history: Sequence[Record],
    learned: Mapping[str, Any],
) -> dict[str, Any]:
    """What was trained and how its loss went; `learned`: the entries that say from what."""
    tail = history[-max(1, len(history) // 10) :]
    return {
        "command": recipe.command,
        "molecli_version": __version__,
        "recipe_digest": recipe_digest(recipe),
        "base": recipe.base.id,
        "method": recipe.adapter.method,
        "matrices": len(matrices),
        "parameters": sum(parameter.numel() for parameter in trained_parameters(model).values()),
        **learned,
        "steps": len(history),
        "loss": {"first": history[0]["loss"], "last_tenth": sum(record["loss"] for record in tail) / len(tail)},
    }


def write_shifts(model: Shifted, folder: Path, base: BaseConfig) -> None:
    """Writes svdiff.safetensors, with metadata that say which base it belongs to."""
    weights, names = model.weights, model.targeted_module_names
    digests = {name: weights.digest(name) for name in names}
    shapes = {name: weights.shape(name) for name in names}
    origin = Origin(base.id, weights.dtype(names[0]), weights.fingerprint(), digests)
    write_svdiff(folder, model.shifts(), shapes, origin)


def _matching(regex: str, matrices: Collection[str]) -> list[str]:
    try:
        found = [name for name in matrices if re.fullmatch(regex, name)]
    except re.error as error:
        raise UsageError("adapter.targets", f"{regex!r} is not a valid regex ({error})", "Correct it.") from None
    if not found:
        known = ", ".join(_endings(matrices))
        raise UsageError("adapter.targets", f"the regex {regex!r} matches no matrix", f"Names end in {known}.")
    return found


def _endings(matrices: Collection[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in matrices})
