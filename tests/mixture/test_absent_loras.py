"""A merged composition stands by its own file: what it still does when a LoRA it was made of is gone, and what not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from composed import save_composed
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from molecli.catalog.methods import METHODS
from molecli.errors import MismatchError, UsageError
from molecli.mixture.attach import attach

IDS = torch.randint(6, 200, (2, 7), generator=torch.Generator().manual_seed(0))
MERGES = [name for name, row in METHODS.items() if row.family == "merges"]


class World:
    """A base with two LoRAs in files, `a` on fewer matrices than `b`."""

    def __init__(self, folder: Path, base: Path, model: nn.Module, make: Callable[..., Path]) -> None:
        self.folder, self.base, self.model, self.make = folder, base, model, make
        self.loras = {
            "a": make(model, folder / "a", seed=1, rank=2, scale=0.1, targets=["q_proj", "down_proj"]),
            "b": make(model, folder / "b", seed=2, rank=2, scale=0.1),
        }

    def composed(self, mode: str, **sections: Any) -> Path:
        more = {"method.expression": "a - 0.5 * b"} if mode == "pem" else {}
        return save_composed(self.folder / mode, self.base, self.model, self.loras, mode, **more, **sections)

    def logits(self) -> Tensor:
        with torch.no_grad():
            return self.model(input_ids=IDS).logits

    def lose(self, *names: str) -> str:
        """Moves these LoRAs away; what is said of it."""
        for name in names:
            self.loras[name].rename(self.folder / f"moved-{name}")
        return ", ".join(f"no {name} at {self.loras[name]}" for name in names)


@pytest.fixture
def world(tmp_path: Path, tiny_folder: Callable[..., Path], tiny_llama: Any, make_peft_adapter: Any) -> World:
    return World(tmp_path, tiny_folder("llama"), tiny_llama.model, make_peft_adapter)


@pytest.mark.parametrize("mode", MERGES)
def test_it_acts_bit_for_bit_as_it_was_merged(world: World, mode: str) -> None:
    run, plain = world.composed(mode), world.logits()
    with attach(world.model, composition=run):
        expected = world.logits()
    assert not torch.equal(expected, plain)
    lost = world.lose("a")
    with pytest.warns(UserWarning, match="not all there") as said:
        mixture = attach(world.model, composition=run)
    with mixture:
        assert torch.equal(world.logits(), expected)
        assert mixture.names == ("a", "b")
    assert [str(one.message) for one in said] == [
        f"the LoRAs of this composition ({mode}) are not all there: {lost}. "
        "The merge is used as it is; --mask and --only need the LoRAs"
    ]


def test_a_share_of_the_depth_needs_no_lora_either(world: World) -> None:
    run = world.composed("ties", **{"method.layers": "0-50"})
    with attach(world.model, composition=run):
        expected = world.logits()
    world.lose("a", "b")
    with pytest.warns(UserWarning, match="not all there"):
        mixture = attach(world.model, composition=run)
    with mixture:
        assert torch.equal(world.logits(), expected)


def test_a_folder_without_its_weights_is_no_lora(world: World) -> None:
    run = world.composed("svd")
    (world.loras["a"] / "adapter_model.safetensors").unlink()
    with pytest.warns(UserWarning, match="no a at"):
        attach(world.model, composition=run)


def test_merging_anew_needs_all_and_says_which_is_missing(world: World) -> None:
    run = world.composed("ties")
    with attach(world.model, composition=run):
        expected = world.logits()
    lost = world.lose("a")
    with pytest.warns(UserWarning, match="not all there"):
        mixture = attach(world.model, composition=run)
    with mixture:
        for switch in (lambda: mixture.mask("b"), lambda: mixture.only("b"), lambda: mixture.mask("a", "b")):
            with pytest.raises(UsageError) as caught:
                switch()
            assert str(caught.value) == (
                f"LoRAs: --mask and --only merge the remaining LoRAs again, but there is {lost}. "
                "Put it back, or name all of them with --loras."
            )
        mixture.only("a", "b")
        assert torch.equal(world.logits(), expected)
        with pytest.raises(UsageError, match="no a at"):
            mixture.reweigh([1.0, 2.0])  # type: ignore[attr-defined]


def test_named_again_it_is_masked_as_ever(world: World) -> None:
    run = world.composed("ties")
    with attach(world.model, composition=run) as mixture:
        mixture.mask("b")
        expected = world.logits()
    world.lose("a")
    moved = {"a": str(world.folder / "moved-a"), "b": str(world.loras["b"])}
    with attach(world.model, composition=run, loras=moved) as mixture:
        mixture.mask("b")
        assert torch.equal(world.logits(), expected)


@pytest.mark.parametrize("missing", [(), ("a",)])
def test_a_lora_that_is_another_now_is_refused_whatever_else_is_missing(world: World, missing: tuple[str, ...]) -> None:
    run = world.composed("ties")
    world.lose(*missing)
    shutil.rmtree(world.loras["b"])
    world.make(world.model, world.loras["b"], seed=9, rank=2)
    expected = pytest.raises(MismatchError, match="b: its weights differ from those in the composition")
    if missing:
        with pytest.warns(UserWarning, match="no a at"), expected:
            attach(world.model, composition=run)
    else:
        with expected:
            attach(world.model, composition=run)


def test_a_lora_that_is_named_must_be_there(world: World) -> None:
    run = world.composed("ties")
    world.lose("a")
    with pytest.raises(UsageError, match="no such built-in LoRA, folder or file"):
        attach(world.model, composition=run, loras={name: str(path) for name, path in world.loras.items()})


@pytest.mark.parametrize("mode", ["linear", "gated"])
def test_others_cannot_do_without(world: World, mode: str) -> None:
    run = world.composed(mode)
    world.lose("a")
    with pytest.raises(UsageError, match="no such built-in LoRA, folder or file"):
        attach(world.model, composition=run)


def test_factors_that_do_not_fit_the_base_are_refused(world: World) -> None:
    file = world.composed("svd") / "composition.safetensors"
    with safe_open(file, "pt") as stored:
        metadata, tensors = stored.metadata(), {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
    key = next(name for name in tensors if name.endswith("/A"))
    world.lose("a", "b")
    for wrong, what in ((tensors[key][:, 1:].clone(), "do not fit"), (None, "is missing")):
        kept = {name: tensor for name, tensor in tensors.items() if name != key}
        save_file(kept if wrong is None else {**kept, key: wrong}, file, metadata=metadata)
        with pytest.warns(UserWarning, match="not all there"), pytest.raises(MismatchError, match=what):
            attach(world.model, composition=file)
