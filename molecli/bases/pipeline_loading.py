"""From a base's settings to a diffusers pipeline. Each part is read and checked separately; no safety checker.

Contents: load_pipeline, load_pipeline_skeleton (no weights).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import torch
import transformers
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from torch import nn

from molecli.bases.diffusion import Diffusion
from molecli.bases.language import freeze
from molecli.bases.library_logs import first_line, quiet
from molecli.bases.pipeline import TEXT_ENCODERS, PipelineModules
from molecli.bases.quantised import not_here
from molecli.bases.single_file import describe, inpainting_unet, read_checkpoint, settings_folder
from molecli.bases.weight_files import variant_of
from molecli.catalog.builtin import PIPELINE_FILE
from molecli.errors import MismatchError, UsageError, UserError
from molecli.files.base_source import BaseSettings, BaseSource, explain_hub, find_base

# Pipeline class -> its parts: their names in model_index.json and their required classes.
_SD = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "tokenizer": "CLIPTokenizer",
}
_SDXL = _SD | {"text_encoder_2": "CLIPTextModelWithProjection", "tokenizer_2": "CLIPTokenizer"}
PIPELINES = {"StableDiffusionPipeline": _SD, "StableDiffusionXLPipeline": _SDXL}
# Pipelines of the same parts, which differ only in what they are called with.
_SAME_PARTS = {
    "StableDiffusionImg2ImgPipeline": "StableDiffusionPipeline",
    "StableDiffusionInpaintPipeline": "StableDiffusionPipeline",
    "LatentConsistencyModelPipeline": "StableDiffusionPipeline",
    "StableDiffusionXLImg2ImgPipeline": "StableDiffusionXLPipeline",
    "StableDiffusionXLInpaintPipeline": "StableDiffusionXLPipeline",
}
_INPAINTING = 9  # latents, mask and masked picture
_AGAIN = "Download the base again."


def load_pipeline(base: BaseSettings, device: torch.device | str, dtype: torch.dtype) -> Diffusion:
    """The frozen pipeline on `device`.

    Raises: UsageError for a pipeline of another kind; MismatchError if a part is missing, damaged or does not fit the
    others.
    """
    source = find_base(base)
    with _quiet(source):
        if source.checkpoint:
            kind = describe(source).kind
            pipe = read_checkpoint(source, dtype, _options(kind, {}))
            parts = pipe.components
        else:
            index = _index(source)
            kind = index["_class_name"]
            parts = {name: _part(source, index, name, dtype) for name in PIPELINES[kind]}
            parts["scheduler"] = _scheduler(source, index)
            pipe = None
        _check_fit(source, parts)
        if pipe is None:
            pipe = getattr(diffusers, kind)(**parts, **_options(kind, index))
        return Diffusion(pipe.to(device), source.name)


def _options(kind: str, index: dict[str, Any]) -> dict[str, Any]:
    """The settings of a pipeline of this class beside its parts."""
    if kind == "StableDiffusionPipeline":
        return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    # The invisible watermark would change the pictures that are scored.
    zeros = index.get("force_zeros_for_empty_prompt", True)
    return {"force_zeros_for_empty_prompt": zeros, "add_watermarker": False}


def load_pipeline_skeleton(base: BaseSettings) -> PipelineModules:
    """The UNet and text encoder(s) on the meta device: names and shapes without weights."""
    source = find_base(base)
    with _quiet(source), torch.device("meta"):
        index = _index(source)
        parts: dict[str, Any] = {
            name: _outline(source, index, name) for name in ("unet", *TEXT_ENCODERS) if name in _parts(index)
        }
    model = PipelineModules(**parts)
    if parts["unet"].config.in_channels == _INPAINTING:
        raise inpainting_unet(source)
    freeze(model)
    return model


@contextmanager
def _quiet(source: BaseSource) -> Iterator[None]:
    """Like `quiet`, also for diffusers. Its log level stays at errors: cut prompts are reported by `prompt_limits`."""
    if not logging.getLogger("molecli").isEnabledFor(logging.DEBUG):
        diffusers_logging.set_verbosity_error()
    bars = diffusers_logging.is_progress_bar_enabled()
    diffusers_logging.disable_progress_bar()
    try:
        with quiet(source):
            yield
    finally:
        if bars:
            diffusers_logging.enable_progress_bar()


def _index(source: BaseSource) -> dict[str, Any]:
    """The model_index.json of a supported pipeline, with all its parts. Raises: UsageError, MismatchError."""
    try:
        if source.checkpoint:
            file = settings_folder(source) / PIPELINE_FILE
        elif source.local:
            file = Path(source.path) / PIPELINE_FILE
        else:
            file = Path(huggingface_hub.hf_hub_download(source.path, PIPELINE_FILE, revision=source.revision))
        index = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MismatchError(f"{source.where}/{PIPELINE_FILE}", "it cannot be read as JSON", _AGAIN) from error
    except OSError as error:
        raise _unread(source, PIPELINE_FILE, error) from error
    kind = index.get("_class_name") if isinstance(index, dict) else None
    if source.checkpoint:
        kind = describe(source).kind
    if kind in _SAME_PARTS or source.checkpoint:
        kind = _SAME_PARTS.get(str(kind), kind)
        index["_class_name"] = kind
    if kind not in PIPELINES:
        what = f"it is a pipeline of the kind {kind or 'unknown'}, which is not supported"
        raise UsageError(f"base {source.name}", what, f"Use one of the kinds {', '.join(PIPELINES)}.")
    for name, wanted in PIPELINES[kind].items():
        library, found = (index.get(name) or (None, None))[:2]
        if found is None and name == "text_encoder" and index.get("text_encoder_2"):
            what = "it is the SDXL refiner (it has no first text encoder), which is not supported"
            raise UsageError(f"base {source.name}", what, "Write the SDXL base.")
        # Tokenizers exist in two classes with the same format.
        if found is None:
            raise MismatchError(f"base {source.name}", f"its {PIPELINE_FILE} names no {name}", _AGAIN)
        if (found or "").removesuffix("Fast") != wanted:
            what = f"its {name} is a {library}.{found}, and only {wanted} is supported"
            raise UsageError(f"base {source.name}", what, "Write another base.")
    return index


def _parts(index: dict[str, Any]) -> dict[str, str]:
    return PIPELINES[index["_class_name"]]


def _class_of(name: str, kind: str) -> Any:
    return getattr(transformers if kind.startswith("CLIP") else diffusers, kind)


def _part(source: BaseSource, index: dict[str, Any], name: str, dtype: torch.dtype) -> Any:
    """One part with complete weights. Raises: MismatchError."""
    kind = _class_of(name, _parts(index)[name])
    arguments: dict[str, Any] = {**source.arguments, "subfolder": name}
    _check_there(source, name)
    try:
        if name.startswith("tokenizer"):
            return kind.from_pretrained(source.path, **arguments)
        typed: dict[str, Any] = {"dtype": dtype} if name in TEXT_ENCODERS else {"torch_dtype": dtype}
        if name in TEXT_ENCODERS:
            typed["ignore_mismatched_sizes"] = True  # reported below, by name
        model, report = _read_weights(source, name, kind, typed | arguments)
    except UserError:
        raise
    except Exception as error:  # a damaged file fails in many ways
        method = _method_of(kind, source, arguments)
        if method and not isinstance(error, OSError | SafetensorError):
            raise not_here(f"{source.where}/{name}", method, error) from error
        raise _unread(source, name, error) from error
    for verb, keys in (("lack", report["missing_keys"]), ("have another shape for", report["mismatched_keys"])):
        if keys:
            first = sorted(key if isinstance(key, str) else key[0] for key in keys)[0]
            what = f"its weights {verb} {len(keys)} of the model's tensors, such as {first}"
            raise MismatchError(f"{source.where}/{name}", what, "Download it again, or correct its config.json.")
    return model


def _read_weights(source: BaseSource, name: str, kind: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(model, report) of the plain weights, or of the one variant that is there."""
    variant = variant_of(source, name) if source.local else None
    try:
        return kind.from_pretrained(source.path, variant=variant, output_loading_info=True, **options)
    except OSError:
        # On the hub, only a part that has no plain weights needs the list of files.
        variant = None if source.local else variant_of(source, name)
        if variant is None:
            raise
        return kind.from_pretrained(source.path, variant=variant, output_loading_info=True, **options)


