"""Which matrix of a base a module's name means, by its endings: unique and the same for all, or refused."""

from __future__ import annotations

import pytest

from molecli.adapters.module_names import plain, resolved, same_layer, taken_for
from molecli.errors import MismatchError
from molecli.protocols import Matrices

SHAPE = (8, 8)


def names(
    *prefixes: str, layers: int = 2, leaves: tuple[str, ...] = ("q_proj", "v_proj")
) -> dict[str, tuple[int, ...]]:
    return {f"{p}layers.{i}.self_attn.{leaf}": SHAPE for p in prefixes for i in range(layers) for leaf in leaves}


@pytest.mark.parametrize(
    ("name", "bare"),
    [
        ("model.layers.0.q_proj", "model.layers.0.q_proj"),
        ("_orig_mod.model.layers.0.q_proj", "model.layers.0.q_proj"),
        ("module.base_model.model.model.layers.0.q_proj", "model.layers.0.q_proj"),
        ("base_model.model.base_model.model.lm_head", "lm_head"),
        ("model.layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.q_proj.base_layer", "model.layers.0.q_proj"),
    ],
)
def test_the_parts_of_wrappers_are_no_names(name: str, bare: str) -> None:
    assert plain(name) == bare


def test_a_name_of_the_base_is_what_it_says_even_if_it_looks_wrapped() -> None:
    base = names("module.model.", "model.")
    assert resolved("x", base, Matrices(base)) == {name: name for name in base}


def test_one_rewriting_holds_for_all_modules_under_a_prefix() -> None:
    base = Matrices(names("model.language_model.", "model.vision_tower.encoder."))
    found = resolved("x", names("model."), base)
    assert found == {name: name.replace("model.", "model.language_model.") for name in names("model.")}


def test_modules_of_another_part_are_not_those_of_the_language_model() -> None:
    for there in ("vision_tower.vision_model.encoder.", "audio_tower.", "talker.model.", "model.mtp."):
        assert resolved("x", names(there), Matrices(names("model."))) == {}
    for here in ("model.vision_tower.encoder.", "model.decoder.", "mtp."):
        assert resolved("x", names("model."), Matrices(names(here))) == {}


def test_a_prefix_that_the_base_has_is_not_rewritten_for_what_it_lacks() -> None:
    base = Matrices({**names("model.", layers=2), **names("model.language_model.", layers=4)})
    found = resolved("x", names("model.", layers=4), base)
    assert found == {name: name for name in names("model.", layers=2)}


def test_two_meanings_are_named_and_neither_is_taken() -> None:
    base = Matrices(names("thinker.model.", "text_model.model."))
    with pytest.raises(MismatchError) as caught:
        resolved("x", names("model."), base)
    meant = "'thinker.model.layers.0.self_attn.q_proj' or 'text_model.model.layers.0.self_attn.q_proj'"
    assert str(caught.value) == (
        f"x: 'model.layers.0.self_attn.q_proj' could mean {meant} in this base. "
        "Rename its modules to those of the base."
    )


def test_shapes_decide_between_two_meanings_as_does_what_all_modules_need() -> None:
    narrow = dict.fromkeys(names("thinker.model."), (4, 4))
    found = resolved("x", names("model."), Matrices({**narrow, **names("text_model.model.")}))
    assert set(found.values()) == set(names("text_model.model."))
    short = names("thinker.model.", layers=1)
    found = resolved("x", names("model."), Matrices({**short, **names("text_model.model.")}))
    assert set(found.values()) == set(names("text_model.model."))


def test_the_bases_own_rules_come_before_endings() -> None:
    base = Matrices({"model.mlp.gate": SHAPE}, renamed=lambda name: name.replace("block_sparse_moe", "mlp"))
    assert resolved("x", {"model.block_sparse_moe.gate": SHAPE}, base) == {
        "model.block_sparse_moe.gate": "model.mlp.gate"
    }


def test_an_output_head_is_found_under_a_wrappers_name() -> None:
    base = Matrices(names("model."), head={"lm_head": SHAPE})
    assert resolved("x", {"language_model.lm_head": SHAPE}, base) == {"language_model.lm_head": "lm_head"}
    assert "lm_head" not in base
    assert "lm_head" in base.named


def test_what_was_taken_for_what_is_said_once_for_all_layers() -> None:
    pairs = {f"a.layers.{i}.wrapped.q": f"layers.{i}.q" for i in range(3)}
    assert taken_for(pairs.items()) == ("a.layers.N.wrapped.* taken for layers.N.*",)
    assert taken_for([("lm_head", "lm_head")]) == ()


def test_a_layer_under_an_unknown_prefix_is_recognised_for_the_message() -> None:
    base = Matrices(names("backbone."))
    assert same_layer("model.layers.0.self_attn.q_proj", base) == "backbone.layers.0.self_attn.q_proj"
    assert same_layer("vision_tower.layers.0.self_attn.q_proj", base) == ""
    assert same_layer("model.layers.9.self_attn.q_proj", base) == ""


def test_a_second_lora_inside_the_first_has_the_same_name_so_that_it_is_refused() -> None:
    base = Matrices(names("model."))
    name = "model.layers.0.self_attn.q_proj"
    found = resolved("x", {name: SHAPE, f"{name}.base_layer": SHAPE}, base)
    assert found == {name: name, f"{name}.base_layer": name}
    assert resolved("x", {f"{name}.base_layer": SHAPE}, base) == {f"{name}.base_layer": name}
