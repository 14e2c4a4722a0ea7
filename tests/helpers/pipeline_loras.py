"""LoRAs for the shapes of pipelines, and the pictures that diffusers' own LoRAs make of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tiny_pipelines import make_expert
from torch import Tensor

from molecli.adapters import write_diffusers
from molecli.bases.pipeline import PipelineModules, pipeline_matrices
from molecli.experts import Expert

WEIGHTS = {"a": 0.8, "b": 0.5}


def adaptable(pipe: Any) -> dict[str, tuple[int, ...]]:
    """Without the layers that PEFT's own LoRAs break on (they are called by keyword), and those of an IP-Adapter."""
    matrices = pipeline_matrices(PipelineModules(pipe))
    apart = (".processor.", "encoder_hid_proj")
    return {
        name: shape
        for name, shape in matrices.items()
        if not any(part in name for part in apart)
        and not ("motion_modules" in name and name.endswith(("proj_in", "proj_out")))
    }


def experts(pipe: Any, keep: Callable[[str], bool] = lambda matrix: True) -> list[Expert]:
    return [make_expert(name, adaptable(pipe), seed=i, scale=0.1, keep=keep) for i, name in enumerate(WEIGHTS)]


def written(found: list[Expert], folder: Path) -> dict[str, str]:
    return {one.name: str(write_diffusers(folder / one.name, one.factors)) for one in found}


def in_unet(matrix: str) -> bool:
    return matrix.startswith("unet.")


def summed(pipe: Any, folders: dict[str, str]) -> Any:
    """The pipeline with diffusers' own LoRAs, in their weighted sum."""
    for name, folder in folders.items():
        pipe.load_lora_weights(folder, adapter_name=name)
    pipe.set_adapters(list(WEIGHTS), list(WEIGHTS.values()))
    return pipe


def mean(outputs: Sequence[Tensor], step: int) -> Tensor:
    """What Composite makes of the outputs with each LoRA alone."""
    return sum(outputs[1:], outputs[0]) / len(outputs)


def one_at_a_time(pipe: Any, folders: dict[str, str], combine: Callable[[Sequence[Tensor], int], Tensor] = mean) -> Any:
    """The pipeline with a UNet that runs once for each LoRA by diffusers, and gives what `combine` makes of that."""
    for name, folder in folders.items():
        pipe.load_lora_weights(folder, adapter_name=name)
    forward, steps = pipe.unet.forward, iter(range(1000))

    def alone(name: str, *args: Any, **kwargs: Any) -> Any:
        pipe.unet.set_adapters([name], [1.0])
        # The UNet takes residuals out of the lists that it is given.
        kwargs = {key: list(value) if isinstance(value, list) else value for key, value in kwargs.items()}
        return forward(*args, **kwargs)

    def combined(*args: Any, **kwargs: Any) -> Any:
        outputs = [alone(name, *args, **kwargs) for name in folders]
        made = combine([output[0] for output in outputs], next(steps))
        return (made,) if isinstance(outputs[0], tuple) else type(outputs[0])(sample=made)

    pipe.unet.forward = combined
    return pipe