def _method_of(kind: Any, source: BaseSource, arguments: dict[str, Any]) -> str:
    """The name of the method by which a part is quantised; "" if it is not, or cannot be read at all."""
    try:
        read = kind.config_class.get_config_dict if hasattr(kind, "config_class") else kind.load_config
        found = read(source.path, **arguments)
        stated = (found[0] if isinstance(found, tuple) else found).get("quantization_config") or {}
    except Exception:  # the damage is reported by the reader of the whole part
        return ""
    return str(stated.get("quant_method", "unknown")) if stated else ""


def _scheduler(source: BaseSource, index: dict[str, Any]) -> Any:
    name = (index.get("scheduler") or (None, None))[1]
    kind = getattr(diffusers, name or "", None)
    if not isinstance(kind, type) or not issubclass(kind, diffusers.SchedulerMixin):
        raise UsageError(f"base {source.name}", f"diffusers has no scheduler {name!r}", "Upgrade diffusers.")
    _check_there(source, "scheduler")
    try:
        return kind.from_pretrained(source.path, subfolder="scheduler", **source.arguments)
    except Exception as error:
        raise _unread(source, "scheduler", error) from error


def _outline(source: BaseSource, index: dict[str, Any], name: str) -> nn.Module:
    """One part without weights, from its configuration."""
    kind = _class_of(name, _parts(index)[name])
    arguments: dict[str, Any] = {**source.arguments, "subfolder": name}
    _check_there(source, name)
    path = settings_folder(source) if source.checkpoint else source.path
    try:
        if name in TEXT_ENCODERS:
            return kind(kind.config_class.from_pretrained(path, **arguments))
        return kind.from_config(kind.load_config(path, **arguments))
    except Exception as error:
        raise _unread(source, name, error) from error


