"""`mole train-lora` on a diffusion base: DreamBooth training, from a few pictures and an instance prompt.

    train_lora           recipe -> report: the whole command
    check_recipe         finds mistakes in the recipe before anything is loaded
    lora_factors         a LoRA in a PEFT model, as low-rank factors (write_lora: as a file that diffusers reads)
    concept_of           the concept that concept.json will describe

Source: Ruiz et al., DreamBooth, arXiv 2208.12242. By default it adapts the same matrices as diffusers' training.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer

from molecli.adapters import write_diffusers
from molecli.bases.diffusion import Diffusion
from molecli.bases.loading import load_backbone
from molecli.catalog.builtin import BUILTIN_PREFIX, builtin_base
from molecli.config import DataConfig, PicturesConfig, TrainLoraRecipe
from molecli.errors import UsageError
from molecli.experts import LowRank
from molecli.files.atomic import write_bytes, write_text
from molecli.files.concepts import Concept, trigger_of, write_concept
from molecli.files.lora_spec import DIFFUSERS_FILE
from molecli.files.pictures import read_picture
from molecli.files.tensor_file import in_fixed_order
from molecli.images.class_pictures import class_pictures, draw_missing
from molecli.images.denoising import PictureLoss, checkpointed, scaled_gradients
from molecli.images.drawing import warnings_as_notes
from molecli.images.pictures import Album, instance_pictures, lessons
from molecli.images.targets import by_component, picture_targets
from molecli.protocols import Note, Picture, Progress
from molecli.training.adapter import adapted, trained_parameters, training_report, write_shifts
from molecli.training.checkpoints import REPORT_FILE, discard_checkpoints
from molecli.training.loop import train
from molecli.training.shifted import Shifted

if TYPE_CHECKING:
    from accelerate import Accelerator

_ADAPTER = "default"  # PEFT's name for an adapter without a name of its own


def train_lora(
    recipe: TrainLoraRecipe,
    accelerator: Accelerator,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    note: Note = lambda text: None,
) -> dict[str, Any]:
    """The report of the training, also written to the output folder together with the trained adapter.

    `note` receives a line when words of a prompt are cut. Raises: UserError.
    """
    with warnings_as_notes(note):
        return _train(recipe, accelerator, resume, progress)


def _train(
    recipe: TrainLoraRecipe, accelerator: Accelerator, resume: bool, progress: Progress | None
) -> dict[str, Any]:
    config = check_recipe(recipe)
    name = Path(config.instance_dir).expanduser().resolve().name
    instances = instance_pictures(config, name)
    for picture in (*instances, *class_pictures(recipe)):
        read_picture(picture.target)  # report a broken picture before the base is loaded
    backbone: Any = load_backbone(recipe.base, accelerator.device)
    if not isinstance(backbone, Diffusion):
        raise _language_model(recipe.base.id)
    backbone.clip_skip = config.clip_skip
    targets = picture_targets(recipe.adapter.targets, backbone.matrices(), text_encoder=config.text_encoder)
    folder, start_s = Path(recipe.output), time.monotonic()
    draw_missing(recipe, backbone, accelerator, progress)
    priors = class_pictures(recipe)
    side = config.resolution or backbone.resolution
    album = Album([*instances, *priors], side, crop=config.crop, flip=config.flip)
    rows: list[Any] = lessons(instances, priors)
    loss = PictureLoss(
        backbone,
        album,
        prior_weight=config.prior_weight,
        text_encoder=config.text_encoder,
        prompt_dropout=config.prompt_dropout,
    )
    dtype = backbone.pipe.unet.dtype
    with adapted(backbone, recipe.adapter, seed=recipe.seed, targets=targets, progress=progress) as model:
        parameters = trained_parameters(model)
        with checkpointed(backbone, config.gradient_checkpointing), scaled_gradients(parameters.values(), dtype):
            history = train(
                parameters=parameters,
                loss_fn=loss,  # type: ignore[arg-type]
                examples=rows,
                settings=recipe.train,
                seed=recipe.seed,
                folder=folder,
                resume=resume,
                accelerator=accelerator,
                progress=progress,
                # B starts at zero, so A has no gradient yet.
                gradient_check="any",
            )
        learned: dict[str, Any] = {"pictures": len(instances), "class_pictures": len(priors), "resolution": side}
        learned["components"] = by_component(targets)
        report = training_report(recipe, model, targets, history, learned)
        report["denoising"] = _probe(loss, model, range(len(instances)), recipe.seed)
        report["seconds"] = round(time.monotonic() - start_s, 1)
        if accelerator.is_main_process:
            if isinstance(model, Shifted):
                write_shifts(model, folder, recipe.base)
            else:
                write_lora(model, folder, recipe.base.id)
            write_concept(folder, concept_of(config, instances))
            write_text(folder / REPORT_FILE, json.dumps(report, indent=2) + "\n")
            discard_checkpoints(folder)
    accelerator.wait_for_everyone()
    return report


def check_recipe(recipe: TrainLoraRecipe) -> PicturesConfig:
    """The recipe's `pictures` section. Raises: UsageError if it is missing, or if settings contradict each other."""
    config = recipe.pictures
    if config is None:
        what = "a diffusion pipeline learns from pictures, and none are given"
        raise UsageError(f"base {recipe.base.id}", what, 'Write --instance-dir DIR --instance-prompt "a photo of sks".')
    if _is_language_model(recipe.base.id):
        raise _language_model(recipe.base.id)
    if recipe.data != DataConfig():
        changed = next(key for key, value in recipe.data if value != getattr(DataConfig(), key))
        what = "a suite's tasks train a language model, and pictures a diffusion pipeline"
        raise UsageError(f"data.{changed}", what, "Leave it out, or leave out --instance-dir.")
    _check_class(config)
    return config


