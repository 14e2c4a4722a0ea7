"""Every pipeline's LoRA that does not fit or cannot be read says why, with its exit code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_pipelines import random_factors
from safetensors.torch import load_file, save_file

from molecli.adapters import LoraSpec, check_coverage, read_expert, read_info, write_diffusers, write_kohya
from molecli.experts import LowRank

PLAIN = "Use a plain LoRA (or rsLoRA)."
AGAIN = "Download or export it again."
BASE = "Name the base it was trained on with --base."
FILE = "pytorch_lora_weights.safetensors"
MATRIX = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"


def expert_of(path: Path, matrices: Any, **options: Any) -> Callable[[], Any]:
    return lambda: read_expert(LoraSpec("x", str(path)), matrices, **options)


def info_of(path: Path) -> Callable[[], Any]:
    return lambda: read_info(LoraSpec("x", str(path)))


@pytest.fixture
def lora(matrices_in: Any, tmp_path: Path) -> Callable[[str, str], Path]:
    """`lora(family, part)` -> a diffusers folder that adapts every matrix of `family` whose name holds `part`."""

    def write(family: str, part: str) -> Path:
        names = [name for name in matrices_in(family) if part in name]
        return write_diffusers(tmp_path / f"{family}-lora", random_factors(matrices_in(family), names))

    return write


# Another architecture


def test_sdxl_with_both_encoders_on_sd1(lora: Any, matrices_in: Any, explained: Any) -> None:
    folder = lora("sdxl", "")
    message = f"x ({folder / FILE}): it was made for SDXL (it adapts a second text encoder), and this base is "
    message += "another UNet. "
    explained(expert_of(folder, matrices_in("sd1")), 3, message + BASE)
    explained(expert_of(folder, matrices_in("sd1"), allow_partial=True), 3, message + BASE)


@pytest.mark.parametrize("part", ["unet.", "attn2.to_v"])
def test_a_unet_that_reads_text_of_another_width(part: str, lora: Any, matrices_in: Any, explained: Any) -> None:
    folder = lora("sdxl", part)
    message = f"x ({folder / FILE}): it was made for another UNet: its UNet reads text embeddings of width 40, this "
    message += f"base's 16. {BASE}"
    explained(expert_of(folder, matrices_in("sd1")), 3, message)


def test_published_widths_are_named(tmp_path: Path, explained: Any) -> None:
    def factors(width: int) -> dict[str, LowRank]:
        return {MATRIX: LowRank(torch.ones(2, width), torch.ones(8, 2), 1.0)}

    base = {MATRIX: (8, 768), "text_encoder.encoder.layers.0.mlp.fc1": (8, 768)}
    file = write_kohya(
        tmp_path / "x.safetensors",
        factors(2048),
        [MATRIX, "text_encoder_2.text_projection"],
        metadata={"ss_sd_model_name": "sd_xl_base_1.0.safetensors"},
    )
    message = f"x ({file}): it was made for SDXL: its UNet reads text embeddings of width 2048, this base's 768 "
    message += "(Stable Diffusion 1.x). "
    message += "Name the base it was trained on with --base (it names sd_xl_base_1.0.safetensors)."
    explained(expert_of(file, base), 3, message)
    folder = write_diffusers(tmp_path / "y", factors(1024))
    message = f"x ({folder / FILE}): it was made for Stable Diffusion 2.x: its UNet reads text embeddings of width "
    message += "1024, this base's 768 "
    explained(expert_of(folder, base), 3, f"{message}(Stable Diffusion 1.x). {BASE}")


def test_a_text_encoder_of_another_width(lora: Any, matrices_in: Any, explained: Any) -> None:
    folder = lora("sd2", "text_encoder.")
    message = f"x ({folder / FILE}): its text_encoder part was made for an encoder of width 24, and this base's has "
    explained(expert_of(folder, matrices_in("sd1")), 3, f"{message}width 16. {BASE}")


def test_the_second_text_encoder_has_another_width(matrices_in: Any, tmp_path: Path, explained: Any) -> None:
    wider = {
        n: tuple(2 * s for s in shape) if "text_encoder_2" in n else shape for n, shape in matrices_in("sdxl").items()
    }
    file = write_kohya(tmp_path / "x.safetensors", random_factors(wider, wider), wider)
    message = f"x ({file}): its text_encoder_2 part was made for an encoder of width 48, and this base's has width "
    message += f"24. {BASE}"
    explained(expert_of(file, matrices_in("sdxl")), 3, message)


def test_a_pipelines_lora_on_a_language_model(lora: Any, matrices: Any, explained: Any) -> None:
    folder = lora("sd1", "")
    message = f"x ({folder / FILE}): it was made for a diffusion pipeline, and this base is a language model. {BASE}"
    explained(expert_of(folder, matrices), 3, message)


def test_a_language_models_lora_on_a_pipeline(adapter: Path, matrices_in: Any, explained: Any, configure: Any) -> None:
    configure(adapter, base_model_name_or_path=None)
    message = f"x ({adapter / 'adapter_model.safetensors'}): it was made for another base: this one lacks all its "
    message += f"10 matrices, such as 'decoder.block.0.layer.0.SelfAttention.q'. {BASE}"
    explained(expert_of(adapter, matrices_in("sd1")), 3, message)


@pytest.mark.parametrize(
    ("module", "family"),
    [
        ("lora_unet_double_blocks_0_img_attn_proj", "FLUX"),
        ("transformer.single_transformer_blocks.0.attn.to_q", "FLUX"),
        ("lora_unet_joint_blocks_0_x_block_attn_proj", "Stable Diffusion 3"),
    ],
)
def test_a_model_without_a_unet(module: str, family: str, matrices_in: Any, tmp_path: Path, explained: Any) -> None:
    file = tmp_path / "x.safetensors"
    save_file({f"{module}.lora_{m}.weight": torch.ones(2, 2) for m in ("down", "up")}, file)
    message = f"x ({file}): it was made for {family}, and this base is another UNet. {BASE}"
    explained(expert_of(file, matrices_in("sd1")), 3, message)


def test_a_convolution_of_another_kernel(matrices_in: Any, tmp_path: Path, explained: Any) -> None:
    name = "unet.conv_in"
    folder = write_diffusers(tmp_path / "x", {name: LowRank(torch.ones(2, 4, 1, 1), torch.ones(8, 2), 1.0)})
    message = f"x ({folder / FILE}): it was made for another base: 'unet.conv_in' is 8x4x1x1 in the LoRA and 8x4x3x3 "
    message += "in this "
    explained(expert_of(folder, matrices_in("sd1")), 3, f"{message}base. {BASE}")


def test_more_matrices_than_the_base_has(lora: Any, matrices_in: Any, explained: Any) -> None:
    folder = lora("sd1", "attn1")
    fewer = {name: shape for name, shape in matrices_in("sd1").items() if not name.startswith("unet.mid_block")}
    message = f"x ({folder / FILE}): 4 of its 44 matrices are not in this base, such as "
    message += "'unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_k': 13.1% of its weights. "
    message += "Pass --allow-partial to leave them out."
    explained(expert_of(folder, fewer), 3, message)
    found = check_coverage(read_info(LoraSpec("x", str(folder))), fewer, allow_partial=True)
    assert found.components == {"unet": (40, 44)}


# Damage


@pytest.fixture
def kohya(matrices_in: Any, tmp_path: Path) -> Path:
    names = [name for name in matrices_in("sd1") if "attn2.to_k" in name]
    return write_kohya(tmp_path / "x.safetensors", random_factors(matrices_in("sd1"), names), matrices_in("sd1"))


def edit(file: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(file)), file)


STORED = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"


@pytest.mark.parametrize("half", ["lora_down", "lora_up"])
def test_half_a_pair(half: str, kohya: Path, explained: Any) -> None:
    edit(kohya, lambda tensors: {k: t for k, t in tensors.items() if k != f"{STORED}.{half}.weight"})
    explained(info_of(kohya), 3, f"x ({kohya}): {half} of {STORED!r} is missing. {AGAIN}")


def test_half_a_pair_in_an_older_layout(tmp_path: Path, explained: Any) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"unet.mid_block.attn1.processor.to_q_lora.down.weight": torch.ones(2, 2)}, file)
    explained(info_of(file), 3, f"x ({file}): lora.up of 'unet.mid_block.attn1.to_q' is missing. {AGAIN}")


def test_factors_that_do_not_multiply(kohya: Path, explained: Any) -> None:
    edit(kohya, lambda tensors: {**tensors, f"{STORED}.lora_up.weight": torch.ones(16, 4, 3, 3)})
    message = f"x ({kohya}): lora_down [4, 16] and lora_up [16, 4, 3, 3] of {STORED!r} cannot be multiplied. {AGAIN}"
    explained(info_of(kohya), 3, message)


def test_weights_that_are_not_finite(kohya: Path, matrices_in: Any, explained: Any) -> None:
    key = f"{STORED}.lora_up.weight"
    edit(kohya, lambda tensors: {**tensors, key: tensors[key].index_fill(0, torch.tensor([3]), torch.nan)})
    message = f"x ({kohya}): {key!r} holds NaN or infinity. Its training diverged: train it again."
    explained(expert_of(kohya, matrices_in("sd1")), 3, message)


@pytest.mark.parametrize(
    ("alpha", "what"),
    [
        (torch.ones(3), "has the shape [3], and must be one number"),
        (torch.tensor(torch.nan), "is nan"),
        (torch.tensor(torch.inf), "is inf"),
    ],
)
def test_an_alpha_that_is_no_number(alpha: torch.Tensor, what: str, kohya: Path, explained: Any) -> None:
    edit(kohya, lambda tensors: {**tensors, f"{STORED}.alpha": alpha})
    explained(info_of(kohya), 3, f"x ({kohya}): alpha of {STORED!r} {what}. {AGAIN}")


def test_an_alpha_of_one_entry_is_a_number(kohya: Path) -> None:
    edit(kohya, lambda tensors: {**tensors, f"{STORED}.alpha": torch.tensor([7.0])})
    assert read_info(LoraSpec("x", str(kohya))).alphas[STORED] == 7.0


def test_metadata_of_another_rank(lora: Any, explained: Any) -> None:
    file = lora("sd1", "attn2.to_k") / FILE
    text = '{"unet.r": 8, "unet.lora_alpha": 8}'
    save_file(load_file(file), file, metadata={"lora_adapter_metadata": text})
    first = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    message = f"x ({file}): {first!r} has rank 4, but its metadata says 8. Export it again."
    explained(info_of(file), 3, message)


def test_metadata_of_a_kind_that_is_not_read(lora: Any, explained: Any) -> None:
    file = lora("sd1", "attn2.to_k") / FILE
    text = '{"unet.r": 4, "unet.lora_alpha": 8, "unet.use_dora": true}'
    save_file(load_file(file), file, metadata={"lora_adapter_metadata": text})
    explained(info_of(file), 2, f"x ({file}): DoRA is not supported. {PLAIN}")


# Kinds that are not read


@pytest.mark.parametrize(
    ("key", "name"),
    [
        (f"{STORED}.lora_mid.weight", "LoRA with a Tucker core (lora_mid)"),
        (f"{STORED}.dora_scale", "DoRA"),
        ("unet.mid_block.lora_magnitude_vector", "DoRA"),
        (f"{STORED}.hada_w1_a", "LoHa"),
        (f"{STORED}.lokr_w1", "LoKr"),
        (f"{STORED}.oft_blocks", "OFT"),
        ("bundle_emb.sks.string_to_param.*", "LoRA with textual inversions (bundle_emb)"),
        (f"{STORED}.diff", f"a LoRA that also has '{STORED}.diff'"),
        ("unet.attn1.to_b_lora.down.weight", "a LoRA that also has 'unet.attn1.to_b_lora.down.weight'"),
        (f"{STORED}.lora_up.bias", "LoRA with bias"),
    ],
)  # fmt: skip
def test_a_kind_named_by_its_tensors(key: str, name: str, kohya: Path, explained: Any) -> None:
    edit(kohya, lambda tensors: {**tensors, key: torch.ones(2)})
    explained(info_of(kohya), 2, f"x ({kohya}): {name} is not supported. {PLAIN}")
