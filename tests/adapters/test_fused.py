"""LoRAs on fused parameters, in PEFT's stacked layout and by expert as before transformers 5, and their refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from moe import MOES, moe, peft_logits, relative
from safetensors.torch import load_file, save_file
from torch import Tensor

from molecli.adapters import LoraSpec, read_expert, write_peft
from molecli.adapters.fused import slice_of
from molecli.bases.fused import fused_parameters, fused_places
from molecli.experts import LowRank
from molecli.mixture.layout import adaptable_matrices

OLD = {
    "qwen3_moe": ("mlp.experts", ("gate_proj", "up_proj", "down_proj"), "mlp.gate"),
    "mixtral": ("block_sparse_moe.experts", ("w1", "w3", "w2"), "block_sparse_moe.gate"),
    "deepseek_v3": ("mlp.experts", ("gate_proj", "up_proj", "down_proj"), "mlp.gate"),
}
LAYER = "model.layers.1"


@pytest.fixture
def stacked(make_peft_adapter: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """`stacked(kind, model)` -> the folder of a LoRA that PEFT wrote."""
    return lambda kind, model, **more: make_peft_adapter(model, tmp_path / kind, **{**MOES[kind][1], **more})


def changed(folder: Path, **entries: Any) -> Path:
    """The folder with these entries in its configuration."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))
    return folder


def read(folder: Path, model: Any, **options: Any) -> Any:
    return read_expert(LoraSpec("x", str(folder)), adaptable_matrices(model), **options)


def old_lora(kind: str, model: Any, folder: Path, *, skip: str = "") -> dict[str, Tensor]:
    """A LoRA of transformers 4 on the experts and the router of one layer, and each layer's update."""
    experts, (gate, up, down), router = OLD[kind]
    shapes = adaptable_matrices(model)
    wide, width = shapes[f"{LAYER}.mlp.experts.0.gate_up_proj"]
    torch.manual_seed(3)
    tensors, updates = {}, {}
    ends = [(f"{experts}.{e}.{n}", s) for e in range(4) for n, s in _by_name(gate, up, down, wide, width) if n != skip]
    for end, (d_out, d_in) in [*ends, (router, (4, width))]:
        name = f"{LAYER}.{end}"
        A, B = 0.3 * torch.randn(3, d_in), 0.3 * torch.randn(d_out, 3)
        tensors |= {f"base_model.model.{name}.lora_A.weight": A, f"base_model.model.{name}.lora_B.weight": B}
        updates[name] = 2.0 * B @ A
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = [name for name in (gate, up, down, "gate") if name != skip]
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": targets, "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return updates


