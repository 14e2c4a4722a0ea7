"""A pipeline in one .safetensors file, as A1111 and ComfyUI have it, read by diffusers' `from_single_file`.

Such a file has weights under the names of the original code, but no tokenizer and no configuration. These come from a
folder beside it with the file's name, or from the published pipeline of the same family (the hub, or its cache).

Contents: Checkpoint, describe, settings_folder, read_checkpoint, inpainting_unet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import torch

from molecli.bases.library_logs import first_line
from molecli.catalog.builtin import PIPELINE_FILE
from molecli.errors import MismatchError, RunError, UsageError
from molecli.files.base_source import UNET_IN_FILE, BaseSource
from molecli.files.tensor_file import opened

# Family -> its pipeline class, and the repository whose configurations its checkpoints have. Source: diffusers,
# loaders/single_file_utils.py, DIFFUSERS_DEFAULT_PIPELINE_PATHS.
_FAMILIES = {
    "Stable Diffusion 1.x": ("StableDiffusionPipeline", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
    "Stable Diffusion 2.x": ("StableDiffusionPipeline", "stabilityai/stable-diffusion-2-1"),
    "SDXL": ("StableDiffusionXLPipeline", "stabilityai/stable-diffusion-xl-base-1.0"),
}
_SETTINGS = ["*.json", "*/*.json", "*/*.txt"]
_FIRST = f"{UNET_IN_FILE}input_blocks.0.0.weight"


@dataclass(frozen=True)
class Checkpoint:
    """What a file says of itself: its family; the UNet's prediction ("v_prediction", "epsilon" or None: not said)."""

    family: str
    prediction: str | None
    zero_snr: bool = False

    @property
    def kind(self) -> str:
        """The pipeline's class."""
        return _FAMILIES[self.family][0]


def describe(source: BaseSource) -> Checkpoint:
    """What the file at `source` says of itself. Raises: UsageError for a pipeline of another kind."""
    with opened(Path(source.path), remedy="Download it again.") as file:
        keys, metadata = set(file.keys()), file.metadata() or {}
        channels = file.get_slice(_FIRST).get_shape()[1] if _FIRST in keys else None
    where = f"base {source.name}"
    if channels is None:
        raise UsageError(where, "it is a checkpoint of another kind than Stable Diffusion", "Write another base.")
    if channels == 9:
        raise inpainting_unet(source)
    if _has(keys, "conditioner.embedders.1.model."):
        family = "SDXL"
    elif _has(keys, "conditioner."):
        raise UsageError(where, "it is the SDXL refiner, which is not supported", "Write the SDXL base.")
    else:
        family = "Stable Diffusion 2.x" if _has(keys, "cond_stage_model.model.") else "Stable Diffusion 1.x"
    said = {"v": "v_prediction", "epsilon": "epsilon"}.get(metadata.get("modelspec.prediction_type", ""))
    return Checkpoint(family, "v_prediction" if "v_pred" in keys else said, "ztsnr" in keys)


def inpainting_unet(source: BaseSource) -> UsageError:
    """The error for a UNet that also reads a mask and a masked picture."""
    what = "it is an inpainting model (its UNet reads 9 channels: latents, mask and masked picture), not supported"
    remedy = "Write the base that it was made from: mole sample --mask-image inpaints with any base."
    return UsageError(f"base {source.name}", what, remedy)


def settings_folder(source: BaseSource) -> Path:
    """The folder with the tokenizers and configurations of the file at `source`.

    Raises: UsageError where the file's family does not settle them; RunError if the hub cannot be reached.
    """
    own = Path(source.path).with_suffix("")
    if (own / PIPELINE_FILE).is_file():
        return own
    found = describe(source)
    repository = _FAMILIES[found.family][1]
    if found.family == "Stable Diffusion 2.x" and found.prediction is None:
        what = "the file does not say whether its UNet predicts noise or velocity, and Stable Diffusion 2 has both"
        remedy = f"Put the configuration files of its pipeline ({PIPELINE_FILE} and the folders) into {own}/."
        raise UsageError(f"base {source.name}", what, remedy)
    for offline in (True, False):
        try:
            folder = Path(
                huggingface_hub.snapshot_download(repository, allow_patterns=_SETTINGS, local_files_only=offline)
            )
        except Exception as error:
            reason = error
            continue
        if (folder / "tokenizer").is_dir() and (folder / "vae").is_dir():
            return folder
    what = f"its tokenizer and configuration are those of {repository}, which cannot be downloaded here"
    raise RunError(f"base {source.name}", what, _how_to_convert(source, found.kind, own)) from reason


def read_checkpoint(source: BaseSource, dtype: torch.dtype, options: Mapping[str, Any]) -> Any:
    """The pipeline in the file at `source`, with `options` of its class.

    Raises: as `describe` and `settings_folder`; MismatchError if the file is damaged or lacks weights.
    """
    found, folder = describe(source), settings_folder(source)
    kind = getattr(diffusers, found.kind)
    try:
        pipe = kind.from_single_file(
            source.path, config=str(folder), torch_dtype=dtype, local_files_only=True, **options
        )
    except Exception as error:  # a damaged file fails in many ways
        what = f"it is damaged, or {folder} is not of its kind ({first_line(error)})"
        raise MismatchError(source.where, what, "Download it again.") from error
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            lacking = [key for key, weight in part.named_parameters() if weight.is_meta]
            if lacking:
                what = f"it lacks {len(lacking)} of the {name}'s tensors, such as {lacking[0]}"
                raise MismatchError(source.where, what, "Download it again.")
    changes: dict[str, Any] = {}
    if found.prediction is not None:
        changes["prediction_type"] = found.prediction
    if found.zero_snr:
        changes["rescale_betas_zero_snr"] = True
    if changes:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **changes)
    return pipe


def _has(keys: set[str], start: str) -> bool:
    return any(key.startswith(start) for key in keys)


def _how_to_convert(source: BaseSource, kind: str, own: Path) -> str:
    convert = f"from diffusers import {kind} as P; P.from_single_file('{source.path}').save_pretrained('{own}')"
    return f'Where the hub can be reached, run: python -c "{convert}". Then write --base {own}.'
