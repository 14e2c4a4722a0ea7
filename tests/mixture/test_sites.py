"""Sites: which matrices share a gate, in real architectures and by name alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from molecli.bases.language import adaptable_matrices
from molecli.mixture.sites import make_sites, stream_of
from molecli.protocols import Granularity, Site

SEQ2SEQ = {"t5", "bart"}


@pytest.fixture(scope="module")
def matrices(make_tiny: Callable[..., Any]) -> dict[str, list[str]]:
    """Kind -> names of its matrices, in the order of the model."""
    return {kind: list(adaptable_matrices(make_tiny(kind).model)) for kind in ("t5", "bart", "llama", "gpt2")}


def sites(names: list[str], granularity: Granularity, kind: str, *, per_token: bool = False) -> dict[str, Site]:
    made = make_sites(names, granularity, seq2seq=kind in SEQ2SEQ, per_token=per_token)
    assert len({site.name for site in made}) == len(made)
    return {site.name: site for site in made}


def leaves(site: Site) -> list[str]:
    return [matrix.rsplit(".", 1)[-1] for matrix in site.matrices]


T5_LAYERS = {
    "encoder.block.0.layer.0": ["q", "k", "v", "o"],
    "encoder.block.0.layer.1": ["wi_0", "wi_1", "wo"],
    "decoder.block.1.layer.0": ["q", "k", "v", "o"],
    "decoder.block.1.layer.1": ["q", "o"],
    "decoder.block.1.layer.1.memory": ["k", "v"],
    "decoder.block.1.layer.2": ["wi_0", "wi_1", "wo"],
}
BART_LAYERS = {
    "model.encoder.layers.0.self_attn": ["k_proj", "v_proj", "q_proj", "out_proj"],
    "model.encoder.layers.0.feed_forward": ["fc1", "fc2"],
    "model.decoder.layers.1.encoder_attn": ["q_proj", "out_proj"],
    "model.decoder.layers.1.encoder_attn.memory": ["k_proj", "v_proj"],
    "model.decoder.layers.1.feed_forward": ["fc1", "fc2"],
}
LLAMA_LAYERS = {
    "model.layers.0.self_attn": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "model.layers.1.mlp": ["gate_proj", "up_proj", "down_proj"],
}
GPT2_LAYERS = {"transformer.h.0.attn": ["c_attn", "c_proj"], "transformer.h.1.mlp": ["c_fc", "c_proj"]}


@pytest.mark.parametrize(
    ("kind", "count", "some"),
    [("t5", 12, T5_LAYERS), ("bart", 12, BART_LAYERS), ("llama", 4, LLAMA_LAYERS), ("gpt2", 4, GPT2_LAYERS)],
)
def test_a_layer_is_an_attention_or_a_feed_forward(
    matrices: dict[str, list[str]], kind: str, count: int, some: dict[str, list[str]]
) -> None:
    made = sites(matrices[kind], "layer", kind)
    assert len(made) == count
    assert {name: sorted(leaves(made[name])) for name in some} == {name: sorted(row) for name, row in some.items()}


BLOCKS = {
    "t5": [f"{half}.block.{i}" for half in ("encoder", "decoder") for i in (0, 1)],
    "bart": [f"model.{half}.layers.{i}" for half in ("encoder", "decoder") for i in (0, 1)],
    "llama": ["model.layers.0", "model.layers.1"],
    "gpt2": ["transformer.h.0", "transformer.h.1"],
}


@pytest.mark.parametrize("kind", list(BLOCKS))
def test_a_block_is_a_transformer_block_and_cross_attention_keys_stand_apart(
    matrices: dict[str, list[str]], kind: str
) -> None:
    made = sites(matrices[kind], "block", kind)
    memory = [f"{name}.memory" for name in BLOCKS[kind] if kind in SEQ2SEQ and "decoder" in name]
    assert sorted(made) == sorted([*BLOCKS[kind], *memory])
    assert all({leaf[0] for leaf in leaves(made[name])} == {"k", "v"} for name in memory)


@pytest.mark.parametrize("kind", list(BLOCKS))
def test_a_matrix_site_is_one_matrix_under_its_own_name(matrices: dict[str, list[str]], kind: str) -> None:
    made = sites(matrices[kind], "matrix", kind)
    assert list(made) == matrices[kind]
    assert all(site.matrices == (name,) for name, site in made.items())


@pytest.mark.parametrize("kind", list(BLOCKS))
@pytest.mark.parametrize("per_token", [False, True])
def test_a_network_is_one_site_unless_gates_per_token_meet_two_token_axes(
    matrices: dict[str, list[str]], kind: str, per_token: bool
) -> None:
    made = sites(matrices[kind], "network", kind, per_token=per_token)
    if kind in SEQ2SEQ and per_token:
        assert list(made) == ["network.encoder", "network.decoder"]
        # The keys and values of cross-attention run along the encoder's tokens.
        assert {group.stream for group in made["network.encoder"].groups} == {"encoder", "memory"}
        assert {group.stream for group in made["network.decoder"].groups} == {"decoder"}
    else:
        assert list(made) == ["network"]


@pytest.mark.parametrize("kind", list(BLOCKS))
@pytest.mark.parametrize("granularity", ["network", "block", "layer", "matrix"])
@pytest.mark.parametrize("per_token", [False, True])
def test_every_matrix_is_in_exactly_one_site(
    matrices: dict[str, list[str]], kind: str, granularity: Granularity, per_token: bool
) -> None:
    made = sites(matrices[kind], granularity, kind, per_token=per_token)
    assert sorted(m for site in made.values() for m in site.matrices) == sorted(matrices[kind])


@pytest.mark.parametrize("kind", list(BLOCKS))
@pytest.mark.parametrize("granularity", ["block", "layer", "matrix"])
def test_a_site_never_mixes_the_decoders_tokens_with_the_encoders(
    matrices: dict[str, list[str]], kind: str, granularity: Granularity
) -> None:
    for site in sites(matrices[kind], granularity, kind).values():
        assert len({group.stream == "decoder" for group in site.groups}) == 1


@pytest.mark.parametrize("kind", list(BLOCKS))
def test_a_network_starts_at_the_first_matrix_of_the_model(matrices: dict[str, list[str]], kind: str) -> None:
    (network,) = sites(matrices[kind], "network", kind).values()
    assert matrices[kind][0] in network.entry.matrices
    assert network.stream == ("encoder" if kind in SEQ2SEQ else "decoder")


QWEN = [
    f"model.layers.{i}.{part}.{leaf}_proj"
    for i in (0, 11)
    for part, leaves in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down")))
    for leaf in leaves
]


def test_matrices_that_read_one_tensor_share_a_projection() -> None:
    attention, mlp, *_ = make_sites(QWEN, "layer", seq2seq=False, per_token=False)
    assert [[m.rsplit(".", 1)[-1] for m in group.matrices] for group in attention.groups] == [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
    ]
    assert [[m.rsplit(".", 1)[-1] for m in group.matrices] for group in mlp.groups] == [
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]


def test_blocks_are_told_apart_by_their_whole_number() -> None:
    made = make_sites(QWEN, "block", seq2seq=False, per_token=False)
    assert [site.name for site in made] == ["model.layers.0", "model.layers.11"]
    assert [len(site.matrices) for site in made] == [7, 7]


def test_only_the_adapted_matrices_have_sites() -> None:
    adapted = [name for name in QWEN if name.endswith(("k_proj", "down_proj"))]
    made = make_sites(adapted, "layer", seq2seq=False, per_token=False)
    assert [site.name for site in made] == [
        f"model.layers.{i}.{part}" for i in (0, 11) for part in ("self_attn", "mlp")
    ]
    assert [site.matrices for site in made] == [(name,) for name in adapted]


def test_a_matrix_outside_every_block_is_its_own_site() -> None:
    for granularity in ("block", "layer"):
        (site,) = make_sites(["project_in"], granularity, seq2seq=False, per_token=False)
        assert (site.name, site.matrices) == ("project_in", ("project_in",))


@pytest.mark.parametrize(
    ("matrix", "stream"),
    [
        ("encoder.block.0.layer.0.SelfAttention.k", "encoder"),
        ("decoder.block.0.layer.0.SelfAttention.k", "decoder"),
        ("decoder.block.0.layer.1.EncDecAttention.q", "decoder"),
        ("decoder.block.0.layer.1.EncDecAttention.k", "memory"),
        ("decoder.block.0.layer.1.EncDecAttention.v", "memory"),
        ("decoder.block.0.layer.1.EncDecAttention.o", "decoder"),
        ("model.decoder.layers.0.encoder_attn.q_proj", "decoder"),
        ("model.decoder.layers.0.encoder_attn.v_proj", "memory"),
        ("model.decoder.layers.0.fc1", "decoder"),
        ("model.encoder.layers.0.fc1", "encoder"),
        ("decoder.bert.encoder.layer.0.attention.self.query", "decoder"),
        ("decoder.bert.encoder.layer.0.crossattention.self.key", "memory"),
    ],
)
def test_the_stream_of_a_matrix_follows_from_its_name(matrix: str, stream: Any) -> None:
    assert stream_of(matrix, seq2seq=True) == stream
    assert stream_of(matrix, seq2seq=False) == "decoder"


def test_siblings_of_other_widths_are_in_other_groups() -> None:
    names = ["blocks.0.feed_forward.key", "blocks.0.feed_forward.value"]
    shapes = {names[0]: (48, 32), names[1]: (32, 48)}
    (site,) = make_sites(names, "block", seq2seq=False, per_token=False, shapes=shapes)
    assert [group.matrices for group in site.groups] == [(name,) for name in names]
    (site,) = make_sites(names, "block", seq2seq=False, per_token=False)
    assert [group.matrices for group in site.groups] == [tuple(names)]
    (site,) = make_sites(names, "block", seq2seq=False, per_token=False, apart=True)
    assert len(site.groups) == 2