def _check_there(source: BaseSource, name: str) -> None:
    if source.local and not source.checkpoint and not (Path(source.path) / name).is_dir():
        raise MismatchError(f"{source.where}/{name}", "this part of the pipeline is missing", _AGAIN)


def _check_fit(source: BaseSource, parts: dict[str, Any]) -> None:
    """Raises: MismatchError if the parts belong to different pipelines."""
    unet, vae = parts["unet"], parts["vae"]
    width = sum(parts[name].config.hidden_size for name in TEXT_ENCODERS if name in parts)
    reads = unet.config.cross_attention_dim
    if unet.config.in_channels == _INPAINTING:
        raise inpainting_unet(source)
    problems = []
    if isinstance(reads, int) and reads != width:
        problems.append(f"the UNet needs text of width {reads}, but the text encoder's output has {width}")
    if unet.config.in_channels != vae.config.latent_channels:
        problems.append(
            f"the UNet needs {unet.config.in_channels} channels, but the VAE has {vae.config.latent_channels}"
        )
    for suffix in ("", "_2"):
        tokenizer, encoder = parts.get(f"tokenizer{suffix}"), parts.get(f"text_encoder{suffix}")
        if tokenizer is not None and encoder is not None and len(tokenizer) > encoder.config.vocab_size:
            rows = encoder.config.vocab_size
            problems.append(f"tokenizer{suffix} has {len(tokenizer)} tokens, but its encoder only {rows}")
    if problems:
        raise MismatchError(f"base {source.name}", problems[0], "Combine parts of one pipeline.")


def _unread(source: BaseSource, name: str, error: Exception) -> Exception:
    """The message for a part that could not be read."""
    if not source.local and isinstance(error, OSError):
        return explain_hub(source, error, offline=huggingface_hub.is_offline_mode())
    return MismatchError(f"{source.where}/{name}", f"it is damaged or incomplete ({first_line(error)})", _AGAIN)
