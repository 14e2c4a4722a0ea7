"""Experts on a diffusion pipeline: its sites, and the passes of its parts, which hooks observe.

PipelineLayout       what a mixture needs to know of a model    make_pipeline_sites    which matrices share a gate
PipelineStreams      the current pass of each part              positions              a map as rows of positions

A site never mixes axes: positions of the UNet (`spatial`), tokens of a text encoder or the keys and values of
cross-attention computed from them (`text`), and the single vector of the denoising time (`time`). Every position sees
every other, with padding (CLIP is trained to read it), so all positions count in a mean.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from molecli.bases.pipeline import PipelineModules, idle_matrices, in_call_order, pipeline_matrices
from molecli.catalog.methods import SUM, Kind
from molecli.errors import RunError, UsageError
from molecli.mixture.call_scale import TextScale, called_scale
from molecli.mixture.caller import calling_pipeline
from molecli.mixture.sites import as_registered, block_of, groups_of, layer_of
from molecli.mixture.streams import Pass, Streams, outside
from molecli.mixture.unet_rows import RowModules
from molecli.protocols import Gate, Granularity, Group, Reading, Shape, Site, Stream


class PipelineLayout:
    """The layout of a diffusion pipeline."""

    kind: Kind = "pictures"

    seq2seq = False

    def __init__(self, model: PipelineModules) -> None:
        self.model = model
        self.memory_width: int | None = None

    def matrices(self) -> dict[str, Shape]:
        """See `pipeline.pipeline_matrices`."""
        return pipeline_matrices(self.model)

    def in_order(self, matrices: Iterable[str]) -> list[str]:
        """The matrices in the order of the pipeline's calls."""
        return in_call_order(as_registered(self.model, matrices))

    def streams(self) -> Streams:
        """The passes of the UNet and the text encoder(s)."""
        return PipelineStreams(self.model)

    def outside(self, matrices: Iterable[str]) -> list[str]:
        """None: gates can be at every matrix of a pipeline."""
        return []

    def sites(self, matrices: Sequence[str], granularity: Granularity, *, per_token: bool) -> list[Site]:
        """See `make_pipeline_sites`; without sites whose output is not used."""
        sites = make_pipeline_sites(matrices, granularity, per_token=per_token)
        idle = idle_matrices(self.model)
        return [site for site in sites if not idle.issuperset(site.matrices)]


_TIME = ("time_embedding", "add_embedding", "time_emb_proj")


def pipeline_stream_of(matrix: str) -> Stream:
    """The axis along which `matrix` works."""
    part, *names = matrix.split(".")
    if part == "unet" and "motion_modules" in names:
        return "spatial"
    if part != "unet" or ("attn2" in names and names[-1] in ("to_k", "to_v")):
        return "text"
    return "time" if any(name in _TIME for name in names) else "spatial"


def make_pipeline_sites(matrices: Sequence[str], granularity: Granularity, *, per_token: bool) -> list[Site]:
    """The gate sites over `matrices` (in call order).

    network: one site for the UNet's positions, one for its keys and values of the text, one for its times, and one for
    each text encoder; block: an `attentions.J` or `resnets.J` of the UNet, or a layer of a text encoder; layer:
    self-attention, cross-attention, feed-forward, projections and residual blocks separately; matrix: each matrix.
    Raises: UsageError for a gate per position over the whole UNet, whose resolutions differ.
    """
    members: dict[str, list[Group]] = {}
    for group in groups_of(matrices, pipeline_stream_of, fuse=granularity != "matrix"):
        members.setdefault(_site_name(group, granularity), []).append(group)
    sites = [Site(name, tuple(groups)) for name, groups in members.items()]
    if per_token and granularity == "network" and any(site.stream == "spatial" for site in sites):
        what = "'token' has one gate per position, but granularity 'network' spans the UNet's different resolutions"
        raise UsageError("gate.pool", what, "Use pool auto or mean, or granularity block, layer or matrix.")
    return sites


def _site_name(group: Group, granularity: Granularity) -> str:
    matrix = group.matrices[0]
    part = matrix.partition(".")[0]
    if granularity == "matrix":
        return matrix
    if granularity == "network":
        name = part
    elif part == "unet":
        name = _unet_block(matrix) if granularity == "block" else _unet_layer(matrix)
    else:
        name = block_of(matrix) if granularity == "block" else layer_of(matrix)
    return name + _suffix(group, name)


def _suffix(group: Group, name: str) -> str:
    """The suffix of UNet sites along another axis, which would have the same name as the site of positions."""
    if not group.matrices[0].startswith("unet.") or group.stream == "spatial" or name.rpartition(".")[2] in _TIME:
        return ""
    return ".memory" if group.stream == "text" else ".time"


def _unet_block(matrix: str) -> str:
    """`unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q` -> `unet.down_blocks.0.attentions.1`."""
    found = re.match(r"unet\.(?:(?:down|up)_blocks\.\d+|mid_block)\.\w+\.\d+", matrix)
    return found.group() if found else ".".join(matrix.split(".")[:2])


def _unet_layer(matrix: str) -> str:
    """The attention, feed-forward or projection inside the block; a residual block is one layer."""
    found = re.match(r"unet\..*?\.(?:attentions|motion_modules)\.\d+\.(?:transformer_blocks\.\d+\.)?\w+", matrix)
    return found.group() if found else _unet_block(matrix)


@dataclass
class PartPass(Pass):
    """A pass of one part: the rows of its input and, in a film, its frames; `divider` tells what splits its rows."""

    rows: int | None = None
    frames: int | None = None
    divider: Callable[[], str | None] = lambda: None


# Layers of a film's UNet that read the frames at each position: [rows * positions, frames, C].
_MOTION = ("motion_modules", "temp_attentions", "transformer_in")


