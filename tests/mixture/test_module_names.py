"""LoRA files whose modules have other names than the base's: PEFT's own result, said aloud; or refused."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from moe import MOES, moe
from torch import Tensor, nn
from wrapped_bases import PREFIX, WRAPPERS, language_model, logits, rewritten, wrapper

from molecli.errors import MismatchError
from molecli.files.composition import Composition, record_of, save_composition
from molecli.functional.fingerprint import fingerprint
from molecli.mixture.attach import attach

INNER = "model.language_model."
TARGETS = r".*language_model.*\.(q_proj|v_proj|up_proj)"
# other name -> (what it makes of a wrapper's key, how that is told)
OTHER_NAMES: dict[str, tuple[Callable[[str], str], str]] = {
    "transformers 4": (
        lambda key: key.replace(INNER, "language_model.model."),
        "language_model.model.* taken for model.language_model.*",
    ),
    "the language model alone": (
        lambda key: key.replace(INNER, "model."),
        "model.* taken for model.language_model.*",
    ),
    "torch.compile": (lambda key: key.replace(PREFIX, f"{PREFIX}_orig_mod."), "_orig_mod.* taken for *"),
    "DDP": (lambda key: f"module.{key}", "module.base_model.model.* taken for *"),
    "a doubled prefix": (lambda key: PREFIX + key, "base_model.model.* taken for *"),
    "FSDP, checkpointing": (
        lambda key: re.sub(
            r"(layers\.\d+)", r"\1._checkpoint_wrapped_module", key.replace(PREFIX, f"{PREFIX}_fsdp_wrapped_module.")
        ),
        "_fsdp_wrapped_module.model.language_model.layers.N._checkpoint_wrapped_module.* taken for "
        "model.language_model.layers.N.*",
    ),
    "an unknown wrapper": (
        lambda key: key.replace(PREFIX, f"{PREFIX}pretrained_model."),
        "pretrained_model.* taken for *",
    ),
}  # fmt: skip


def mixed(model: nn.Module, folder: Path, **options: Any) -> tuple[Tensor, list[str]]:
    """(the logits with the LoRA in `folder`, what was said about it)."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with attach(model, loras={"a": folder}, **options):
            out = logits(model)
    return out, [str(one.message) for one in said if str(one.message).startswith("a: ")]


def peft_logits(model: nn.Module, folder: Path) -> Tensor:
    return logits(peft.PeftModel.from_pretrained(model, str(folder)).eval())


@pytest.fixture(scope="module", params=list(WRAPPERS))
def on_wrapper(request: Any, make_peft_adapter: Any, tmp_path_factory: Any) -> tuple[str, Any, Path, Tensor]:
    """(kind, a multimodal model, a LoRA of its language model, PEFT's logits)."""
    kind = request.param
    folder = make_peft_adapter(wrapper(kind), tmp_path_factory.mktemp(kind) / "a", targets=TARGETS)
    return kind, wrapper(kind), folder, peft_logits(wrapper(kind), folder)


@pytest.mark.parametrize("other", list(OTHER_NAMES))
def test_one_module_has_several_names(other: str, on_wrapper: Any, tmp_path: Path) -> None:
    _, model, folder, expected = on_wrapper
    edit, told = OTHER_NAMES[other]
    base = logits(model)
    plain, nothing = mixed(model, folder)
    assert nothing == []
    out, said = mixed(model, rewritten(folder, tmp_path / "a", edit))
    assert said == [f"a: module names {told}"]
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(out, plain)
    assert (out - base).norm() > 0.01 * base.norm()
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("kind", ["gemma3", "llava", "mistral3", "paligemma"])
def test_peft_reads_old_names_as_we_do(kind: str, make_peft_adapter: Any, tmp_path: Path) -> None:
    folder = make_peft_adapter(wrapper(kind), tmp_path / "new", targets=TARGETS)
    old = rewritten(folder, tmp_path / "old", OTHER_NAMES["transformers 4"][0])
    torch.testing.assert_close(mixed(wrapper(kind), old)[0], peft_logits(wrapper(kind), old), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "old", ["", "language_model.model.", "model.language_model.", "model.text_model.", "llm.model."]
)
def test_a_wrappers_lora_on_the_language_model_alone(old: str, make_peft_adapter: Any, tmp_path: Path) -> None:
    llama = language_model("llama")
    folder = make_peft_adapter(llama, tmp_path / "a", targets=["q_proj", "down_proj"])
    expected = peft_logits(language_model("llama"), folder)
    other = rewritten(folder, tmp_path / "b", lambda key: key.replace(f"{PREFIX}model.", PREFIX + old))
    out, said = mixed(llama, other)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    (line,) = said
    assert "taken for" in line


