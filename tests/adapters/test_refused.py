"""Every LoRA that cannot be read says why, with its exit code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import safe_open

from molecli.adapters import LoraSpec, read_expert, read_info

PLAIN = "Use a plain LoRA (or rsLoRA)."
MERGE = "Use a plain LoRA, or merge it into its base (PEFT's merge_and_unload) and use that as the base."
AGAIN = "Download or export it again."
STORED_FIRST = "decoder.block.0.layer.0.SelfAttention.q"  # a safetensors file sorts its keys
FIRST = "encoder.block.0.layer.0.SelfAttention.q"


def where(folder: Path) -> str:
    return f"x ({folder / 'adapter_model.safetensors'})"


def info_of(path: Path) -> Callable[[], Any]:
    return lambda: read_info(LoraSpec("x", str(path)))


def expert_of(path: Path, matrices: Any, **options: Any) -> Callable[[], Any]:
    return lambda: read_expert(LoraSpec("x", str(path)), matrices, **options)


# Paths


def test_a_missing_path(tmp_path: Path, explained: Any) -> None:
    path = tmp_path / "none"
    explained(info_of(path), 2, f"{path}: no such built-in LoRA, folder or file. Check the path.")


def test_a_folder_without_weights(tmp_path: Path, explained: Any) -> None:
    message = f"{tmp_path}: it has no adapter_model.safetensors. Name a PEFT folder or a .safetensors file."
    explained(info_of(tmp_path), 2, message)


def test_a_file_of_another_kind(tmp_path: Path, explained: Any) -> None:
    path = tmp_path / "lora.txt"
    path.write_text("")
    message = f"{path}: it is not a .safetensors file. Name a PEFT folder or a .safetensors file."
    explained(info_of(path), 2, message)


def test_an_unreadable_configuration(adapter: Path, explained: Any) -> None:
    config = adapter / "adapter_config.json"
    config.unlink()
    config.mkdir()
    explained(info_of(adapter), 2, f"{config}: it cannot be read (Is a directory). Check the path and its permissions.")


def test_unreadable_weights(adapter: Path, explained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *args: Any, **options: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    file = adapter / "adapter_model.safetensors"
    message = f"{file}: it cannot be read (Permission denied). Check the path and its permissions."
    explained(info_of(adapter), 2, message)


def test_a_hub_id_that_is_not_cached_while_offline(
    explained: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = (
        "nobody/none: no such folder or file, and it is not in the hub's local cache (HF_HUB_OFFLINE is set). "
        "Check the path, or unset HF_HUB_OFFLINE to download."
    )
    explained(info_of(Path("nobody/none")), 2, message)


class Response:
    """As much of a response as the hub's errors look at."""

    status_code, headers, request, text = 500, {"x-request-id": "1"}, None, ""


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (
            RepositoryNotFoundError("gone", response=Response()),
            2,
            "no such folder, file or hub repository. Check the path.",
        ),
        (
            LocalEntryNotFoundError("offline"),
            1,
            "no such folder or file, and the hub cannot be reached. Check the path and the network.",
        ),
        (
            OSError(28, "No space left on device"),
            1,
            "it cannot be downloaded ([Errno 28] No space left on device). Try again.",
        ),
    ],
)
def test_a_hub_id_that_cannot_be_downloaded(
    error: Exception, code: int, message: str, explained: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*args: Any, **options: Any) -> str:
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    explained(info_of(Path("nobody/none")), code, f"nobody/none: {message}")


def test_a_hub_id_is_downloaded(adapter: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repository, **options: str(adapter))
    info = read_info(LoraSpec("x", "org/lora"))
    assert (info.source, info.path) == ("org/lora", adapter / "adapter_model.safetensors")


@pytest.mark.parametrize("suffix", ["bin", "pt", "ckpt"])
def test_a_pickle(suffix: str, tmp_path: Path, explained: Any) -> None:
    path = tmp_path / f"adapter_model.{suffix}"
    path.write_bytes(b"")
    message = f"{path}: it is a pickle, which is refused because it can run code when it is loaded. "
    message += "Save it again with safe_serialization=True."
    explained(info_of(path), 2, message)
    explained(info_of(tmp_path), 2, message)


# Damage


def test_a_truncated_file(adapter: Path, explained: Any) -> None:
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    message = f"{file}: it is a damaged safetensors file (incomplete metadata, file not fully covered). {AGAIN}"
    explained(info_of(adapter), 3, message)


def test_a_file_of_noise(adapter: Path, explained: Any) -> None:
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(b"\xff" * 64)
    explained(info_of(adapter), 3, f"{file}: it is a damaged safetensors file (header too large). {AGAIN}")