class PipelineStreams:
    """The current pass of the UNet and of each text encoder."""

    probing = False

    def __init__(self, model: PipelineModules) -> None:
        self.model = model
        self.passes = {name: PartPass() for name, _ in model.named_children()}
        self._text_scale = 1.0  # of the prompt that the pipeline encodes now

    def attach(self, on_pass: Callable[[], Any], *, pools: bool = False) -> list[RemovableHandle]:
        """Hooks that count the passes of every part; `on_pass` is called at the start of each."""
        self.passes = {name: PartPass() for name in self.passes}
        handles = []
        for name, part in self.model.named_children():
            handles.append(part.register_forward_pre_hook(self._begin(name, on_pass), with_kwargs=True))
            handles.append(part.register_forward_hook(self._end(name)))
        if hasattr(self.model.pipe, "encode_prompt"):
            handles.append(TextScale(self.model.pipe, self._note_text_scale))
        return handles

    def _note_text_scale(self, scale: float) -> None:
        self._text_scale = scale

    def parts(self) -> Sequence[nn.Module]:
        """The UNet and the text encoder(s)."""
        return list(self.model.children())

    def optional(self, matrices: Sequence[str]) -> Collection[str]:
        """None: each part always has its input."""
        return ()

    def of(self, site: Site) -> PartPass:
        """The pass of the part that contains the site's matrices; the site's name begins with it."""
        return self.passes[site.name.partition(".")[0]]

    def axes(self, stream: Stream) -> None:
        """None: every input has pictures before positions."""

    def check_shared(self) -> None:
        """Nothing: no gate is shared between axes."""

    def reading(
        self, site: Site, x: Tensor, u: Tensor, state: tuple[Tensor, Tensor] | None, *, gate: Gate, first: bool | None
    ) -> Reading:
        """x and u as [B, positions, .], without masks; the positions of a film are those of all its frames."""
        current = self.of(site)
        if current.step == 0:
            raise outside()
        self._check_rows(site.entry.matrices[0], x, current)
        if x.dim() == 4 and x.shape[-2:] != u.shape[-2:]:
            # For a convolution with a stride, the gates are at its output's positions and read the input under each.
            x = F.adaptive_avg_pool2d(x, (u.shape[-2], u.shape[-1]))
        x, u = positions(x), positions(u)
        if current.rows not in (None, x.shape[0]):
            x, u = (part.reshape(current.rows, -1, part.shape[-1]) for part in (x, u))
        return Reading(x, u, None, None, shared=current.shared)

    def fitted(self, matrix: str, value: Tensor, x: Tensor) -> Tensor:
        """`value` for each row of x: the frames of a film, or the positions in it, belong to the film's row."""
        rows = value.shape[0]
        if value.dim() == 1 or (value.dim() == 2 and rows in (1, x.shape[0])):
            return value
        current = self.passes[matrix.partition(".")[0]]
        self._check_rows(matrix, x, current)
        if rows == x.shape[0]:
            return value
        if value.dim() == 2:
            return value.repeat_interleave(len(x) // rows, dim=0)
        return value.reshape(len(x), -1, value.shape[-1])

    def _check_rows(self, matrix: str, x: Tensor, current: PartPass) -> None:
        """Raises: RunError if x, the input of `matrix`, has other rows than the call of its part, so that it is not
        known which gate belongs to which."""
        if current.frames is None and current.rows in (None, x.shape[0]):
            return
        times, rest = divmod(len(x), current.rows or len(x))
        moving = current.frames is not None and any(name in matrix for name in _MOTION)
        fits = rest == 0 and (times in (1, current.frames) or (moving and x.shape[1] == current.frames))
        divider = current.divider() if current.frames is not None else None
        if fits and divider is None:
            return
        why = divider or f"{matrix} is called with {len(x)} rows, and the call has {current.rows}"
        what = f"each row of the call has its own gate, and rows are split: {why}"
        raise RunError("gates", what, f"Use a mode with the same weights for every row, such as {SUM}.")

    def _unet_scale(self, kwargs: Mapping[str, Any]) -> float:
        """The call's factor. Raises: RunError if another pipeline calls, whose text encoders it does not reach."""
        scale, pipe = called_scale(kwargs), self.model.pipe
        if scale != 1.0 and pipe is not None and self.model.text_encoders and calling_pipeline(pipe) is not pipe:
            what = "a scale reaches the text encoders only in the pipeline that the LoRAs are attached to"
            raise RunError("pipeline", what, "Attach the LoRAs to the pipeline that you call.")
        return scale

    def _begin(self, name: str, on_pass: Callable[[], Any]) -> Callable[..., None]:
        rows_of = ("sample", "input_ids")[name != "unet"]
        modules = RowModules(self.model.get_submodule(name))

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            on_pass()
            given = args[0] if args else kwargs.get(rows_of)
            shape = tuple(given.shape) if isinstance(given, Tensor) else (None,)
            rows, frames = shape[0], shape[2] if len(shape) == 5 else None
            scale = self._unet_scale(kwargs) if name == "unet" else self._text_scale
            self.passes[name] = PartPass(
                self.passes[name].step + 1,
                learning=torch.is_grad_enabled(),
                scale=scale,
                rows=rows,
                frames=frames,
                divider=modules.divider,
            )

        return hook

    def _end(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            self.passes[name].over = True

        return hook


def positions(x: Tensor) -> Tensor:
    """[B, T, C] of a map [B, C, H, W], of tokens [B, T, C], or of one vector per row [B, C]."""
    if x.dim() == 4:
        return x.flatten(2).transpose(1, 2)
    return x.unsqueeze(1) if x.dim() == 2 else x