def test_the_language_model_of_an_adapter_with_the_vision_tower_too(make_peft_adapter: Any, tmp_path: Path) -> None:
    model = wrapper("qwen2_5_vl")
    folder = make_peft_adapter(model, tmp_path / "a", targets=r".*(\.q_proj|visual.*\.qkv)")
    expected = peft_logits(wrapper("qwen2_5_vl"), folder)

    def older(key: str) -> str:
        key = key.replace(f"{PREFIX}{INNER}", f"{PREFIX}model.")
        return key.replace(f"{PREFIX}model.visual", f"{PREFIX}visual")

    old = rewritten(folder, tmp_path / "old", older)
    out, said = mixed(model, old)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert said == ["a: module names model.* taken for model.language_model.*, * taken for model.*"]


def test_a_lora_mostly_of_the_vision_tower_is_not_used_without_it(make_peft_adapter: Any, tmp_path: Path) -> None:
    kinds = {
        "few": r".*language_model.*0.*\.q_proj|.*vision_tower.*(_proj|fc1|fc2)",
        "most": r".*language_model.*_proj|.*vision_tower.*0.*q_proj",
    }
    llama = language_model("llama")
    for name, targets in kinds.items():
        folder = make_peft_adapter(wrapper("llava"), tmp_path / name, targets=targets)
        with pytest.raises(
            MismatchError, match=r"of its \d+ matrices are not in this base.*% of its weights"
        ) as caught:
            mixed(llama, folder)
        assert ("--allow-partial" in str(caught.value)) == (name == "most")
        if name == "few":
            with pytest.raises(MismatchError, match="% of its weights"):
                mixed(llama, folder, allow_partial=True)
        else:
            _, said = mixed(llama, folder, allow_partial=True)
            assert "are left out" in said[-1]
            assert "% of its weights" in said[-1]


def test_a_composition_reads_its_loras_again_in_the_same_way(make_peft_adapter: Any, tmp_path: Path) -> None:
    """Other names and a part that is left out: accepted when it was made, said again when it is read."""
    llama = language_model("llama")
    targets = r".*language_model.*_proj|.*vision_tower.*0.*q_proj"
    folder = make_peft_adapter(wrapper("llava"), tmp_path / "a", targets=targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with attach(llama, loras={"a": folder}, allow_partial=True) as mixture:
            expected = logits(llama)
            records = tuple(record_of(expert) for expert in mixture.bank.experts)
            tensors = mixture.state_dict()
    composition = Composition("linear", "weights", "BASE", fingerprint(llama), records, None, {}, "a: 1\n", tensors)
    save_composition(tmp_path / "made", composition)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with attach(llama, composition=tmp_path / "made"):
            assert torch.equal(logits(llama), expected)
    told = [str(one.message) for one in said]
    assert "a: module names model.language_model.* taken for model.*" in told
    assert any("% of its weights" in text for text in told)


def test_one_lora_under_two_names_is_told(make_peft_adapter: Any, tmp_path: Path) -> None:
    llama = language_model("llama")
    folder = make_peft_adapter(llama, tmp_path / "a", targets=["q_proj"])
    with pytest.warns(UserWarning, match="a and b are the same LoRA: it counts twice"):
        attach(llama, loras={"a": folder, "b": folder})


@pytest.mark.parametrize("kind", MOES)
def test_routed_experts_under_other_names(kind: str, make_peft_adapter: Any, tmp_path: Path) -> None:
    """Fused weights have no layers of their own: their names follow those of the other modules."""
    model = moe(kind)
    folder = make_peft_adapter(model, tmp_path / "a", scale=0.2, **MOES[kind][1])
    plain, _ = mixed(model, folder)
    for name, edit in {
        "compiled": lambda key: key.replace(PREFIX, f"{PREFIX}_orig_mod."),
        "wrapped": lambda key: key.replace(PREFIX, f"{PREFIX}pretrained_model."),
        "ddp": lambda key: f"module.{key}",
    }.items():
        out, _ = mixed(model, rewritten(folder, tmp_path / name, edit))
        assert torch.equal(out, plain)
