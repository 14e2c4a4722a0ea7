"""Frozen models that host experts. Names are resolved on first use: importing this package imports no torch."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_EXPORTS = {
    "load_backbone": "molecli.backbones.loading",
    "load_skeleton": "molecli.backbones.loading",
    "pick_device": "molecli.backbones.loading",
    "adaptable_matrices": "molecli.backbones.layouts",
    "Seq2Seq": "molecli.backbones.seq2seq",
    "Causal": "molecli.backbones.causal",
    "Diffusion": "molecli.backbones.diffusion",
}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
