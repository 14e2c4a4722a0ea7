"""Sites: which adapted matrices share one gate, by the module names of a transformer.

A *stream* is the token axis along which a matrix works: `encoder`, `decoder` (also for all of a causal model), or
`memory`: the keys and values of cross-attention. These are in the decoder, but work on the encoder's tokens and are
computed once per generation. A site never mixes the decoder's axis with another one. Otherwise a gate per token would
not fit, and a cached key could depend on a later token.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from torch import nn

from molecli.protocols import Granularity, Group, Shape, Site, Stream

_CROSS = re.compile(r"cross|EncDecAttention|encoder_(decoder_)?att", re.IGNORECASE)  # in the names of cross-attentions
_KEYS_VALUES = ("k", "v", "k_proj", "v_proj", "key", "value", "to_k", "to_v")
# Leaf modules that read the same tensor if they have the same parent.
_SIBLINGS = (
    ("q", "k", "v"),
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("to_q", "to_k", "to_v"),
    ("gate_proj", "up_proj"),
    ("wi_0", "wi_1"),
    ("w1", "w3"),
)


def stream_of(matrix: str, *, seq2seq: bool) -> Stream:
    """The token axis along which `matrix` works."""
    if not seq2seq:
        return "decoder"
    if is_cross_key_or_value(matrix):
        return "memory"
    # The outermost name counts: BERT as a decoder calls its own layers an encoder.
    outermost = next((name for name in matrix.split(".") if name in ("encoder", "decoder")), "")
    return "encoder" if outermost == "encoder" else "decoder"


def is_cross_key_or_value(matrix: str) -> bool:
    """Whether it computes keys or values of cross-attention, from the encoder's tokens."""
    *around, leaf = matrix.split(".")
    return leaf in _KEYS_VALUES and any(_CROSS.search(name) for name in around)


def make_sites(
    matrices: Sequence[str],
    granularity: Granularity,
    *,
    seq2seq: bool,
    per_token: bool,
    shapes: Mapping[str, Shape] | None = None,
    apart: bool = False,
) -> list[Site]:
    """The gate sites over `matrices` (in model order); `shapes` tells which of them can read the same tensor, and with
    `apart` no two do.

    `per_token` gates of a seq2seq model cannot span encoder and decoder: then `network` has one site per axis.
    """
    members: dict[str, list[Group]] = {}
    stream = partial(stream_of, seq2seq=seq2seq)
    for group in groups_of(matrices, stream, fuse=granularity != "matrix" and not apart, shapes=shapes):
        members.setdefault(_site_name(group, granularity, seq2seq, per_token), []).append(group)
    return [Site(name, tuple(groups)) for name, groups in members.items()]


def _site_name(group: Group, granularity: Granularity, seq2seq: bool, per_token: bool) -> str:
    matrix = group.matrices[0]
    if granularity == "matrix":
        return matrix
    if granularity == "network":
        if not (seq2seq and per_token):
            return "network"
        return "network.decoder" if group.stream == "decoder" else "network.encoder"
    name = block_of(matrix) if granularity == "block" else layer_of(matrix)
    return f"{name}.memory" if group.stream == "memory" else name


def groups_of(
    matrices: Iterable[str],
    stream_of: Callable[[str], Stream],
    *,
    fuse: bool,
    shapes: Mapping[str, Shape] | None = None,
) -> list[Group]:
    """The matrices in groups that read the same tensor, ordered by their first; one group each without `fuse`.

    Where `shapes` says that siblings read tensors of other widths (RWKV's feed-forward), they are in other groups.
    """
    grouped: dict[tuple[str, object, Stream, object], list[str]] = {}
    for matrix in matrices:
        parent, _, leaf = matrix.rpartition(".")
        stream = stream_of(matrix)
        family = next((f for f in _SIBLINGS if leaf in f), None) if fuse else None
        width = shapes[matrix][1] if shapes is not None and matrix in shapes else None
        # In cross-attention the query reads the decoder, key and value the encoder: the stream separates them.
        grouped.setdefault((parent, family or leaf, stream, width), []).append(matrix)
    return [Group(tuple(members), stream) for (_, _, stream, _), members in grouped.items()]


def block_of(matrix: str) -> str:
    """The path up to the first index: `model.layers.3.mlp.up_proj` -> `model.layers.3`."""
    found = re.match(r"(.*?\.\d+)(?:\.|$)", matrix)
    return found.group(1) if found else matrix


def layer_of(matrix: str) -> str:
    """The sub-layer in the block; matrices directly in the block (BART's fc1, fc2) are its feed-forward sub-layer."""
    block = block_of(matrix)
    rest = matrix[len(block) + 1 :].split(".")
    if len(rest) <= 1:
        return f"{block}.feed_forward" if rest != [""] else block
    return f"{block}.{rest[0]}" + (f".{rest[1]}" if rest[1].isdigit() else "")


def as_registered(model: nn.Module, matrices: Iterable[str]) -> list[str]:
    """The matrices in the order of the model's modules; those without a layer of their own after their module's."""
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}

    def place(matrix: str) -> int:
        while matrix and matrix not in order:
            matrix = matrix.rpartition(".")[0]
        return order[matrix] if matrix else len(order)

    return sorted(matrices, key=place)