def test_a_git_lfs_pointer(adapter: Path, explained: Any) -> None:
    file = adapter / "adapter_model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    explained(info_of(adapter), 3, f"{file}: it is a Git LFS pointer, not the file itself. Run git lfs pull.")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value: float, adapter: Path, matrices: Any, rewrite: Any, explained: Any) -> None:
    key = f"base_model.model.{FIRST}.lora_B.weight"

    def poison(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[key][3, 1] = value
        return tensors

    rewrite(adapter, poison)
    message = f"{where(adapter)}: {key!r} holds NaN or infinity. Its training diverged: train it again."
    explained(expert_of(adapter, matrices), 3, message)


def test_integer_weights(adapter: Path, matrices: Any, rewrite: Any, explained: Any) -> None:
    rewrite(adapter, lambda tensors: {k: t.to(torch.int8) for k, t in tensors.items()})
    message = f"{where(adapter)}: a LoRA stored as int8 is not supported. {PLAIN}"
    explained(expert_of(adapter, matrices), 2, message)


def test_half_a_pair(adapter: Path, rewrite: Any, explained: Any) -> None:
    key = f"base_model.model.{FIRST}.lora_A.weight"
    rewrite(adapter, lambda tensors: {k: t for k, t in tensors.items() if k != key})
    explained(info_of(adapter), 3, f"{where(adapter)}: lora_A of {FIRST!r} is missing. {AGAIN}")


def test_factors_that_do_not_multiply(adapter: Path, rewrite: Any, explained: Any) -> None:
    key = f"base_model.model.{FIRST}.lora_A.weight"
    rewrite(adapter, lambda tensors: {**tensors, key: torch.ones(3, 32)})
    message = f"{where(adapter)}: lora_A [3, 32] and lora_B [32, 4] of {FIRST!r} cannot be multiplied. {AGAIN}"
    explained(info_of(adapter), 3, message)


def test_empty_factors_as_zero_3_leaves_them(adapter: Path, rewrite: Any, explained: Any) -> None:
    for part, other in ("AB", "BA"):
        key = f"base_model.model.{FIRST}.lora_{part}.weight"
        full = (4, 32) if other == "A" else (32, 4)
        edit = {key: torch.zeros(0), f"base_model.model.{FIRST}.lora_{other}.weight": torch.ones(full)}
        rewrite(adapter, lambda tensors, edit=edit: {**tensors, **edit})
        message = (
            f"{where(adapter)}: lora_{part} of {FIRST!r} is empty ([0]): it was saved while its weights were spread "
        )
        message += "over several GPUs. Save it again with the weights gathered (DeepSpeed ZeRO-3: zero_to_fp32.py)."
        explained(info_of(adapter), 3, message)


def test_several_adapters_in_one_file(adapter: Path, rewrite: Any, explained: Any) -> None:
    def named(tensors: dict[str, torch.Tensor], *names: str) -> dict[str, torch.Tensor]:
        return {k.replace(".weight", f".{name}.weight"): t.clone() for k, t in tensors.items() for name in names}

    rewrite(adapter, lambda tensors: named(tensors, "default"))
    assert len(read_info(LoraSpec("x", str(adapter))).adapted) == 10
    rewrite(adapter, lambda tensors: {k.replace("default", n): t.clone() for k, t in tensors.items() for n in "ab"})
    keys = [f"'base_model.model.{STORED_FIRST}.lora_A.{name}.weight'" for name in "ab"]
    message = f"{where(adapter)}: it holds several adapters: {keys[0]} and {keys[1]}. Save one of them by itself."
    explained(info_of(adapter), 3, message)


def test_no_lora_at_all(adapter: Path, rewrite: Any, explained: Any) -> None:
    rewrite(adapter, lambda tensors: {})
    message = f"{where(adapter)}: there is no LoRA in it. Name a LoRA that was trained and saved."
    explained(info_of(adapter), 3, message)


def test_a_configuration_of_another_rank(adapter: Path, configure: Any, explained: Any) -> None:
    configure(adapter, r=8)
    message = f"{where(adapter)}: {STORED_FIRST!r} has rank 4, but adapter_config.json says 8. "
    message += "Its two files belong to different LoRAs, or rank_pattern is missing."
    explained(info_of(adapter), 3, message)


def test_a_configuration_without_alpha(adapter: Path, configure: Any, explained: Any) -> None:
    configure(adapter, lora_alpha=None)
    message = f"{where(adapter)}: lora_alpha is None, not a positive number. "
    message += "Write the lora_alpha of its training."
    explained(info_of(adapter), 3, message)


def test_a_pattern_that_is_no_expression(adapter: Path, configure: Any, explained: Any) -> None:
    configure(adapter, alpha_pattern={"(": 3})
    message = f"{where(adapter)}: alpha_pattern is {{'(': 3}}. It maps module names to positive numbers."
    explained(info_of(adapter), 3, message)


def test_a_configuration_that_is_not_json(adapter: Path, explained: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text('{\n"r": 4,\n}')
    explained(info_of(adapter), 3, f"{file}:3: not valid JSON. Export the adapter again.")
    file.write_text("[]")
    explained(info_of(adapter), 3, f"{file}: not a JSON object. Export the adapter again.")


def test_a_single_file_that_does_not_say_its_alpha(adapter: Path, alone: Any, explained: Any) -> None:
    file = alone(adapter)
    message = f"x ({file}): its alpha is not given (its rank is 4). Put adapter_config.json into {file.parent} with "
    message += '{"peft_type": "LORA", "r": 4, "lora_alpha": ALPHA}.'
    explained(info_of(file), 2, message)
    (file.parent / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')
    assert read_info(LoraSpec("x", str(file))).scalings[FIRST] == 2.0


# Kinds that are not read


@pytest.mark.parametrize(
    ("settings", "name", "remedy"),
    [
        ({"use_dora": True}, "DoRA", PLAIN),
        ({"lora_bias": True}, "LoRA with bias (lora_bias)", PLAIN),
        ({"modules_to_save": ["shared"]}, "LoRA with modules_to_save (weights of its own for lm_head)", MERGE),
        ({"trainable_token_indices": [1, 2]}, "LoRA with trainable_token_indices", MERGE),
    ],
)
def test_a_kind_that_peft_writes(
    settings: Any, name: str, remedy: str, make_tiny: Any, make_peft_adapter: Any, tmp_path: Path, explained: Any
) -> None:
    bart = make_tiny("bart").model  # it has biases, which T5 lacks
    settings = {key: ["lm_head"] if key == "modules_to_save" else value for key, value in settings.items()}
    folder = make_peft_adapter(bart, tmp_path / "x", targets=["fc1"], **settings)
    explained(info_of(folder), 2, f"{where(folder)}: {name} is not supported. {remedy}")


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_a_lora_with_bias(
    bias: str, make_tiny: Any, make_peft_adapter: Any, tmp_path: Path, configure: Any, explained: Any
) -> None:
    folder = make_peft_adapter(make_tiny("bart").model, tmp_path / "x", targets=["fc1"], bias=bias)
    explained(info_of(folder), 2, f"{where(folder)}: LoRA with bias (bias: {bias}) is not supported. {PLAIN}")
    # The tensors give it away even when the configuration does not.
    configure(folder, bias="none")
    explained(info_of(folder), 2, f"{where(folder)}: LoRA with bias is not supported. {PLAIN}")


def test_a_lora_on_an_embedding(make_tiny: Any, make_peft_adapter: Any, tmp_path: Path, explained: Any) -> None:
    folder = make_peft_adapter(make_tiny("llama").model, tmp_path / "x", targets=["embed_tokens", "q_proj"])
    name = "LoRA on an embedding (lora_embedding_A)"
    explained(info_of(folder), 2, f"{where(folder)}: {name} is not supported. {MERGE}")


def test_trained_tokens_known_by_their_tensors_only(adapter: Path, rewrite: Any, explained: Any) -> None:
    key = "base_model.model.shared.token_adapter.trainable_tokens_delta"
    rewrite(adapter, lambda tensors: {**tensors, key: torch.ones(2, 32)})
    name = "LoRA with trainable tokens (trainable_tokens_delta)"
    explained(info_of(adapter), 2, f"{where(adapter)}: {name} is not supported. {MERGE}")


@pytest.mark.parametrize(
    ("config", "name"), [(peft.LoHaConfig, "the adapter type LOHA"), (peft.LoKrConfig, "the adapter type LOKR")]
)
def test_another_adapter_type(config: Any, name: str, tiny_t5: Any, tmp_path: Path, explained: Any) -> None:
    peft.get_peft_model(tiny_t5.model, config(target_modules=["q"])).save_pretrained(str(tmp_path))
    explained(info_of(tmp_path), 2, f"{where(tmp_path)}: {name} is not supported. {PLAIN}")


@pytest.mark.parametrize(("key", "name"), [("q.hada_w1_a", "LoHa"), ("q.lokr_w1", "LoKr")])
def test_another_adapter_type_known_by_its_tensors_only(
    key: str, name: str, adapter: Path, rewrite: Any, explained: Any
) -> None:
    rewrite(adapter, lambda tensors: {key: torch.ones(2, 2)})
    explained(info_of(adapter), 2, f"{where(adapter)}: {name} is not supported. {PLAIN}")


def test_another_adapter_type_known_by_its_configuration_only(adapter: Path, configure: Any, explained: Any) -> None:
    configure(adapter, peft_type="VERA")
    explained(info_of(adapter), 2, f"{where(adapter)}: the adapter type VERA is not supported. {PLAIN}")


def test_an_initialisation_that_changes_the_base(adapter: Path, configure: Any, explained: Any) -> None:
    configure(adapter, init_lora_weights="pissa_niter_4")
    message = f"{where(adapter)}: it was initialised with pissa_niter_4, which changes the weights of the base. "
    message += "Convert it: PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)."
    explained(info_of(adapter), 2, message)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("diffusion_model.mid_block.weight", "a LoRA that also has 'diffusion_model.mid_block.weight'"),
        ("base_model.model.q.weight", "a LoRA that also has 'base_model.model.q.weight'"),
    ],
)
def test_a_foreign_key(key: str, name: str, adapter: Path, rewrite: Any, explained: Any) -> None:
    rewrite(adapter, lambda tensors: {key: torch.ones(2, 2)})
    explained(info_of(adapter), 2, f"{where(adapter)}: {name} is not supported. {PLAIN}")


def test_a_convolution_in_a_language_model(adapter: Path, matrices: Any, rewrite: Any, explained: Any) -> None:
    keys = [f"base_model.model.{FIRST}.lora_{part}.weight" for part in "AB"]
    factors = torch.ones(4, 32, 3, 3), torch.ones(32, 4, 1, 1)
    rewrite(adapter, lambda tensors: {**tensors, **dict(zip(keys, factors, strict=True))})
    message = f"{where(adapter)}: it was made for another base: {FIRST!r} is 32x32x3x3 in the LoRA and 32x32 in this "
    message += "base. "
    explained(expert_of(adapter, matrices), 3, message + "Name the base it was trained on with --base.")


# Another base


def test_a_lora_for_a_base_of_another_width(adapter: Path, matrices: Any, configure: Any, explained: Any) -> None:
    configure(adapter, base_model_name_or_path="org/base")
    wider = {name: (2 * d_out, 2 * d_in) for name, (d_out, d_in) in matrices.items()}
    message = f"{where(adapter)}: it was made for another base: {STORED_FIRST!r} is 32x32 in the LoRA and 64x64 in "
    message += "this base. "
    message += "Name the base it was trained on with --base (it names org/base)."
    explained(expert_of(adapter, wider), 3, message)
    explained(expert_of(adapter, wider, allow_partial=True), 3, message)


def test_a_lora_none_of_whose_keys_match(adapter: Path, configure: Any, explained: Any) -> None:
    configure(adapter, base_model_name_or_path=None)
    message = f"{where(adapter)}: it was made for another base: this one lacks all its 10 matrices, such as "
    message += "'decoder.block.0.layer.0.SelfAttention.q'. Name the base it was trained on with --base."
    other = {"model.layers.0.self_attn.q_proj": (32, 32)}
    explained(expert_of(adapter, other), 3, message)
    explained(expert_of(adapter, other, allow_partial=True), 3, message)


def test_a_lora_some_of_whose_keys_match(adapter: Path, matrices: Any, explained: Any) -> None:
    fewer = {name: shape for name, shape in matrices.items() if not name.startswith("decoder.block.1")}
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        sizes = {
            name: float((file.get_tensor(f"{key}_B.weight") @ file.get_tensor(f"{key}_A.weight")).square().sum())
            for name in matrices
            if (key := f"base_model.model.{name}.lora") and f"{key}_A.weight" in set(file.keys())
        }
    share = sum(size for name, size in sizes.items() if name not in fewer) / sum(sizes.values())
    message = f"{where(adapter)}: 3 of its 10 matrices are not in this base, such as "
    message += f"'decoder.block.1.layer.0.SelfAttention.q': {share:.1%} of its weights. "
    message += "Pass --allow-partial to leave them out."
    explained(expert_of(adapter, fewer), 3, message)
    expert = read_expert(LoraSpec("x", str(adapter)), fewer, allow_partial=True)
    assert len(expert.factors) == 7
    assert json.dumps(list(expert.matrices)).count("decoder.block.1") == 0
