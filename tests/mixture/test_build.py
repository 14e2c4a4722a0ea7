"""`method.layers`: of the LoRAs only the part in a share of the base's depth acts, whatever composes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pair import NAMES, Pair, make_pair
from reference import read_naively
from torch import Tensor, nn

from molecli.bases.loading import load_backbone
from molecli.commands.compose import run_compose
from molecli.config import GateConfig, MethodConfig, load_recipe
from molecli.errors import UsageError
from molecli.experts import Expert
from molecli.files.composition import load_composition
from molecli.mixture.attach import attach
from molecli.mixture.build import build_mixture
from molecli.mixture.layout import blocks_of, layout_of

IDS = torch.randint(6, 200, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[..., Path]) -> Pair:
    return make_pair(tiny_folder("llama"), tmp_path_factory.mktemp("pair"))


@pytest.fixture
def experts(tiny_t5: Any, tmp_path: Path, make_peft_adapter: Callable[..., Path]) -> list[Expert]:
    folders = {n: make_peft_adapter(tiny_t5.model, tmp_path / n, rank=r, seed=r) for n, r in (("a", 4), ("b", 2))}
    return [read_naively(folder, name) for name, folder in folders.items()]


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS, decoder_input_ids=IDS[:, :4]).logits


def within(experts: list[Expert], *blocks: str) -> list[Expert]:
    """The experts in the blocks that are named alone, found by their names."""
    starts = tuple(f"{block}." for block in blocks)
    return [replace(e, factors={m: f for m, f in e.factors.items() if m.startswith(starts)}) for e in experts]


def test_an_encoders_blocks_come_before_the_decoders_and_memory_is_in_its_block(tiny_t5: Any) -> None:
    blocks = blocks_of(layout_of(tiny_t5.model))
    firsts = [".".join(block[0].split(".")[:3]) for block in blocks]
    assert firsts == ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"]
    assert "decoder.block.0.layer.1.EncDecAttention.k" in blocks[2]
    everything = [matrix for block in blocks for matrix in block]
    assert sorted(everything) == sorted(layout_of(tiny_t5.model).matrices())


def test_a_pipelines_text_encoder_comes_before_its_unet(tiny_sd: Any) -> None:
    from molecli.mixture.layout import host_of

    parts = [block[0].partition(".")[0] for block in blocks_of(layout_of(host_of(tiny_sd)))]
    assert parts == sorted(parts)
    assert set(parts) == {"text_encoder", "unet"}


@pytest.mark.parametrize(
    ("share", "blocks"),
    [
        ("0-25", ["encoder.block.0"]),
        ("25%-50%", ["encoder.block.1"]),
        ("0-60", ["encoder.block.0", "encoder.block.1"]),
        ("60 - 100", ["decoder.block.0", "decoder.block.1"]),
        ("87.5-100", ["decoder.block.1"]),
    ],
)
@pytest.mark.parametrize("mode", ["linear", "nla", "ties"])
def test_only_the_blocks_whose_middle_lies_in_the_share_act(
    tiny_t5: Any, experts: list[Expert], share: str, blocks: list[str], mode: str
) -> None:
    with build_mixture(tiny_t5.model, experts, mode=mode, method=MethodConfig(layers=share)):
        found = logits(tiny_t5.model)
    with build_mixture(tiny_t5.model, within(experts, *blocks), mode=mode):
        wanted = logits(tiny_t5.model)
    with build_mixture(tiny_t5.model, experts, mode=mode):
        whole = logits(tiny_t5.model)
    assert torch.equal(found, wanted)
    assert not torch.allclose(found, whole)


def test_gates_are_where_the_share_is(tiny_t5: Any, experts: list[Expert]) -> None:
    gate, method = GateConfig(granularity="block"), MethodConfig(layers="50-100")
    mixture = build_mixture(tiny_t5.model, experts, mode="gated", gate=gate, method=method)
    assert {site.name.removesuffix(".memory") for site in mixture.sites} == {"decoder.block.0", "decoder.block.1"}


def test_a_share_with_nothing_in_it_is_refused(tiny_t5: Any, experts: list[Expert]) -> None:
    with pytest.raises(UsageError) as caught:
        build_mixture(tiny_t5.model, experts, mode="linear", method=MethodConfig(layers="40-60"))
    assert str(caught.value) == (
        "method.layers: no LoRA adapts anything from 40 to 60% of the depth, and the base has 4 blocks. "
        "Write a wider share, such as 0-50."
    )


@pytest.mark.parametrize("share", ["20", "40-20", "0-120", "a-b", "20-20"])
def test_what_is_no_share_is_refused(share: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe(None, "compose", sets=[f"method.layers={share}"])
    assert "method.layers" in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("mode", ["linear", "single", "gated"])
def test_a_composition_remembers_its_share(pair: Pair, tmp_path: Path, mode: str) -> None:
    more = {"only": [NAMES[0]]} if mode == "single" else {}
    recipe = pair.recipe(tmp_path / "c", mode=mode, method={"layers": "0-50"}, **more)
    run_compose(recipe)
    assert load_composition(tmp_path / "c").settings["method"] == {"layers": "0-50"}
    model = load_backbone(recipe.base, "cpu").model
    with attach(model, composition=tmp_path / "c") as mixture, torch.no_grad():
        found = model(IDS).logits
    assert all("layers.0." in matrix for matrix in mixture.bank.matrices)
    assert len(load_composition(tmp_path / "c").experts[0].matrices) == 2 * len(mixture.bank.matrices)
    if mode == "linear":
        with attach(model, loras=pair.loras, method=MethodConfig(layers="0-50")), torch.no_grad():
            assert torch.equal(found, model(IDS).logits)
