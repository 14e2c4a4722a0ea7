"""Stage `vae`: the autoencoder, on scenes of all pictures in the base's style except the held-out concepts."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from . import scenes
from .batches import World
from .loop import Average, Clock, adamw, fast, prepare, rank, rate, set_rate, share_gradients
from .models import new_vae

KL_WEIGHT = 3e-4
COUNTS = (0.3, 0.25, 0.25, 0.1, 0.1)


def train_vae(
    world: World, folder: Path, clock: Clock, *, batch: int = 128, peak: float = 1e-3, initial: Path | None = None
) -> None:
    """Train for the clock's minutes, from the weights in `initial` if given; save with the measured `scaling_factor`.

    Not compiled, because compiling takes longer than it saves in a few minutes. Batches are small, to get more steps.
    """
    device = world.device
    prepare(device)
    torch.manual_seed(1)
    vae = new_vae()
    if initial is not None:
        vae.load_state_dict(AutoencoderKL.from_pretrained(initial).float().state_dict())
    vae = vae.to(device, memory_format=torch.channels_last)
    optimizer, average = adamw(vae.parameters(), peak, 1e-4, device), Average(vae.parameters(), 0.998)
    generator = scenes.seeded(11 + 1000 * rank(), device)
    torch.manual_seed(1 + 1000 * rank())
    while clock.running():
        set_rate(optimizer, rate(clock.fraction, peak))
        pixels = sampled(world, generator, batch).mul(2).sub(1).contiguous(memory_format=torch.channels_last)
        with fast(device):
            mean, logvar = vae.quant_conv(vae.encoder(pixels)).float().chunk(2, dim=1)
            logvar = logvar.clamp(-30, 20)
            latents = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
            drawn = vae.decoder(vae.post_quant_conv(latents))
        loss, error = distance(drawn.float(), pixels)
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        (loss + KL_WEIGHT * divergence).backward()
        share_gradients(vae.parameters())
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update()
        clock.report(loss=loss, l1=error, kl=divergence)
    if rank():
        return
    average.swap()
    factor, quality = measured(world, vae)
    vae.register_to_config(scaling_factor=factor)
    vae.half().save_pretrained(folder)
    print(f"[vae] scaling_factor {factor:.4f}  PSNR on scenes of held-out concepts {quality:.2f} dB", flush=True)


def sampled(world: World, generator: torch.Generator, batch: int) -> Tensor:
    """Scenes [batch, 3, 64, 64]: half of them of any picture, half of the base's named objects."""
    device, half = world.device, batch // 2
    count = scenes.counts(generator, half, COUNTS)
    anything = torch.randint(len(world.everything), (half, len(COUNTS)), generator=generator, device=device)
    which = torch.where(torch.arange(len(COUNTS), device=device) < count.unsqueeze(1), anything, -1)
    background = torch.randint(len(world.objects.phrases), (half,), generator=generator, device=device)
    canvas = scenes.draw_backgrounds(generator, background, world.objects)
    # Any colour can be behind a picture, because there are only twelve backgrounds.
    shift = torch.rand(half, 3, 1, 1, generator=generator, device=device) - 0.5
    canvas = torch.where(torch.rand(half, 1, 1, 1, generator=generator, device=device) < 0.3, canvas + shift, canvas)
    drawn = scenes.render(world.everything, scenes.arrange(generator, which), canvas.clamp(0, 1))
    return torch.cat([drawn, world.draw(generator, batch - half).images])


def distance(drawn: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and plain L1: L1 at three scales, and L1 of the differences between neighbours, which keeps edges."""
    error = (drawn - pixels).abs().mean()
    total = error
    for step in (2, 4):
        total = total + 0.5 * (F.avg_pool2d(drawn, step) - F.avg_pool2d(pixels, step)).abs().mean()
    gap = drawn - pixels
    edges = (gap[..., 1:, :] - gap[..., :-1, :]).abs().mean() + (gap[..., 1:] - gap[..., :-1]).abs().mean()
    return total + edges, error


@torch.no_grad()
def measured(world: World, vae: AutoencoderKL) -> tuple[float, float]:
    """1 / standard deviation of the latents of base scenes, and PSNR in dB on scenes of held-out concepts."""
    generator, rows = scenes.seeded(12, world.device), 256 if world.device.type == "cuda" else 16
    latents = vae.encode(world.draw(generator, rows).images * 2 - 1).latent_dist.mode()
    held_out = world.draw(generator, rows, allowed=world.concepts()).images * 2 - 1
    drawn = vae.decode(vae.encode(held_out).latent_dist.mode()).sample.clamp(-1, 1)
    mse = ((drawn - held_out) / 2).square().mean((1, 2, 3))
    return 1 / float(latents.std()), float((-10 * mse.log10()).mean())


def load_vae(folder: Path, device: torch.device) -> AutoencoderKL:
    """The trained autoencoder in fp32, fixed."""
    vae = AutoencoderKL.from_pretrained(folder, dtype=torch.float32)
    return vae.to(device, memory_format=torch.channels_last).requires_grad_(False).eval()


@torch.no_grad()
def encoded(vae: AutoencoderKL, images: Tensor, generator: torch.Generator) -> Tensor:
    """Scaled latents [B, 4, 16, 16] of images in [0, 1], drawn from the posterior."""
    with fast(images.device):
        pixels = (images * 2 - 1).contiguous(memory_format=torch.channels_last)
        mean, logvar = vae.quant_conv(vae.encoder(pixels)).float().chunk(2, dim=1)
    noise = torch.randn(mean.shape, generator=generator, device=mean.device)
    return (mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * noise) * vae.config.scaling_factor


@torch.no_grad()
def reconstructed(vae: AutoencoderKL, images: Tensor, generator: torch.Generator, blur: float = 0.0) -> Tensor:
    """Images in [0, 1] through the autoencoder, with noise of `blur` standard deviations on the scaled latents."""
    latents = encoded(vae, images, generator)
    latents = latents + blur * torch.randn(latents.shape, generator=generator, device=latents.device)
    with fast(images.device):
        drawn = vae.decoder(vae.post_quant_conv(latents / vae.config.scaling_factor))
    return (drawn.float() / 2 + 0.5).clamp(0, 1)