def _by_name(gate: str, up: str, down: str, wide: int, width: int) -> list[tuple[str, tuple[int, int]]]:
    return [(gate, (wide // 2, width)), (up, (wide // 2, width)), (down, (width, wide // 2))]


@pytest.mark.parametrize("kind", OLD)
def test_old_keys_are_the_rows_of_the_fused_matrices(kind: str, tmp_path: Path) -> None:
    model = moe(kind)
    updates = old_lora(kind, model, tmp_path / "old")
    expert = read(tmp_path / "old", model)
    experts, (gate, up, down), router = OLD[kind]
    assert len(expert.factors) == 2 * 4 + 1
    for e in range(4):
        old, now = f"{LAYER}.{experts}.{e}", f"{LAYER}.mlp.experts.{e}"
        both = torch.cat([updates[f"{old}.{gate}"], updates[f"{old}.{up}"]])
        torch.testing.assert_close(expert.factors[f"{now}.gate_up_proj"].delta(), both)
        torch.testing.assert_close(expert.factors[f"{now}.down_proj"].delta(), updates[f"{old}.{down}"])
    torch.testing.assert_close(expert.factors[f"{LAYER}.mlp.gate"].delta(), updates[f"{LAYER}.{router}"])


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_other_prefixes_are_found_by_block_and_name(kind: str, stacked: Any) -> None:
    model = moe(kind)
    folder = stacked(kind, model, targets=["gate_proj", "up_proj", "down_proj"] if kind == "qwen3_moe" else [])
    patterns = {r"^model\.layers\.1\.mlp\.experts\.down_proj": 6}
    wanted, file = read(changed(folder, alpha_pattern=patterns), model), folder / "adapter_model.safetensors"
    assert 1.5 in {factor.scaling for factor in wanted.factors.values()}
    changed(folder, alpha_pattern={r"^model\.language_model\.layers\.1\.mlp\.experts\.down_proj": 6})
    save_file({n.replace(".model.layers", ".model.language_model.layers"): t for n, t in load_file(file).items()}, file)
    again = read(folder, model)
    assert again.factors.keys() == wanted.factors.keys()
    assert all(torch.equal(again.factors[n].delta(), factor.delta()) for n, factor in wanted.factors.items())


def test_one_of_gate_and_up_leaves_the_other_rows_alone(tmp_path: Path) -> None:
    model = moe("qwen3_moe")
    updates = old_lora("qwen3_moe", model, tmp_path / "old", skip="gate_proj")
    delta = read(tmp_path / "old", model).factors[f"{LAYER}.mlp.experts.2.gate_up_proj"].delta()
    assert not delta[:16].any()
    torch.testing.assert_close(delta[16:], updates[f"{LAYER}.mlp.experts.2.up_proj"])


@pytest.mark.parametrize("kind", MOES)
def test_stacked_factors_give_the_updates_of_peft(kind: str, stacked: Any) -> None:
    model = moe(kind)
    folder = stacked(kind, model, use_rslora=True, alpha_pattern={"down_proj": 3})
    adapted = peft.PeftModel.from_pretrained(moe(kind), str(folder)).base_model.model
    factors = read(folder, model).factors
    seen = set()
    for (module, parameter), names in fused_parameters(model).items():
        if names[0] not in factors:
            continue
        layer = adapted.get_submodule(module)
        while layer.parameter_name != parameter:
            layer = layer.base_layer
        delta = layer.get_delta_weight("default")
        for e, name in enumerate(names):
            theirs = delta if delta.dim() == 2 else delta[e]
            theirs = theirs.T if layer.get_base_layer().__dict__.get("is_transposed") else theirs
            torch.testing.assert_close(factors[name].delta(), theirs, rtol=1e-5, atol=1e-6)
            seen.add(name)
    assert seen == set(factors) & set(fused_places(model))


def test_slices_of_a_stack_are_peft_s_interleaving() -> None:
    a, b = torch.arange(24.0).reshape(6, 4), torch.arange(30.0).reshape(5, 6)
    naive = torch.einsum("o r e, e r i -> e o i", b.reshape(5, 2, 3), a.reshape(3, 2, 4))
    for e in range(3):
        A, B = slice_of(a, b, e, 3)
        assert torch.equal(B @ A, naive[e])


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "llama4_text", "jetmoe"])
def test_written_again_it_is_what_peft_wrote(kind: str, stacked: Any, tmp_path: Path) -> None:
    model = moe(kind)
    folder = stacked(kind, model)
    expert = read(folder, model)
    written = write_peft(tmp_path / "again", expert.factors, "x", parameters=fused_parameters(model))
    again = read(written, model)
    assert again.factors.keys() == expert.factors.keys()
    for name, factor in expert.factors.items():
        torch.testing.assert_close(again.factors[name].delta(), factor.delta())
    assert relative(peft_logits(model, written), peft_logits(model, folder)) < 1e-5


def test_unequal_ranks_and_missing_experts_are_padded_in_the_stack(stacked: Any, tmp_path: Path) -> None:
    model = moe("qwen3_moe")
    factors = dict(read(stacked("qwen3_moe", model), model).factors)
    name = f"{LAYER}.mlp.experts.1.down_proj"
    wider, missing = factors[name], f"{LAYER}.mlp.experts.3.down_proj"
    factors[name] = LowRank(torch.cat([wider.A, wider.A]), torch.cat([wider.B, wider.B], 1), 0.5)
    del factors[missing]
    again = read(write_peft(tmp_path / "w", factors, "x", parameters=fused_parameters(model)), model).factors
    torch.testing.assert_close(again[name].delta(), factors[name].delta())
    assert not again.pop(missing).delta().any()
    assert again.keys() == factors.keys()


def test_another_number_of_experts_is_refused(stacked: Any, explained: Any) -> None:
    model = moe("qwen3_moe")
    folder = stacked("qwen3_moe", model)
    shapes = {n: s for n, s in adaptable_matrices(model).items() if ".experts.3." not in n}
    explained(
        lambda: read_expert(LoraSpec("x", str(folder)), shapes),
        3,
        f"x ({folder / 'adapter_model.safetensors'}): its factors of 'model.layers.0.mlp.experts.down_proj' have "
        "16 rows, not 3 times the rank 4: that parameter has 3 matrices in this base. Name the base it was trained on "
        "with --base.",
    )


def test_a_file_with_fewer_levels_than_parameters_is_refused(stacked: Any, explained: Any) -> None:
    model = moe("qwen3_moe")
    folder = stacked("qwen3_moe", model)
    file = folder / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if ".base_layer." not in n}, file)
    explained(
        lambda: read(folder, model),
        3,
        f"x ({file}): target_parameters names 2 parameters of 'model.layers.0.mlp.experts' in this base "
        "(gate_up_proj, down_proj), and the file has factors for 1. Name the base it was trained on with --base.",
    )


def test_a_rank_other_than_the_configured_one_is_refused(stacked: Any, explained: Any) -> None:
    model = moe("gpt_oss")
    folder = changed(stacked("gpt_oss", model), rank_pattern={"gate_up_proj": 3})
    explained(
        lambda: read(folder, model),
        3,
        f"x ({folder / 'adapter_model.safetensors'}): its factors of 'model.layers.0.mlp.experts.gate_up_proj' have 16 "
        "rows, not 4 times the rank 3: that parameter has 4 matrices in this base. Name the base it was trained on "
        "with --base.",
    )
    folder = changed(folder, rank_pattern={"q_proj": 3})
    explained(
        lambda: read(folder, model),
        3,
        f"x ({folder / 'adapter_model.safetensors'}): 'model.layers.0.self_attn.q_proj' has rank 4, but "
        "adapter_config.json says 3. Its two files belong to different LoRAs, or rank_pattern is missing.",
    )


def test_names_of_parameters_that_are_no_list_are_refused(stacked: Any, explained: Any) -> None:
    model = moe("gpt_oss")
    folder = changed(stacked("gpt_oss", model), target_parameters="gate_up_proj")
    explained(
        lambda: read(folder, model),
        3,
        f"x ({folder / 'adapter_model.safetensors'}): target_parameters is 'gate_up_proj'. It lists names of "
        "parameters.",
    )


def test_a_dense_base_lacks_them_all(stacked: Any, tiny_llama: Any, explained: Any) -> None:
    folder = stacked("gpt_oss", moe("gpt_oss"), targets=[])
    explained(
        lambda: read(folder, tiny_llama.model),
        3,
        f"x ({folder / 'adapter_model.safetensors'}): it was made for another base: this one lacks all its 6 matrices, "
        "such as 'model.layers.0.mlp.experts.base_layer'. Name the base it was trained on with --base.",
    )
