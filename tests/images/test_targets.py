"""Targets of a LoRA on a diffusion base: attention, conv, all-linear, names and regexes, with and without the text."""

from __future__ import annotations

from typing import Any

import pytest

from molecli.errors import UsageError
from molecli.images.targets import by_component, picture_targets
from molecli.mixture.layout import adaptable_matrices, host_of


@pytest.fixture
def shapes(tiny_sd: Any) -> dict[str, tuple[int, ...]]:
    return adaptable_matrices(host_of(tiny_sd))


def test_attention_is_what_diffusers_dreambooth_adapts(shapes: dict[str, Any]) -> None:
    chosen = picture_targets("attention", shapes, text_encoder=False)
    layers = [name for name in shapes if name.endswith((".attn1.to_q", ".attn2.to_q"))]
    assert len(chosen) == 4 * len(layers)
    assert {name.partition(".attn")[2][2:] for name in chosen} == {"to_q", "to_k", "to_v", "to_out.0"}
    with_text = picture_targets("attention", shapes, text_encoder=True)
    assert by_component(with_text) == {"text_encoder": 8, "unet": len(chosen)}
    endings = {name.rpartition(".")[2] for name in with_text if name.startswith("text")}
    assert endings == {"q_proj", "k_proj", "v_proj", "out_proj"}


def test_all_linear_and_conv_together_are_every_matrix_of_the_unet(shapes: dict[str, Any]) -> None:
    linear = picture_targets("all-linear", shapes, text_encoder=False)
    conv = picture_targets(("conv",), shapes, text_encoder=False)
    unet = [name for name in shapes if name.startswith("unet.")]
    assert {len(shapes[name]) for name in linear} == {2}
    assert {len(shapes[name]) for name in conv} == {4}
    assert sorted(linear + conv) == sorted(unet)
    assert picture_targets("conv, all-linear", shapes, text_encoder=False) == unet  # in the base's own order


def test_names_and_regexes(shapes: dict[str, Any]) -> None:
    by_name = picture_targets("attn2.to_k, attn2.to_v", shapes, text_encoder=False)
    assert by_name == picture_targets(r"unet\..*attn2\.to_[kv]", shapes, text_encoder=True)
    assert picture_targets(("q_proj",), shapes, text_encoder=True)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("to_w", "adapter.targets: no matrix is called 'to_w'. Did you mean 'to_v'?"),
        (
            ("q_proj",),
            "adapter.targets: 'q_proj' is only in the text encoder, which is not adapted. Write --text-encoder to "
            "adapt it.",
        ),
        ("x.*", "adapter.targets: the regex 'x.*' matches no matrix. Names end in "),
    ],
)
def test_targets_that_name_nothing_are_refused(shapes: dict[str, Any], targets: Any, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        picture_targets(targets, shapes, text_encoder=False)
    assert str(caught.value).startswith(message)


def test_a_base_without_attention_is_told_so() -> None:
    with pytest.raises(UsageError) as caught:
        picture_targets("attention", {"unet.conv_in": (4, 4, 3, 3)}, text_encoder=False)
    message = "adapter.targets: this base has no attention layer. Write all-linear, or names of matrices of the base."
    assert str(caught.value) == message
