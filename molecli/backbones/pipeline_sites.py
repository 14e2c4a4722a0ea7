"""Sites of a diffusion pipeline: which adapted matrices of UNet and text encoder(s) share one gate.

A site never mixes axes: positions of the UNet (`spatial`), tokens of a text encoder or the keys and values of
cross-attention made of them (`text`), and the one vector of the denoising time (`time`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from molecli.backbones.sites import block_of, groups_of, layer_of
from molecli.errors import UsageError
from molecli.protocols import Granularity, Group, Site, Stream

_TIME = ("time_embedding", "add_embedding", "time_emb_proj")


def pipeline_stream_of(matrix: str) -> Stream:
    """The axis that `matrix` works along."""
    part, *names = matrix.split(".")
    if part != "unet" or ("attn2" in names and names[-1] in ("to_k", "to_v")):
        return "text"
    return "time" if any(name in _TIME for name in names) else "spatial"


def make_pipeline_sites(matrices: Sequence[str], granularity: Granularity, *, per_token: bool) -> list[Site]:
    """The gate sites over `matrices` (in call order).

    network: the UNet's positions, its keys and values of the text, its times, and each text encoder; block: one
    `attentions.J` or `resnets.J` of the UNet, one layer of a text encoder; layer: self-attention, cross-attention,
    feed-forward, projections and residual blocks apart; matrix: each alone.
    Raises: UsageError for a gate per position over the whole UNet, whose resolutions differ.
    """
    members: dict[str, list[Group]] = {}
    for group in groups_of(matrices, pipeline_stream_of, fuse=granularity != "matrix"):
        members.setdefault(_site_name(group, granularity), []).append(group)
    sites = [Site(name, tuple(groups)) for name, groups in members.items()]
    if per_token and granularity == "network" and any(site.stream == "spatial" for site in sites):
        what = "'token' has one gate per position, and the UNet's resolutions differ within the one site of 'network'"
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
    """What sets the UNet's sites along another axis apart from those at the same place that follow its positions."""
    if not group.matrices[0].startswith("unet.") or group.stream == "spatial" or name.rpartition(".")[2] in _TIME:
        return ""
    return ".memory" if group.stream == "text" else ".time"


def _unet_block(matrix: str) -> str:
    """`unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q` -> `unet.down_blocks.0.attentions.1`."""
    found = re.match(r"unet\.(?:(?:down|up)_blocks\.\d+|mid_block)\.\w+\.\d+", matrix)
    return found.group() if found else ".".join(matrix.split(".")[:2])


def _unet_layer(matrix: str) -> str:
    """The attention, feed-forward or projection inside the block; a residual block is one layer."""
    found = re.match(r"unet\..*?\.attentions\.\d+\.(?:transformer_blocks\.\d+\.)?\w+", matrix)
    return found.group() if found else _unet_block(matrix)
