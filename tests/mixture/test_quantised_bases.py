"""Mixtures on quantised bases: equal to PEFT on the same base, whatever the weights are stored in; the base restored.

Stand-ins of the libraries' layers run everywhere; the libraries themselves where they are installed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from gates import close, randomise
from packed import KINDS, READABLE, dense_twin, pack, unpacked
from torch import Tensor, nn

from molecli.bases.quantised import settled
from molecli.bases.weights import BaseWeights
from molecli.config import GateConfig
from molecli.errors import MismatchError, UsageError
from molecli.functional.fingerprint import fingerprint, same_base
from molecli.mixture.attach import attach, attach_composition
from molecli.mixture.layout import adaptable_matrices
from molecli.mixture.merged import MergedMixture

IDS = torch.randint(6, 200, (2, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 7, [0, 0] + [1] * 5])
GATE = GateConfig(granularity="block", input="hidden", pool="prompt", head="full", normalize="unit")
WEIGHTS = {"a": 0.7, "b": -0.4}
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(make_tiny: Callable[..., Any]) -> nn.Module:
    """A Llama that is wide enough for every library's blocks."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=262, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory, base: nn.Module, make_peft_adapter: Callable[..., Path]
) -> dict[str, str]:
    root = tmp_path_factory.mktemp("loras")
    return {n: str(make_peft_adapter(base, root / n, rank=r, seed=r, scale=0.1)) for n, r in {"a": 4, "b": 2}.items()}


def standing_in(base: nn.Module, kind: str) -> nn.Module:
    model: Any = copy.deepcopy(base)
    return pack(model, kind, head=model.lm_head)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=MASK).logits


def through_peft(model: nn.Module, folders: dict[str, str]) -> Tensor:
    """The logits of PEFT's own weighted sum of the LoRAs on the model, which it changes."""
    first, *others = folders
    adapted: Any = peft.PeftModel.from_pretrained(model, folders[first], adapter_name=first)  # type: ignore[arg-type]
    for name in others:
        adapted.load_adapter(folders[name], adapter_name=name)
    adapted.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "sum", combination_type="cat")
    adapted.set_adapter("sum")
    found = logits(adapted)
    adapted.unload()
    return found


