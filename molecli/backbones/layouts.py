"""What the engine asks of any hosting model, a language model or a diffusion pipeline: one seam for both.

Contents: Layout, layout_of, blocks_of, host_of, adaptable_matrices.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from torch import nn

from molecli.backbones import text
from molecli.backbones.pipeline import PipelineModules, idle_matrices, in_call_order, pipeline_matrices
from molecli.backbones.pipeline_sites import make_pipeline_sites
from molecli.backbones.pipeline_streams import PipelineStreams
from molecli.backbones.sites import make_sites
from molecli.backbones.streams import Streams, TextStreams
from molecli.errors import UsageError
from molecli.protocols import Granularity, Shape, Site


class Layout(Protocol):
    """How experts sit on one kind of model.

    seq2seq: whether it has an encoder and a decoder; memory_width: that of the encoder's output, which the gates of a
    decoder read as the prompt, None where there is no such thing.
    """

    seq2seq: bool
    memory_width: int | None

    def matrices(self) -> dict[str, Shape]:
        """Adaptable matrices: name -> shape."""
        ...

    def in_order(self, matrices: Iterable[str]) -> list[str]:
        """The matrices in the order of a forward pass; unknown ones last."""
        ...

    def streams(self) -> Streams:
        """Fresh passes for one mixture."""
        ...

    def sites(self, matrices: Sequence[str], granularity: Granularity, *, per_token: bool) -> list[Site]:
        """The gate sites over `matrices`, which are in order."""
        ...


class TextLayout:
    """A language model of transformers."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.seq2seq = bool(getattr(model.config, "is_encoder_decoder", False))
        width = getattr(model.config, "d_model", None) or model.config.hidden_size
        self.memory_width: int | None = int(width)

    def matrices(self) -> dict[str, Shape]:
        """Every linear layer but the output head."""
        return text.adaptable_matrices(self.model)

    def in_order(self, matrices: Iterable[str]) -> list[str]:
        """In the order of the model's modules, which is that of its forward pass."""
        return _as_registered(self.model, matrices)

    def streams(self) -> Streams:
        """The passes of encoder and decoder."""
        return TextStreams(self.model, seq2seq=self.seq2seq)

    def sites(self, matrices: Sequence[str], granularity: Granularity, *, per_token: bool) -> list[Site]:
        """See `sites.make_sites`."""
        return make_sites(matrices, granularity, seq2seq=self.seq2seq, per_token=per_token)


class PipelineLayout:
    """A diffusion pipeline."""

    seq2seq = False

    def __init__(self, model: PipelineModules) -> None:
        self.model = model
        self.memory_width: int | None = None

    def matrices(self) -> dict[str, Shape]:
        """See `pipeline.pipeline_matrices`."""
        return pipeline_matrices(self.model)

    def in_order(self, matrices: Iterable[str]) -> list[str]:
        """In the order of the pipeline's calls."""
        return in_call_order(_as_registered(self.model, matrices))

    def streams(self) -> Streams:
        """The passes of the UNet and the text encoder(s)."""
        return PipelineStreams(self.model)

    def sites(self, matrices: Sequence[str], granularity: Granularity, *, per_token: bool) -> list[Site]:
        """See `pipeline_sites.make_pipeline_sites`; no site where nothing could be learned."""
        sites = make_pipeline_sites(matrices, granularity, per_token=per_token)
        idle = idle_matrices(self.model)
        return [site for site in sites if not idle.issuperset(site.matrices)]


def layout_of(model: nn.Module) -> Layout:
    """The layout of a language model, or of the modules of a diffusion pipeline."""
    return PipelineLayout(model) if isinstance(model, PipelineModules) else TextLayout(model)


def blocks_of(layout: Layout) -> list[tuple[str, ...]]:
    """The adaptable matrices by block, in the order of a forward pass: an encoder's blocks before the decoder's.

    A block is a site of granularity `block`, with those of its matrices that run along other tokens.
    """
    blocks: dict[str, list[str]] = {}
    for site in layout.sites(layout.in_order(layout.matrices()), "block", per_token=False):
        blocks.setdefault(site.name.removesuffix(".memory").removesuffix(".time"), []).extend(site.matrices)
    return [tuple(matrices) for matrices in blocks.values()]


def host_of(model: Any) -> nn.Module:
    """The module that experts are attached to: `model` itself, or the parts of a diffusers pipeline.

    Raises: UsageError for anything else.
    """
    if isinstance(model, nn.Module):
        return model
    if isinstance(getattr(model, "unet", None), nn.Module):
        return PipelineModules(model)
    what = f"experts go on a model or a diffusers pipeline with a UNet, not on a {type(model).__name__}"
    raise UsageError("attach", what, "Write a transformers model or a StableDiffusion(XL)Pipeline.")


def adaptable_matrices(model: nn.Module) -> dict[str, Shape]:
    """Adaptable matrices of any hosting model: name -> shape."""
    return layout_of(model).matrices()


def _as_registered(model: nn.Module, matrices: Iterable[str]) -> list[str]:
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    return sorted(matrices, key=lambda matrix: order.get(matrix, len(order)))