def _check_class(config: PicturesConfig) -> None:
    if config.class_prompt is None:
        for key in ("class_dir", "class_pictures", "prior_weight"):
            if getattr(config, key) != PicturesConfig.model_fields[key].default:
                what = "the class has no prompt, and it is not learned without one"
                raise UsageError(f"pictures.{key}", what, 'Write --class-prompt "a photo of a dog".')
        return
    if not config.class_prompt.strip():
        raise UsageError("pictures.class_prompt", "it is empty", 'Write for example "a photo of a dog".')
    if config.class_prompt == config.instance_prompt:
        what = "it is the same as the instance prompt, so the class would hide the subject"
        raise UsageError("pictures.class_prompt", what, 'Leave the rare token out: "a photo of a dog".')
    if config.class_dir and Path(config.class_dir).resolve() == Path(config.instance_dir).resolve():
        what = "it is the folder of the subject's own pictures"
        raise UsageError("pictures.class_dir", what, "Name another folder; it may be empty.")


def concept_of(config: PicturesConfig, instances: Sequence[Picture]) -> Concept:
    """What the LoRA adds. Its prompt is the instance prompt, otherwise the most common prompt of the pictures."""
    prompts = [picture.prompt for picture in instances]
    counts = Counter(prompts)
    commonest = min(counts, key=lambda prompt: (-counts[prompt], len(prompt)))
    return Concept(
        name=instances[0].task,
        prompt=config.instance_prompt or commonest,
        trigger=config.trigger or trigger_of(list(counts)),
        kind=config.kind,
        pictures=config.instance_dir,
    )


def lora_factors(model: PeftModel) -> dict[str, LowRank]:
    """Matrix name -> factors of the LoRA in `model`; a convolution's B is [c_out, r], without its 1x1 kernel."""
    factors = {}
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, LoraLayer) and _ADAPTER in module.lora_A:
            A, B = module.lora_A[_ADAPTER].weight.detach(), module.lora_B[_ADAPTER].weight.detach()
            factors[name] = LowRank(A, B.flatten(1), float(module.scaling[_ADAPTER]))
    return factors


def write_lora(model: PeftModel, folder: Path, base: str) -> None:
    """Writes pytorch_lora_weights.safetensors, which diffusers' `load_lora_weights(folder)` reads."""
    with tempfile.TemporaryDirectory() as scratch:
        metadata = {"base_model_name_or_path": base}
        written = write_diffusers(Path(scratch) / "lora", lora_factors(model), metadata=metadata)
        data = (written / DIFFUSERS_FILE).read_bytes()
    write_bytes(folder / DIFFUSERS_FILE, in_fixed_order(data))


def _probe(loss: PictureLoss, model: PeftModel | Shifted, places: Sequence[int], seed: int) -> dict[str, float]:
    """{"base": mean error without the adapter, "lora": with it} on the subject's pictures, with the same noise."""
    training = model.training
    model.eval()
    with_lora = loss.probe(places, seed)
    with model.disable_adapter():
        without = loss.probe(places, seed)
    model.train(training)
    return {"base": without, "lora": with_lora}


def _is_language_model(base: str) -> bool:
    """Whether the base is on this machine and has a language model's config.json at its top level."""
    try:
        folder = builtin_base(base) if base.startswith(BUILTIN_PREFIX) else Path(base).expanduser()
    except UsageError:
        return False
    return (folder / "config.json").is_file()


def _language_model(base: str) -> UsageError:
    what = "it is a language model, and pictures train a diffusion pipeline"
    return UsageError(f"base {base}", what, "Name a pipeline with --base, or leave out --instance-dir.")
