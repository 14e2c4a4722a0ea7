"""Gradient checkpointing: activations are computed again in the backward pass, not kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.modeling_layers import GradientCheckpointingLayer

from molecli.backbones.diffusion import Diffusion
from molecli.backbones.pipeline import TEXT_ENCODERS


@contextmanager
def checkpointed(backbone: Diffusion, on: bool) -> Iterator[None]:
    """Inside, activations are computed again in the backward pass instead of kept, if `on`.

    The base stays in eval mode, so that its dropouts stay off; of a text encoder only the layers themselves are told
    that they train, which is what transformers asks before it saves memory.
    """
    unet: Any = backbone.pipe.unet
    parts = [getattr(backbone.pipe, name, None) for name in TEXT_ENCODERS]
    encoders = [part for part in parts if part is not None]
    layers = [m for encoder in encoders for m in encoder.modules() if isinstance(m, GradientCheckpointingLayer)]
    if on:
        unet.enable_gradient_checkpointing()
        for encoder in encoders:
            _called(encoder, "checkpointing_enable", {"use_reentrant": False})
        for layer in layers:
            layer.training = True
    try:
        yield
    finally:
        if on:
            unet.disable_gradient_checkpointing()
            for encoder in encoders:
                _called(encoder, "checkpointing_disable")
            for layer in layers:
                layer.training = False


def _called(encoder: Any, name: str, *arguments: Any) -> None:
    # The newer name of two: transformers 5.23 warns of the older one.
    method = getattr(encoder, f"activation_{name}", None) or getattr(encoder, f"gradient_{name}")
    method(*arguments)
