"""What `image_cost.py` times: one frozen pipeline alone, under mole, and under diffusers' own adapters.

Hosts share only the base's weights (diffusers' fused one needs its own UNet), so that all can exist at the same time
and rounds can interleave them.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from image_pipelines import assemble
from torch import Tensor, nn

from molecli.adapters import write_diffusers
from molecli.bases.diffusion import Diffusion
from molecli.bases.pipeline import PipelineModules
from molecli.bases.replay import Replayed, replaying
from molecli.config import GateConfig, MethodConfig
from molecli.experts import Expert, LowRank
from molecli.mixture.build import build_mixture
from molecli.mixture.layout import host_of

PARTS: dict[str, Callable[[str], bool]] = {
    "attention": lambda matrix: matrix.startswith("unet.") and ".attn" in matrix,
    "ff": lambda matrix: ".ff." in matrix,
    "conv": lambda matrix: ".conv" in matrix and "blocks" in matrix,
    "text": lambda matrix: matrix.startswith("text_encoder."),
}
PROMPT = "a cat and a dog by the sea"


@dataclass
class Host:
    """A pipeline that can be timed; one denoising step of it corresponds to `passes` single passes with one LoRA.

    steps: the smallest number per call that shows its cost; bytes: of base and LoRAs; mixture: for mole's own hosts;
    stand_in: draws from recorded steps, as `mole sample` does on a GPU.
    """

    name: str
    pipe: Any
    loras: int = 0
    rank: int = 0
    passes: int = 0
    steps: int = 1
    bytes: int = 0
    mixture: Any = None
    stand_in: Replayed | None = None

    def replay(self) -> None:
        """Draws from recorded steps from now on."""
        parts = self.mixture.model if self.mixture else PipelineModules(self.pipe)
        self.stand_in = Replayed(parts)

    def draw(self, work: Work, steps: int, *, decode: bool = False, on_step: Callable[[], None] | None = None) -> Any:
        """The pictures, or their latents without `decode`, by the pipeline's own call; `on_step` after each step."""
        with replaying(self.pipe, self.stand_in) if self.stand_in else nullcontext():
            return self.pipe(
                **work.prompts,
                latents=work.latents,
                num_inference_steps=steps,
                guidance_scale=7.5,
                height=work.pixels,
                width=work.pixels,
                output_type="np" if decode else "latent",
                callback_on_step_end=_step_callback(on_step) if on_step else None,
            ).images


@dataclass(frozen=True)
class Work:
    """The inputs of every host: starting latents [B, C, h, w], and prompts as arguments of the pipeline's call."""

    pixels: int
    latents: Tensor
    prompts: dict[str, Any]


def make_work(pipe: Any, *, batch: int, pixels: int, encode: bool, seed: int) -> Work:
    """The inputs of `batch` pictures; without `encode` the prompts are encoded already, and only steps are timed."""
    side = pixels // pipe.vae_scale_factor
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, pipe.unet.config.in_channels, side, side, generator=generator)
    latents = latents.to(pipe.unet.device, pipe.unet.dtype)
    if encode:
        return Work(pixels, latents, {"prompt": [PROMPT] * batch})
    with torch.no_grad():
        prompt, negative = pipe.encode_prompt([PROMPT] * batch, pipe.unet.device, 1, True)
    return Work(pixels, latents, {"prompt_embeds": prompt, "negative_prompt_embeds": negative})


def make_experts(pipe: Any, count: int, *, rank: int, parts: Sequence[str], seed: int) -> list[Expert]:
    """Random LoRAs on `parts` of the pipeline."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {m: s for m, s in Diffusion(pipe).matrices().items() if any(PARTS[part](m) for part in parts)}

    def factors(shape: tuple[int, ...]) -> LowRank:
        A = torch.randn(rank, *shape[1:], generator=generator) / torch.Size(shape[1:]).numel() ** 0.5
        B = 0.1 * torch.randn(shape[0], rank, generator=generator)
        return LowRank(A.to(pipe.unet.dtype), B.to(pipe.unet.dtype), 1.0)

    return [
        Expert(chr(ord("a") + i), {m: factors(shape) for m, shape in shapes.items()}, rank=rank, alpha=float(rank))
        for i in range(count)
    ]


def base_host(pipe: Any) -> Host:
    """The base alone."""
    return Host("base", sharing(pipe), bytes=_bytes(pipe, ()))


def mole_host(
    pipe: Any,
    experts: Sequence[Expert],
    name: str,
    *,
    mode: str,
    gate: GateConfig | None = None,
    at_once: int | None = None,
    passes: int = 0,
    steps: int = 1,
) -> Host:
    """Composed by mole in `mode`; Switch changes LoRAs at every step."""
    own = sharing(pipe)
    mixture = build_mixture(
        host_of(own), experts, mode=mode, gate=gate, method=MethodConfig(tau=1), branches_at_once=at_once
    )
    mixture.attach()
    return Host(name, own, len(experts), experts[0].rank, passes, steps, _bytes(pipe, experts), mixture)


def diffusers_host(pipe: Any, experts: Sequence[Expert], folder: Path, *, fused: bool) -> Host:
    """The pipeline's own `load_lora_weights` and `set_adapters`: the sum of all; `fused`, merged into the weights."""
    own = sharing(pipe)
    if fused:
        own.unet, own.text_encoder = copy.deepcopy(pipe.unet), copy.deepcopy(pipe.text_encoder)
    for expert in experts:
        path = folder / expert.name
        if not path.exists():
            write_diffusers(path, expert.factors)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns of every further adapter
            own.load_lora_weights(path, adapter_name=expert.name)
    own.set_adapters([expert.name for expert in experts], [1.0] * len(experts))
    if fused:
        own.fuse_lora(adapter_names=[expert.name for expert in experts])
        own.unload_lora_weights()  # the weights stay; only the layers that would add to them go
    for part in (own.unet, own.text_encoder):
        part.eval().requires_grad_(False)
    name = f"diffusers, {'fused' if fused else 'adapters'}"
    return Host(name, own, len(experts), experts[0].rank, bytes=_bytes(pipe, () if fused else experts))


def sharing(pipe: Any) -> Any:
    """A pipeline with copies of the modules on the same tensors, and a scheduler of its own."""
    names = ("unet", "vae", "text_encoder")
    tensors = [t for name in names for m in (getattr(pipe, name),) for t in (*m.parameters(), *m.buffers())]
    copies: dict[str, Any] = {n: copy.deepcopy(getattr(pipe, n), {id(t): t for t in tensors}) for n in names}
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    return assemble({**copies, "tokenizer": pipe.tokenizer, "scheduler": scheduler})


def _bytes(pipe: Any, experts: Sequence[Expert]) -> int:
    modules: tuple[nn.Module, ...] = (pipe.unet, pipe.vae, pipe.text_encoder)
    held = sum(p.numel() * p.element_size() for module in modules for p in module.parameters())
    return held + pipe.unet.dtype.itemsize * sum(f.A.numel() + f.B.numel() for e in experts for f in e.factors.values())


def _step_callback(on_step: Callable[[], None]) -> Callable[..., dict[str, Any]]:
    def callback(*_: Any) -> dict[str, Any]:
        on_step()
        return {}

    return callback
