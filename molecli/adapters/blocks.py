"""The names of UNet modules in the original Stable Diffusion code, which some LoRAs use."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Outside the blocks: name in diffusers -> original name.
_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_out": "out.2",
}
# Inside a resnet
_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def original_names(paths: Iterable[str]) -> dict[str, str]:
    """module path in diffusers' UNet -> its path in the original UNet, if it has one.

    `paths` must be those of a whole UNet: the original code numbers its blocks consecutively, one for each resnet (with
    the following attention) and one for each downsampler, so that each number depends on all blocks before it.
    """
    paths = list(paths)
    matches = {path: match for path in paths if (match := _BLOCK.fullmatch(path))}
    sizes: dict[tuple[str, int], int] = {}
    kinds: set[tuple[str, int, str]] = set()
    for side, block, kind, index, _ in (match.groups() for match in matches.values()):
        kinds.add((side, int(block), kind))
        if kind in ("resnets", "attentions"):
            sizes[side, int(block)] = max(sizes.get((side, int(block)), 0), int(index) + 1)
    starts = _starts(sizes, kinds)
    found = {path: _ENDS[path] for path in paths if path in _ENDS}
    for path in paths:
        if match := _MIDDLE.fullmatch(path):
            kind, index, rest = match.groups()
            found[path] = f"middle_block.{2 * int(index) + (kind == 'attentions')}.{_inner(kind, rest)}"
    for path, match in matches.items():
        side, number, kind, index, rest = match.groups()
        block = int(number)
        size, start = sizes[side, block], starts[side, block]
        blocks = "input_blocks" if side == "down" else "output_blocks"
        if kind == "downsamplers":
            found[path] = f"{blocks}.{start + size}.0.op"
        elif kind == "upsamplers":  # at the end of the last resnet's block, after the attention if there is one
            place = 2 if (side, block, "attentions") in kinds else 1
            found[path] = f"{blocks}.{start + size - 1}.{place}.{rest}"
        else:
            found[path] = f"{blocks}.{start + int(index)}.{int(kind == 'attentions')}.{_inner(kind, rest)}"
    return found


def _starts(sizes: dict[tuple[str, int], int], kinds: set[tuple[str, int, str]]) -> dict[tuple[str, int], int]:
    """(side, block) -> the original's number of its first resnet; input_blocks.0 is conv_in."""
    starts, following = {}, {"down": 1, "up": 0}
    for side, block in sorted(sizes):
        starts[side, block] = following[side]
        following[side] += sizes[side, block] + ((side, block, "downsamplers") in kinds)
    return starts


def _inner(kind: str, rest: str) -> str:
    return _RESNET.get(rest, rest) if kind == "resnets" else rest
