"""LoRAs on the output head, tied or not: PEFT's own result in every mode; gates there see the whole prompt."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from wrapped_bases import language_model, wrapper

from molecli.adapters import write_peft
from molecli.bases.language import adaptable_matrices
from molecli.config import GateConfig
from molecli.errors import UsageError
from molecli.mixture.attach import attach

IDS = torch.tensor([[0, 0, 9, 23, 40, 7], [8, 12, 61, 33, 18, 5]])
MASK = (IDS != 0).long()
NEW = 3


def build(kind: str, *, tied: bool, make_tiny: Any) -> Any:
    """A random model whose output head has the embeddings' weights, or its own."""
    if kind == "llama":
        return language_model("llama", tie_word_embeddings=tied)
    model = copy.deepcopy(make_tiny(kind).model)
    model.config.tie_word_embeddings = tied
    if tied:
        model.lm_head.weight = model.get_input_embeddings().weight
        if kind == "t5":
            model.config.scale_decoder_outputs = True  # T5 then scales what the head reads
    else:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)
    return model


def logits(model: nn.Module) -> Tensor:
    more = {"decoder_input_ids": IDS[:, 2:5]} if model.config.is_encoder_decoder else {}  # type: ignore[union-attr]
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=MASK, **more).logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("kind", "target"), [("llama", "q_proj"), ("t5", "q"), ("bart", "fc1"), ("gpt2", "c_attn")])
def test_a_head_as_peft_computes_it(
    kind: str, target: str, tied: bool, make_tiny: Any, make_peft_adapter: Any, tmp_path: Path
) -> None:
    model = build(kind, tied=tied, make_tiny=make_tiny)
    folder = make_peft_adapter(model, tmp_path / "a", targets=[target, "lm_head"])
    stored = [key for key in load_file(folder / "adapter_model.safetensors") if "base_layer" in key]
    assert stored  # PEFT stores a copy of the head, which is compared
    base, expected = logits(model), logits(peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).eval())
    for mode in ("linear", "cat", "svd"):
        with attach(model, loras={"a": folder}, mode=mode):
            assert (logits(model) - expected).norm() < 1e-5 * expected.norm()
        assert torch.equal(logits(model), base)
    with attach(model, loras={"a": folder}) as mixture:
        factors = mixture.bank.experts[0].factors
        exported = write_peft(tmp_path / "b", factors, "org/base", fan_in_fan_out=kind == "gpt2")
    read = logits(peft.PeftModel.from_pretrained(copy.deepcopy(model), str(exported)).eval())
    assert (read - expected).norm() < 1e-5 * expected.norm()
    assert (expected - base).norm() > 0.01 * base.norm()


def test_all_linear_has_no_head(make_tiny: Any) -> None:
    matrices = adaptable_matrices(build("llama", tied=True, make_tiny=make_tiny))
    assert "lm_head" not in matrices
    assert matrices.head == {"lm_head": (96, 32)}
    assert matrices.tables == {"model.embed_tokens": (96, 32), "lm_head": (96, 32)}