def stored(model: nn.Module) -> dict[str, Tensor]:
    """Every number that the model stores, as it is stored."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in tensors}


# -- stand-ins ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_base_has_the_matrices_of_the_plain_one(base: nn.Module, kind: str) -> None:
    model = standing_in(base, kind)
    assert adaptable_matrices(model) == adaptable_matrices(base)
    assert all(BaseWeights(model).shape(name) == shape for name, shape in adaptable_matrices(base).items())


@pytest.mark.parametrize("kind", KINDS)
def test_fixed_and_gated_modes_equal_those_on_the_true_weights(
    base: nn.Module, folders: dict[str, str], kind: str
) -> None:
    model = standing_in(base, kind)
    before, packed, twin = logits(model), stored(model), dense_twin(model)
    expected = through_peft(copy.deepcopy(twin), folders)
    with attach(model, loras=folders, mode="linear", weights=WEIGHTS) as mixture:
        assert close(logits(model), expected)
        mixture.mask("a")
        only_b = logits(model)
    with attach(twin, loras={"b": folders["b"]}, weights={"b": WEIGHTS["b"]}):
        assert close(only_b, logits(twin))
    gated, reference = (attach(host, loras=folders, mode="gated", gate=GATE) for host in (model, twin))
    randomise(gated)
    reference.load_state_dict(gated.state_dict())
    with gated:
        found = logits(model)
        gates = gated.gates()
    with reference:
        assert close(found, logits(twin))
    assert gates.keys() == reference.gates().keys()
    assert torch.equal(logits(model), before)
    after = stored(model)
    assert after.keys() == packed.keys()
    assert all(after[name].dtype == value.dtype and torch.equal(after[name], value) for name, value in packed.items())


def test_fixed_modes_equal_peft_on_the_packed_base(base: nn.Module, folders: dict[str, str]) -> None:
    model = standing_in(base, "Columns")
    with attach(model, loras=folders, mode="linear", weights=WEIGHTS):
        found = logits(model)
    assert close(found, through_peft(model, folders))


def test_factors_compute_in_the_layers_type(base: nn.Module, folders: dict[str, str]) -> None:
    for kind in KINDS:
        model = standing_in(copy.deepcopy(base).bfloat16(), kind)
        with attach(model, loras=folders) as mixture:
            assert all(group.A.dtype in (torch.bfloat16, torch.float32) for group in mixture._groups)
            assert logits(model).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_mode_that_reads_the_base_gets_true_weights_or_refuses(
    base: nn.Module, folders: dict[str, str], kind: str
) -> None:
    weights = BaseWeights(standing_in(base, kind))
    if kind not in READABLE:
        with pytest.raises(UsageError, match="its weights are quantised"):
            weights.spectrum(Q)
        return
    true = unpacked(weights.model.get_submodule(Q))
    torch.testing.assert_close(weights.dense(Q), true, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights.spectrum(Q).S, torch.linalg.svdvals(true), rtol=1e-4, atol=1e-5)
    assert weights.spectrum(Q) is weights.spectrum(Q)
    assert weights.dtype(Q) == "float32"


@pytest.mark.parametrize("kind", KINDS)
def test_a_fingerprint_sees_through_the_packing(base: nn.Module, kind: str) -> None:
    import json

    model, again = standing_in(base, kind), standing_in(base, kind)
    assert fingerprint(model) == fingerprint(again)
    assert not same_base(fingerprint(model), fingerprint(base))
    assert json.loads(fingerprint(model))["structure"] == json.loads(fingerprint(base))["structure"] or kind == "Scaled"
    assert ("quantised" in json.loads(fingerprint(model))) == (kind != "Scaled")
    if kind in READABLE:
        assert same_base(fingerprint(model), fingerprint(dense_twin(model)))
    layer = again.get_submodule(Q)
    for tensor in (*layer.parameters(), *layer.buffers()):
        tensor.data = torch.zeros_like(tensor)
    if kind in READABLE:
        assert not same_base(fingerprint(model), fingerprint(again))


def test_a_composition_of_the_quantised_base_names_the_quantisation(
    base: nn.Module, folders: dict[str, str], tmp_path: Path
) -> None:
    from molecli.files.composition import Composition, record_of

    model = standing_in(base, "Columns")
    mixture = attach(model, loras=folders, mode="gated", gate=GATE)
    records, gate = tuple(record_of(expert) for expert in mixture.bank.experts), GATE.model_dump(mode="json")
    made = Composition(
        "gated", "site", "BASE", fingerprint(model), records, gate, {}, "a: 1\n", mixture.state_dict()
    )  # fmt: skip
    with attach_composition(model, made):
        logits(model)
    with pytest.raises(MismatchError) as caught:
        attach_composition(base, made, base="--base tiny")
    assert str(caught.value) == (
        "--base tiny: the composition was made on BASE, which was quantised (Columns), and this base is not quantised. "
        "Give --base BASE, or compose again."
    )


@pytest.mark.parametrize("kind", ["Columns", "Buffers"])
def test_merges_work_on_a_packed_base(base: nn.Module, folders: dict[str, str], kind: str) -> None:
    model = standing_in(base, kind)
    twin = dense_twin(model)
    mixtures = [attach(host, loras=folders, mode="ties") for host in (model, twin)]
    assert all(isinstance(mixture, MergedMixture) for mixture in mixtures)
    with mixtures[0]:
        found = logits(model)
    with mixtures[1]:
        assert close(found, logits(twin))


@pytest.mark.parametrize("mode", ["arrow", "xlora"])
def test_a_router_of_peft_acts_on_every_layer_or_is_refused(
    base: nn.Module, folders: dict[str, str], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = standing_in(base, "Columns")
    before, twin = logits(model), dense_twin(model)
    found, expected = (_routed(host, folders, mode) for host in (model, twin))
    assert close(found, expected)
    assert torch.equal(logits(model), before)
    with pytest.raises(UsageError) as caught:
        _routed(standing_in(base, "Buffers"), folders, mode)
    assert str(caught.value) == (
        "mixture: PEFT has no LoRA layer for a Buffers. Use another mode, or an unquantised base."
    )
    # As PEFT's own layers for GPTQ, AWQ and others, which know nothing of its routers.
    deaf = type("Deaf", (peft.tuners.lora.layer.LoraLayer, nn.Module), dict(vars(peft.tuners.lora.Linear)))
    monkeypatch.setattr(peft.tuners.lora.layer.Linear, "resolve_lora_variant", lambda *_, **__: None)
    if mode == "xlora":
        monkeypatch.setattr(peft.tuners.lora, "Linear", deaf)
    with pytest.raises(UsageError) as caught:
        _routed(model, folders, mode)
    name = {"arrow": "Arrow", "xlora": "X-LoRA"}[mode]
    assert str(caught.value) == (
        f"--mode {mode}: PEFT's {name} does not act on a Columns, and {Q} is one. "
        "Use another mode, or an unquantised base."
    )
    assert torch.equal(logits(model), before)


def _routed(model: nn.Module, folders: dict[str, str], mode: str) -> Tensor:
    torch.manual_seed(0)
    with attach(model, loras=folders, mode=mode), torch.no_grad():
        return model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits  # type: ignore[operator]


# -- the libraries -----------------------------------------------------------------------------------------------------


def _bitsandbytes(bits: int, dtype: torch.dtype) -> Any:
    pytest.importorskip("bitsandbytes")
    import transformers

    if bits == 8:
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def _torchao(bits: int, dtype: torch.dtype) -> Any:
    ao = pytest.importorskip("torchao.quantization")
    import transformers

    return transformers.TorchAoConfig(ao.Int8WeightOnlyConfig())


def _quanto(bits: int, dtype: torch.dtype) -> Any:
    pytest.importorskip("optimum.quanto")
    import transformers

    return transformers.QuantoConfig(weights=f"int{bits}")


LIBRARIES = [(_bitsandbytes, 4), (_bitsandbytes, 8), (_torchao, 8), (_quanto, 8), (_quanto, 4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("library", "bits"), LIBRARIES)
def test_a_library_s_base_equals_peft_and_is_restored(
    base: Any, folders: dict[str, str], tmp_path: Path, library: Callable[..., Any], bits: int, dtype: torch.dtype
) -> None:
    import transformers

    config = library(bits, dtype)
    base.save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=config, dtype=dtype
    )
    model = settled(model, dtype).eval()
    assert adaptable_matrices(model) == adaptable_matrices(base)
    before = logits(model)
    made = fingerprint(model)
    with attach(model, loras=folders, mode="linear", weights=WEIGHTS) as mixture:
        found = logits(model)
        mixture.mask("a", "b")
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), before)
    assert fingerprint(model) == made
    dense = BaseWeights(model).dense(Q)
    assert 1e-4 < float((dense - base.get_submodule(Q).weight).norm() / dense.norm()) < 0.2
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    torch.testing.assert_close(model.get_submodule(Q)(x).float(), x.float() @ dense.T, rtol=0.02, atol=0.05)
    if dtype is torch.float32:
        assert close(found, through_peft(model, folders), 1e-4)
        return
    # Half precision has no digits to compare: it must be as near as PEFT to what float32 gives.
    twin = copy.deepcopy(base)
    for name, parameter in twin.named_parameters():
        matrix = name.removesuffix(".weight")
        packed = matrix in adaptable_matrices(base)
        parameter.data = BaseWeights(model).dense(matrix) if packed else model.get_parameter(name).data.float()
    true = through_peft(twin, folders)
    assert _distance(found, true) < 1.5 * _distance(through_peft(model, folders), true)


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b).norm() / b.norm())
