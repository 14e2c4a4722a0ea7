"""Diffusion backbones (Stable Diffusion 1.x, 2.x, XL): a frozen diffusers pipeline that hosts experts.

Contents: Conditioning, Diffusion. Only the pipeline's public parts are used.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from molecli.bases.clip_skip import check_skip, skipping
from molecli.bases.language import freeze, summed
from molecli.bases.pipeline import PipelineModules, pipeline_matrices
from molecli.bases.prompt_limits import warn_of_cuts
from molecli.bases.replay import Replayed, replaying
from molecli.bases.schedulers import check_eta, make_scheduler, noise_schedule, seed_noise
from molecli.bases.starts import Start, start_inputs, start_pipeline
from molecli.catalog.builtin import BUILTIN_IMAGE_BASE, BUILTIN_IMAGE_GUIDANCE, DEFAULT_GUIDANCE
from molecli.errors import UsageError
from molecli.files.pictures import read_picture
from molecli.functional import fingerprint
from molecli.functional.wrapped import is_managed
from molecli.protocols import Family, Moment, Picture, Shape

OnStep = Callable[[Moment], object]


@dataclass(frozen=True)
class Conditioning:
    """The UNet's conditioning: embeds [B, T, d] of the prompts; for SDXL also pooled [B, d'] and time_ids [B, 6]."""

    embeds: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None


class Diffusion:
    """A frozen pipeline as a backbone for the training loops and the methods."""

    family: Family = "diffusion"

    def __init__(self, pipe: Any, name: str = "") -> None:
        self.pipe = pipe
        self._parts = PipelineModules(pipe)
        self.model: nn.Module = self._parts
        self.name = name
        for part in (self.model, pipe.vae):
            freeze(part)
        pipe.set_progress_bar_config(disable=True)
        self.noising = noise_schedule(pipe.scheduler)
        self._stand_in: Replayed | None = None
        # The last layers of the text encoder(s) that prompts skip, in training and in pictures, unless told otherwise.
        self.clip_skip: int | None = None

    @property
    def device(self) -> torch.device:
        return torch.device(self.pipe._execution_device)

    @property
    def resolution(self) -> int:
        """The default side of the pipeline's pictures, in pixels."""
        size = self.pipe.unet.config.sample_size
        return int((size if isinstance(size, int) else size[0]) * self.pipe.vae_scale_factor)

    @property
    def guidance(self) -> float:
        """The default classifier-free guidance scale of the base's pictures."""
        return BUILTIN_IMAGE_GUIDANCE if self.name == BUILTIN_IMAGE_BASE else DEFAULT_GUIDANCE

    def matrices(self) -> dict[str, Shape]:
        """Adaptable matrices: name -> shape; see `pipeline.pipeline_matrices`."""
        return pipeline_matrices(self._parts)

    def fingerprint(self) -> str:
        """A string that identifies this UNet and its text encoder(s); see `functional.fingerprint`."""
        return fingerprint.fingerprint(self.model)

    # -- parts of a step ---------------------------------------------------------------------------------------------

    def encode(self, prompts: Sequence[str], *, size: tuple[int, int] | None = None) -> Conditioning:
        """The conditioning for the prompts, with gradient if that is on; `size` (height, width) is a condition of SDXL.

        Warns if the end of a long prompt is cut.
        """
        warn_of_cuts(prompts, self._tokenizers)
        encoders = self._parts.text_encoders.values()
        check_skip(encoders, self.clip_skip)
        with skipping(encoders, self.clip_skip):
            out = self.pipe.encode_prompt(
                prompt=list(prompts),
                device=self.device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=False,
                clip_skip=self.clip_skip,
            )
        if len(out) == 2:
            return Conditioning(out[0])
        sides = size or (self.resolution, self.resolution)
        # As in the pipeline: the original size, no crop, the size to draw.
        ids = torch.tensor([[*sides, 0, 0, *sides]], device=self.device, dtype=out[0].dtype)
        return Conditioning(out[0], out[2], ids.expand(len(prompts), -1))

    def latents(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] as scaled latents: the posterior's mean, which is repeatable and can be kept.

        Departs: diffusers' training scripts sample the posterior; its spread is small beside the denoising noise.
        """
        vae = self.pipe.vae
        with self._exact_vae():
            mean = vae.encode(pixels.to(self.device, vae.dtype)).latent_dist.mode()
        shift, scale = self._latent_range(mean)
        return ((mean - shift) * scale).to(self._dtype)

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents as pixels [B, 3, H, W] in [0, 1], differentiable."""
        vae = self.pipe.vae
        with self._exact_vae():
            shift, scale = self._latent_range(latents)
            pixels = vae.decode((latents / scale + shift).to(self.device, vae.dtype)).sample
        return (pixels.float() / 2 + 0.5).clamp(0, 1)

    def predict(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The UNet's output on noisy latents [B, C, h, w] at timesteps [B]."""
        added = None
        if conditioning.pooled is not None:
            added = {"text_embeds": conditioning.pooled, "time_ids": conditioning.time_ids}
        out = self.pipe.unet(
            latents.to(self._dtype), timesteps, encoder_hidden_states=conditioning.embeds, added_cond_kwargs=added
        )
        return out.sample

    # -- training ----------------------------------------------------------------------------------------------------

    def collate(self, pictures: Sequence[Picture]) -> dict[str, Any]:
        """pixels [B, 3, H, W] in [-1, 1], prompts, noise and timesteps [B].

        The pixels are the middle square of each picture, scaled to the pipeline's resolution. Noise and timesteps come
        from torch's global CPU generator, which a training loop seeds for every step, so all devices get the same.
        """
        pixels = torch.stack([_pixels(p.target, _changed(p.target), self.resolution) for p in pictures])
        side = self.resolution // self.pipe.vae_scale_factor
        noise = torch.randn(len(pictures), self.pipe.unet.config.in_channels, side, side)
        timesteps = torch.randint(self.noising.config.num_train_timesteps, (len(pictures),))
        return {
            "pixels": pixels.to(self.device),
            "prompts": [picture.prompt for picture in pictures],
            "noise": noise.to(self.device, self._dtype),
            "timesteps": timesteps.to(self.device),
        }

    def denoise_loss(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """(sum over pictures of the mean squared error of the prediction, their number); see `example_losses`."""
        return summed(self.example_losses(batch))

    def example_losses(self, batch: Mapping[str, Any]) -> Tensor:
        """[B], each picture's mean squared error of the prediction: DDPM, Ho et al. 2020, Eq. 14.

        `batch` is what `collate` returns; "latents" [B, C, h, w] can replace pixels, and "weights" [B] multiply the
        pictures' errors. The target is noise, velocity or sample, depending on the base's scheduler.
        """
        with torch.no_grad():
            clean = batch["latents"] if "latents" in batch else self.latents(batch["pixels"])
        noise, timesteps = batch["noise"], batch["timesteps"]
        noisy = self.noising.add_noise(clean, noise, timesteps)
        predicted = self.predict(noisy, timesteps, self.encode(batch["prompts"], size=self._pixel_size(clean)))
        errors = (predicted.float() - self.target(clean, noise, timesteps).float()).square().flatten(1).mean(1)
        return errors * batch["weights"] if "weights" in batch else errors

    # Both names are used: one by the training of LoRAs, the other by that of gates.
    example_loss = token_loss = denoise_loss

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The target of the UNet's prediction. Source: v-prediction, Salimans & Ho 2022, v = α ε - σ x."""
        kind = self.noising.config.prediction_type
        if kind == "v_prediction":
            return self.noising.get_velocity(clean, noise, timesteps)
        if kind in ("epsilon", "sample"):
            return noise if kind == "epsilon" else clean
        raise UsageError(
            f"base {self.name}", f"its scheduler predicts {kind!r}", "Use one of epsilon, v_prediction, sample."
        )

    # -- drawing -----------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        steps: int,
        guidance: float | None = None,
        negative_prompt: str = "",
        height: int | None = None,
        width: int | None = None,
        scheduler: str | None = None,
        scheduler_options: Mapping[str, Any] | None = None,
        eta: float = 0.0,
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
        start: Sequence[Start] | None = None,
        replay: bool = True,
        on_step: OnStep | None = None,
        latent: bool = False,
    ) -> list[Any]:
        """A picture for each prompt, by the pipeline's own call; `on_step` is called after every denoising step.

        With `latent`, the tensors [C, h, w] that would be decoded. Each seed has its own CPU generator, so a picture
        does not depend on its batch or on earlier pictures. With `start`, one for each prompt and all of one size, the
        last steps are run from them (img2img, or inpainting with masks), in their size. With `replay`, steps on CUDA
        are recorded and replayed if possible, which needs the memory of one more step; see `replay.py`.
        Raises: UsageError for sides that are not multiples of 8, an unknown scheduler, settings that do not fit it or
        the pipeline, or a missing or surplus seed.
        """
        self._check_counts(prompts, seeds, start)
        if not prompts:
            return []
        pipe = self.pipe if start is None else start_pipeline(self.pipe, start)
        skip = self.clip_skip if clip_skip is None else clip_skip
        encoders = self._parts.text_encoders.values()
        check_skip(encoders, skip)
        call = self._sides(height, width) if start is None else start_inputs(start, steps)
        if guidance_rescale:
            if "guidance_rescale" not in inspect.signature(pipe.__call__).parameters:
                what = f"diffusers' {type(pipe).__name__} has no such setting"
                raise UsageError("image.guidance_rescale", what, "Leave it out.")
            call["guidance_rescale"] = guidance_rescale
        warn_of_cuts([*prompts, negative_prompt], self._tokenizers)
        with self._drawing(pipe, make_scheduler(scheduler, self.pipe.scheduler, scheduler_options)):
            check_eta(pipe.scheduler, eta)
            seed_noise(pipe.scheduler, seeds)
            with self._replaying(pipe, replay), skipping(encoders, skip):
                drawn = pipe(
                    prompt=list(prompts),
                    negative_prompt=[negative_prompt] * len(prompts) if negative_prompt else None,
                    num_inference_steps=steps,
                    guidance_scale=self.guidance if guidance is None else guidance,
                    eta=eta,
                    clip_skip=skip,
                    generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
                    callback_on_step_end=_step_callback(on_step) if on_step else None,
                    output_type="latent" if latent else "pil",
                    **call,
                ).images
        return list(drawn)

    def _check_counts(self, prompts: Sequence[str], seeds: Sequence[int], start: Sequence[Start] | None) -> None:
        for what, given in (("seed", seeds), ("start", prompts if start is None else start)):
            if len(given) != len(prompts):
                said = f"{len(given)} {what}s for {len(prompts)} prompts"
                raise UsageError("generate", said, f"Give one {what} for each picture.")

    def _sides(self, height: int | None, width: int | None) -> dict[str, Any]:
        sides = {"height": height or self.resolution, "width": width or self.resolution}
        for side, pixels in sides.items():
            if pixels < 8 or pixels % 8:
                raise UsageError(f"--{side} {pixels}", "it is not a multiple of 8", f"Write {max(8, pixels // 8 * 8)}.")
        return sides

    @contextmanager
    def _drawing(self, pipe: Any, scheduler: Any) -> Iterator[None]:
        """A context in which `pipe` draws with a new scheduler, and what is attached sees it; then all is as before."""
        own, seen = pipe.scheduler, self._parts.pipe
        pipe.scheduler, self._parts.pipe = scheduler, pipe
        try:
            yield
        finally:
            pipe.scheduler, self._parts.pipe = own, seen

    def _replaying(self, pipe: Any, wanted: bool) -> AbstractContextManager[None]:
        # A record has the addresses of the weights, which offloading changes, and the scales of PEFT's layers.
        if not wanted or self.device.type != "cuda" or is_managed(pipe.unet):
            return nullcontext()
        self._stand_in = self._stand_in or Replayed(self._parts)
        return replaying(pipe, self._stand_in)

    @contextmanager
    def _exact_vae(self) -> Iterator[None]:
        """A context in which a VAE that overflows in float16 (SDXL's config says so) computes in float32."""
        vae = self.pipe.vae
        upcast = vae.dtype == torch.float16 and bool(getattr(vae.config, "force_upcast", False))
        if upcast:
            vae.to(torch.float32)
        try:
            yield
        finally:
            if upcast:
                vae.to(torch.float16)

    def _latent_range(self, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """(shift, scale): scaled latents are (latents - shift) * scale."""
        config = self.pipe.vae.config
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is None or std is None:
            return 0.0, config.scaling_factor
        shape = (1, -1, 1, 1)
        return like.new_tensor(mean).view(shape), config.scaling_factor / like.new_tensor(std).view(shape)

    def _pixel_size(self, latents: Tensor) -> tuple[int, int]:
        factor = self.pipe.vae_scale_factor
        return latents.shape[-2] * factor, latents.shape[-1] * factor

    @property
    def _dtype(self) -> torch.dtype:
        return self.pipe.unet.dtype  # in which it computes, also if its weights are stored in another type

    @property
    def _tokenizers(self) -> list[Any]:
        found = (getattr(self.pipe, name, None) for name in ("tokenizer", "tokenizer_2"))
        return [tokenizer for tokenizer in found if tokenizer is not None]


def _step_callback(on_step: OnStep) -> Callable[..., dict[str, Any]]:
    def callback(pipe: Any, index: int, timestep: Any, _: dict[str, Any]) -> dict[str, Any]:
        on_step(Moment(index, pipe.num_timesteps, float(timestep), pipe.do_classifier_free_guidance))
        return {}

    return callback


def _changed(path: str) -> int:
    """When the file was last written (0 if it does not exist), so that the cache never returns an old picture."""
    file = Path(path)
    return file.stat().st_mtime_ns if file.exists() else 0


@lru_cache(maxsize=256)
def _pixels(path: str, changed: int, side: int) -> Tensor:
    """[3, side, side] in [-1, 1]: the middle square of the picture, scaled to `side`. Raises: as read_picture."""
    image = read_picture(path)
    scale = side / min(image.size)
    size = [max(side, round(length * scale)) for length in image.size]
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    image = image.resize((size[0], size[1]), Image.Resampling.LANCZOS).crop((left, top, left + side, top + side))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1.0