@pytest.mark.parametrize("pool", ["prompt", "running", "token"])
@pytest.mark.parametrize("granularity", ["network", "layer"])
def test_a_gate_at_the_head_is_the_same_in_generation_training_and_alone(
    granularity: Any, pool: Any, make_tiny: Any, make_peft_adapter: Any, tmp_path: Path
) -> None:
    model = build("llama", tied=True, make_tiny=make_tiny)
    loras = {
        n: make_peft_adapter(model, tmp_path / n, targets=["q_proj", "lm_head"], seed=i) for i, n in enumerate("ab")
    }
    torch.manual_seed(0)
    gate = GateConfig(granularity=granularity, pool=pool, init_std=3.0)
    how = {"max_new_tokens": NEW, "min_new_tokens": NEW, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad(), attach(model, loras=loras, mode="gated", gate=gate) as mixture:
        made = model.generate(input_ids=IDS, attention_mask=MASK, do_sample=False, **how)
        generated = torch.stack(made.logits, 1)
        head = mixture.gates()["network" if granularity == "network" else "lm_head"]
        ids, mask = made.sequences, torch.cat([MASK, torch.ones(2, NEW, dtype=torch.long)], 1)
        labels = ids.masked_fill(torch.arange(ids.shape[1]) < IDS.shape[1], -100)
        forced = model(input_ids=ids, attention_mask=mask, labels=labels).logits
        torch.testing.assert_close(generated, forced[:, IDS.shape[1] - 1 : -1], rtol=1e-4, atol=1e-5)
        if pool == "prompt":
            torch.testing.assert_close(mixture.gates()["network" if granularity == "network" else "lm_head"], head)
        # As the training loss asks: only some tokens' logits, named by their places.
        places = torch.tensor([2, 5, 7])
        some = model(
            input_ids=ids,
            attention_mask=mask,
            labels=labels,
            logits_to_keep=places,
            shift_labels=labels[:, places].contiguous(),
        )
        torch.testing.assert_close(some.logits, forced[:, places], rtol=1e-5, atol=1e-6)
        for row in range(2):
            real = MASK[row].bool()
            alone = model.generate(input_ids=IDS[row : row + 1, real], do_sample=False, **how)
            torch.testing.assert_close(torch.stack(alone.logits, 1)[0], generated[row], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pool", ["prompt", "token"])
@pytest.mark.parametrize(("kind", "target"), [("t5", "q"), ("bart", "fc1")])
def test_a_gate_at_the_head_of_a_decoder(
    kind: str, target: str, pool: Any, make_tiny: Any, make_peft_adapter: Any, tmp_path: Path
) -> None:
    """The head reads the decoder's tokens after the decoder has ended; T5 scales them first."""
    model = build(kind, tied=True, make_tiny=make_tiny)
    loras = {n: make_peft_adapter(model, tmp_path / n, targets=[target, "lm_head"], seed=i) for i, n in enumerate("ab")}
    torch.manual_seed(0)
    gate = GateConfig(granularity="layer", pool=pool, init_std=3.0)
    how = {"max_new_tokens": NEW, "min_new_tokens": NEW, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad(), attach(model, loras=loras, mode="gated", gate=gate) as mixture:
        assert "lm_head" in mixture.gate_modules()
        made = model.generate(input_ids=IDS, attention_mask=MASK, do_sample=False, **how)
        forced = model(input_ids=IDS, attention_mask=MASK, decoder_input_ids=made.sequences[:, :-1]).logits
        torch.testing.assert_close(torch.stack(made.logits, 1), forced, rtol=1e-4, atol=1e-4)
        for row in range(2):
            one = {"input_ids": IDS[row : row + 1], "attention_mask": MASK[row : row + 1]}
            alone = model(**one, decoder_input_ids=made.sequences[row : row + 1, :-1]).logits
            torch.testing.assert_close(alone[0], forced[row], rtol=1e-4, atol=1e-4)
        memory = model.get_encoder()(input_ids=IDS, attention_mask=MASK)
        kept = model(encoder_outputs=memory, attention_mask=MASK, decoder_input_ids=made.sequences[:, :-1]).logits
        torch.testing.assert_close(kept, forced, rtol=1e-5, atol=1e-5)


def test_a_gate_at_the_head_of_a_multimodal_model(make_peft_adapter: Any, tmp_path: Path) -> None:
    model = wrapper("gemma3")
    targets = r".*language_model.*\.q_proj|lm_head"
    loras = {n: make_peft_adapter(model, tmp_path / n, targets=targets, seed=i) for i, n in enumerate("ab")}
    gate = GateConfig(granularity="layer", init_std=3.0)
    with torch.no_grad(), attach(model, loras=loras, mode="gated", gate=gate):
        whole = model(input_ids=IDS, attention_mask=MASK).logits
        last = model(input_ids=IDS, attention_mask=MASK, logits_to_keep=1).logits
    torch.testing.assert_close(last, whole[:, -1:], rtol=1e-5, atol=1e-6)


def test_the_head_is_the_end_of_the_depth(make_tiny: Any, make_peft_adapter: Any, tmp_path: Path) -> None:
    from molecli.config import MethodConfig

    model = build("llama", tied=False, make_tiny=make_tiny)
    folder = make_peft_adapter(model, tmp_path / "a", targets=["q_proj", "lm_head"])
    for share, adapted in (("0-100", 3), ("50-100", 2), ("0-50", 1)):
        with attach(model, loras={"a": folder}, method=MethodConfig(layers=share)) as mixture:
            assert len(mixture.bank.matrices) == adapted
            assert ("lm_head" in mixture.bank.matrices) == share.endswith("100")


def test_x_lora_cannot_weigh_a_head(make_tiny: Any, make_peft_adapter: Any, tmp_path: Path) -> None:
    model = build("llama", tied=False, make_tiny=make_tiny)
    loras = {
        n: make_peft_adapter(model, tmp_path / n, targets=["q_proj", "lm_head"], seed=i) for i, n in enumerate("ab")
    }
    with pytest.raises(UsageError, match="one adapts the output head, which reads only some of the tokens"):
        attach(model, loras=loras, mode="xlora")


# Copies of the base's own weights


@pytest.fixture
def headed(make_tiny: Any, make_peft_adapter: Any, tmp_path: Path) -> tuple[Any, Path]:
    """(a model, a LoRA on its head, with PEFT's copy of the head)."""
    model = build("llama", tied=False, make_tiny=make_tiny)
    return model, make_peft_adapter(model, tmp_path / "a", targets=["q_proj", "lm_head"])


def edited(folder: Path, edit: Callable[[Tensor], Tensor], name: str = "lm_head.base_layer.weight") -> Path:
    file, key = folder / "adapter_model.safetensors", f"base_model.model.{name}"
    tensors = load_file(file)
    start = tensors.get(key, tensors["base_model.model.lm_head.base_layer.weight"])
    save_file({**tensors, key: edit(start).contiguous()}, file)
    return folder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_copy_may_be_rounded(dtype: torch.dtype, headed: Any) -> None:
    model, folder = headed
    edited(folder, lambda weight: weight.to(dtype))
    with attach(model, loras={"a": folder}) as mixture:
        assert "lm_head" in mixture.bank.matrices


@pytest.mark.parametrize("name", ["lm_head.base_layer.weight", "lm_head.weight"])
def test_a_trained_copy_is_refused_by_name(name: str, headed: Any) -> None:
    model, folder = headed
    edited(folder, lambda weight: weight + 1e-4, name)
    with pytest.raises(UsageError, match=r"it brings its own lm_head\.weight .*trained or of a resized vocabulary"):
        attach(model, loras={"a": folder})


def test_embeddings_that_differ_are_refused_by_name(headed: Any) -> None:
    model, folder = headed
    edited(folder, lambda weight: model.model.embed_tokens.weight.clone(), "model.embed_tokens.weight")
    attach(model, loras={"a": folder})
    edited(folder, lambda weight: weight + 1, "model.embed_tokens.weight")
    with pytest.raises(UsageError, match=r"it brings its own model.embed_tokens.weight .*merge_and_unload"):
        attach(model, loras={"a": folder})


def test_a_copy_of_a_quantised_head_cannot_be_compared(headed: Any) -> None:
    model, folder = headed
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UsageError, match=r"repeats the base's lm_head\.weight .*quantised here and cannot be compared"):
        attach(model, loras={"a": folder})


def test_a_resized_vocabulary_is_refused_by_name(make_tiny: Any, make_peft_adapter: Any, tmp_path: Path) -> None:
    model, grown = (build("llama", tied=False, make_tiny=make_tiny) for _ in range(2))
    grown.resize_token_embeddings(100)
    targets = {"beside": ["q_proj"], "adapted": ["q_proj", "lm_head"]}
    for name, modules in targets.items():
        folder = make_peft_adapter(grown, tmp_path / name, targets=modules)
        file = folder / "adapter_model.safetensors"
        tensors = {k: t for k, t in load_file(file).items() if "base_layer" not in k}
        if name == "beside":  # as PEFT stores it where it knows the size of the base's vocabulary
            tensors["base_model.model.lm_head.weight"] = grown.lm_head.weight.detach().clone()
        save_file(tensors, file)
        with pytest.raises(
            UsageError, match="its vocabulary was resized: its lm_head has 100 rows, and this base's 96"
        ):
            attach(model, loras={"a": folder}, allow_partial=True)
