"""Exporting a composition on a diffusion base: the pictures over which its gates are averaged, and the written files.

prepare       recipe -> PictureExport, checked
PictureExport   what `commands.export` needs from a kind of base: inputs, writing and loading the adapter, a probe
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import Tensor

from molecli.adapters import write_diffusers, write_kohya, write_peft
from molecli.bases.diffusion import Diffusion
from molecli.bases.language import seeded
from molecli.bases.library_logs import quiet
from molecli.bases.pipeline import TEXT_ENCODERS
from molecli.config import ConceptConfig
from molecli.errors import UsageError
from molecli.evaluation.export_error import Observed
from molecli.experts import LowRank
from molecli.files.base_source import find_base
from molecli.files.composition import Composition
from molecli.files.concepts import Concept
from molecli.files.lora_spec import DIFFUSERS_FILE, LoraLike, LoraSpec
from molecli.images.clip_skip import use_clip_skip
from molecli.images.columns import read_concepts
from molecli.images.denoising import Prompts, all_latents, draw_noise, prediction_errors
from molecli.images.drawing import options, warnings_as_notes
from molecli.images.gate_trace import GateRecorder, Trace
from molecli.images.joint_prompts import prompts_of
from molecli.images.pictures import Album, concept_pictures
from molecli.mixture.attach import base_of
from molecli.mixture.constant import read_gates
from molecli.mixture.mixture import Mixture
from molecli.protocols import Note, Picture, Progress
from molecli.training.examples import sample

if TYPE_CHECKING:
    from molecli.config import ExportRecipe
    from molecli.suites.origins import Sources


KOHYA_FILE = "lora.safetensors"
TIMESTEPS = 4  # for each picture, evenly spread
PROBED = 4
_PROBES = ("a photo of a dog", "")


def prepare(recipe: ExportRecipe, composition: Composition, note: Note = lambda text: None) -> PictureExport:
    """The task of a recipe. Raises: UsageError for settings that would be ignored."""
    if recipe.calibration.examples is not None or recipe.calibration.data_dir is not None:
        flag = "--data-dir" if recipe.calibration.examples is None else "--calibrate"
        what = "examples are for a language model, and this base draws pictures"
        raise UsageError(flag, what, "Write --prompt TEXT, or leave it out.")
    return PictureExport(recipe, composition, note)


class PictureExport:
    """A `commands.export.Task` on a diffusion base."""

    layouts: tuple[str, ...] = ("diffusers", "kohya", "peft")
    of, unit = "pictures", "denoising error of a picture"
    sources: Mapping[str, Sources] = {}

    def __init__(self, recipe: ExportRecipe, composition: Composition, note: Note) -> None:
        self.recipe, self.composition, self.note = recipe, composition, note
        self._latents: Tensor | None = None

    @cached_property
    def concepts(self) -> dict[str, Concept]:
        """{name: what the LoRA adds}, of the LoRAs that are not masked."""
        recipe = self.recipe
        given = yaml.safe_load(self.composition.recipe).get("concepts") or {}
        configs = {name: ConceptConfig.model_validate(entry) for name, entry in given.items()} | recipe.concepts
        own = [LoraSpec(record.name, record.source) for record in self.composition.experts]
        loras: list[LoraLike] = list(recipe.loras) or list(own)
        found = read_concepts(loras, configs)
        return {name: replace(found[name], name=name) for name in self._kept if name in found}

    @cached_property
    def prompts(self) -> tuple[str, ...]:
        """The prompts that both the composition and its export draw."""
        return self.recipe.calibration.prompts or prompts_of(list(self.concepts.values()))

    @cached_property
    def pictures(self) -> list[Picture]:
        """The concepts' pictures; none if prompts are given instead. Raises: UsageError for a LoRA without pictures."""
        if self.recipe.calibration.prompts:
            return []
        try:
            found = concept_pictures(self._kept, self.concepts)
        except UsageError as error:
            raise UsageError(error.where, error.what, "Write --prompt TEXT, which is drawn instead.") from None
        limit = self.recipe.calibration.limit
        return [p for name in self._kept for p in sample([p for p in found if p.task == name], limit, name)]

    @property
    def _kept(self) -> list[str]:
        """The LoRAs that are not masked."""
        names = self.composition.names
        return [name for name in names if name not in self.recipe.mask and name in (self.recipe.only or names)]

    @property
    def inputs(self) -> int:
        return len(self.pictures) or len(self.prompts)

    def count(self, *, fetch: bool) -> int:
        """How many inputs there are."""
        return self.inputs

    @torch.no_grad()
    def observe(
        self, backbone: Diffusion, mixture: Mixture | None, *, gates: bool, label: str, progress: Progress | None
    ) -> Observed:
        """The pictures' denoising errors and the latents drawn for the prompts, with the mixture or the base (None).

        The gates are those of the denoising passes. If prompts are given, they are those of drawing the prompts.
        """

        def count_up(done: int, total: int) -> None:
            if progress is not None:
                progress(label, done, total)

        use_clip_skip(backbone, self.recipe.image.clip_skip, [self.composition])
        asked = mixture if gates else None
        with mixture or nullcontext(), warnings_as_notes(self.note):
            errors, seen = self._denoised(backbone, asked, count_up) if self.pictures else ({}, {})
            latents, trace = self._drawn(backbone, None if self.pictures else asked)
        return Observed(errors, seen if trace is None else _means(trace), latents)

    def _denoised(
        self, backbone: Diffusion, asked: Mixture | None, count_up: Callable[[int, int], None]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(errors {concept: [pictures]}, gates {site: [pictures, N]}), both averaged over a picture's timesteps."""
        side, count = backbone.resolution, len(self.pictures)
        if self._latents is None:
            self._latents = all_latents(backbone, Album(self.pictures, side))
        adapted = any(m.partition(".")[0] in TEXT_ENCODERS for r in self.composition.experts for m in r.matrices)
        prompts = Prompts(backbone, side, keep=not adapted)
        last = backbone.noising.config.num_train_timesteps
        errors = torch.zeros(TIMESTEPS, count)
        seen: dict[str, list[Tensor]] = {}
        size = self.recipe.calibration.batch_size
        with seeded(self.recipe.seed, backbone.device):  # every method gets the same noise
            for i in range(TIMESTEPS):
                for start in range(0, count, size):
                    places = range(start, min(start + size, count))
                    clean = self._latents[list(places)]
                    noise, _ = draw_noise(backbone, clean)
                    moments = torch.full((len(places),), last * (2 * i + 1) // (2 * TIMESTEPS), device=clean.device)
                    conditioning = prompts([self.pictures[place].prompt for place in places])
                    errors[i, list(places)] = prediction_errors(backbone, conditioning, clean, noise, moments).cpu()
                    for site, gate in read_gates(asked).items() if asked is not None else ():
                        seen.setdefault(site, []).append(gate.expand(len(places), -1))
                    count_up(i * count + places.stop, TIMESTEPS * count)
        of_pictures = errors.mean(0)
        by_concept: dict[str, list[Tensor]] = {}
        for place, picture in enumerate(self.pictures):
            by_concept.setdefault(picture.task, []).append(of_pictures[place])
        gates = {site: torch.cat(parts).unflatten(0, (TIMESTEPS, count)).mean(0) for site, parts in seen.items()}
        return {name: torch.stack(own) for name, own in by_concept.items()}, gates

    def _drawn(self, backbone: Diffusion, asked: Mixture | None) -> tuple[Tensor | None, Trace | None]:
        """(latents [prompts, C, h, w], the gates while they were drawn, if a mixture is `asked`)."""
        if not self.prompts:
            return None, None
        image, size, drawn = self.recipe.image, self.recipe.calibration.batch_size, []
        with ExitStack() as stack:
            recorder = None if asked is None else stack.enter_context(GateRecorder(asked))
            for start in range(0, len(self.prompts), size):
                batch = self.prompts[start : start + size]
                drawn += backbone.generate(
                    batch,
                    seeds=[self.recipe.seed + start + i for i in range(len(batch))],
                    **options(image),
                    on_step=recorder,
                    latent=True,
                )
        return torch.stack(drawn).float().cpu(), None if recorder is None else recorder.trace()

    def write(self, folder: Path, layout: str, factors: Mapping[str, LowRank], backbone: Diffusion) -> Path:
        """The folder with the adapter in `layout`; PEFT's has one subfolder per component."""
        base = {"base_model_name_or_path": self.composition.base}
        if layout == "diffusers":
            return write_diffusers(folder, factors, metadata=base)
        if layout == "kohya":
            write_kohya(folder / KOHYA_FILE, factors, backbone.matrices(), metadata=base)
            return folder
        for component, own in _by_component(factors).items():
            write_peft(folder / component, own, self.composition.base)
        return folder

    @contextmanager
    def loaded(self, backbone: Diffusion, folder: Path, layout: str) -> Iterator[None]:
        """A context in which the base has the adapter in `folder`, loaded by diffusers (or PEFT)."""
        pipe = backbone.pipe
        if layout == "peft":
            with _with_peft(pipe, folder):
                yield
            return
        name = DIFFUSERS_FILE if layout == "diffusers" else KOHYA_FILE
        with quiet(find_base(base_of(self.recipe.base, self.composition))):
            pipe.load_lora_weights(str(folder), weight_name=name, adapter_name="export")
        try:
            yield
        finally:
            pipe.unload_lora_weights()

    @torch.no_grad()
    def probe(self, backbone: Diffusion) -> Tensor:
        """The UNet's output on noise for a few prompts, with the pipeline as it is now."""
        known = self.prompts if "prompts" in self.__dict__ else ()
        prompts = list(known[:PROBED]) or list(_PROBES)
        config, last = backbone.pipe.unet.config, backbone.noising.config.num_train_timesteps
        side = backbone.resolution // backbone.pipe.vae_scale_factor
        noise = torch.randn(len(prompts), config.in_channels, side, side, generator=torch.Generator().manual_seed(0))
        moments = torch.tensor([last * (2 * i + 1) // (2 * len(prompts)) for i in range(len(prompts))])
        device = backbone.device
        return backbone.predict(noise.to(device), moments.to(device), backbone.encode(prompts)).float().cpu()

    def library(self, layout: str) -> str:
        """The name and version of the library that loads the adapter."""
        return f"PEFT {version('peft')}" if layout == "peft" else f"diffusers {version('diffusers')}"


def _by_component(factors: Mapping[str, LowRank]) -> dict[str, dict[str, LowRank]]:
    parts: dict[str, dict[str, LowRank]] = {}
    for name, low_rank in factors.items():
        component, _, path = name.partition(".")
        parts.setdefault(component, {})[path] = low_rank
    return parts


@contextmanager
def _with_peft(pipe: Any, folder: Path) -> Iterator[None]:
    from peft import PeftModel

    adapted: list[Any] = []
    try:
        for component in ("unet", *TEXT_ENCODERS):
            if (folder / component).is_dir():
                part = getattr(pipe, component)
                adapted.append(PeftModel.from_pretrained(part, str(folder / component), torch_device=str(part.device)))
        yield
    finally:
        for model in adapted:
            model.unload()


def _means(trace: Trace) -> dict[str, Tensor]:
    """{site: [pictures, N]}: means over denoising steps and both halves of guidance; a text encoder's on the prompt."""
    steps = torch.stack([values.mean(1) for values in trace.steps.values()]).mean(0)
    in_unet = {site: steps[:, i] for i, site in enumerate(trace.sites)}
    return in_unet | {site: trace.text[:, i] for i, site in enumerate(trace.text_sites)}
