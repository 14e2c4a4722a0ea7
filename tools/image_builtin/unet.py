"""Stage `unet`: trains the UNet and the text encoder on latents computed in advance, in several calls if necessary."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from . import scenes
from .batches import World
from .loop import Average, Clock, adamw, compiled, fast, prepare, processes, rank, rate, save, set_rate, share_gradients
from .models import new_scheduler, new_text_encoder, new_unet
from .vae import encoded

DROPPED = 0.1  # share of captions left out, for classifier-free guidance
# Timesteps are drawn so that the log signal-to-noise ratio is about normal (Karras et al. 2022, arXiv 2206.00364,
# Table 1, moved towards less noise because 16×16 latents carry little redundancy), a share of them uniformly.
LOG_SNR_MEAN, LOG_SNR_SPREAD, UNIFORM = 0.8, 2.3, 0.15
SAVE_MINUTES = 2.0


@dataclass(frozen=True)
class Pool:
    """Scaled latents [N, 4, 16, 16] in half precision and token ids [N, 32] of their captions."""

    latents: Tensor
    ids: Tensor


class Denoiser(nn.Module):
    """The two networks that are trained together."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.unet: UNet2DConditionModel = new_unet()
        self.text: CLIPTextModel = new_text_encoder(vocab)

    def forward(self, noisy: Tensor, time: Tensor, ids: Tensor) -> Tensor:
        states = self.text(input_ids=ids)[0]
        return self.unet(noisy, time, states, return_dict=False)[0]


def prepare_pool(world: World, vae: AutoencoderKL, size: int, seed: int, chunk: int = 2048) -> Pool:
    """Draw and encode this many base scenes."""
    generator = scenes.seeded(seed, world.device)
    latents = torch.empty(size, 4, 16, 16, dtype=torch.float16, device=world.device)
    ids = torch.empty(size, world.ids.empty(1).shape[1], dtype=torch.int16, device=world.device)
    for start in range(0, size, chunk):
        batch = world.draw(generator, min(chunk, size - start))
        latents[start : start + chunk] = encoded(vae, batch.images, generator).half()
        ids[start : start + chunk] = world.ids(batch.which, batch.background, batch.flat).short()
    return Pool(latents, ids)


def noise_levels(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For every timestep: signal, noise, and the chance that training draws it."""
    kept = new_scheduler().alphas_cumprod.to(device).double()
    log_snr = (kept / (1 - kept)).log()
    density = torch.exp(-0.5 * ((log_snr - LOG_SNR_MEAN) / LOG_SNR_SPREAD) ** 2) * torch.gradient(log_snr)[0].abs()
    chance = (1 - UNIFORM) * density / density.sum() + UNIFORM / len(kept)
    return kept.sqrt().float(), (1 - kept).sqrt().float(), chance.float()


def train_unet(
    world: World,
    pool: Pool,
    work: Path,
    clock: Clock,
    *,
    batch: int = 512,
    peak: float = 8e-4,
    keep: bool = True,
    initial: Path | None = None,
) -> Denoiser:
    """Train for the clock's minutes and return the averaged weights; `keep` writes checkpoints to go on from.

    The schedule spans `clock.schedule` minutes over all calls; the checkpoint knows how many are spent. Without one,
    `initial` (a pipeline's folder) gives the weights to start from.
    """
    device, checkpoint = world.device, work / "unet.pt"
    prepare(device)
    torch.manual_seed(4)
    model = Denoiser(world.ids.end + 1).to(device)
    if initial is not None and not checkpoint.exists():
        model.unet.load_state_dict(UNet2DConditionModel.from_pretrained(initial / "unet").float().state_dict())
        model.text.load_state_dict(CLIPTextModel.from_pretrained(initial / "text_encoder").float().state_dict())
    model.unet.to(memory_format=torch.channels_last)
    # No decay on the embeddings, so that words in no caption of the base keep their vectors.
    optimizer = adamw(model.parameters(), peak, 0.01, device, model.text.get_input_embeddings().weight)
    average = Average(model.parameters(), 0.999)
    samples = 0
    if keep and checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average.load(state["average"])
        clock.done_before, samples = state["minutes"], state["samples"]
    torch.manual_seed(4 + samples + 1000 * rank())
    compiled(model.unet, device), compiled(model.text, device)
    keep = keep and rank() == 0
    signal, noise_of, chance = noise_levels(device)
    nothing, saved = world.ids.empty(batch), 0.0
    while clock.running():
        set_rate(optimizer, rate(clock.fraction, peak, warmup=0.02))
        rows = torch.randint(len(pool.latents), (batch,), device=device)
        ids = torch.where(torch.rand(batch, 1, device=device) < DROPPED, nothing, pool.ids[rows].long())
        clean, time = pool.latents[rows].float(), torch.multinomial(chance, batch, replacement=True)
        noise = torch.randn_like(clean)
        a, b = signal[time][:, None, None, None], noise_of[time][:, None, None, None]
        noisy = (a * clean + b * noise).contiguous(memory_format=torch.channels_last)
        with fast(device):
            predicted = model(noisy, time, ids)
        loss = F.mse_loss(predicted.float(), a * noise - b * clean)
        loss.backward()
        share_gradients(model.parameters())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update()
        samples += batch * processes()
        clock.report(loss=loss, samples=samples, lr=optimizer.param_groups[0]["lr"])
        if keep and clock.elapsed - saved > SAVE_MINUTES:
            _checkpoint(checkpoint, model, optimizer, average, clock, samples)
            saved = clock.elapsed
    if keep:
        _checkpoint(checkpoint, model, optimizer, average, clock, samples)
    average.swap()
    print(f"[unet {rank()}] {samples} samples in {clock.done_before + clock.elapsed:.1f} minutes", flush=True)
    return model


def _checkpoint(
    path: Path, model: Denoiser, optimizer: torch.optim.AdamW, average: Average, clock: Clock, samples: int
) -> None:
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "average": average.state(),
        "minutes": clock.done_before + clock.elapsed,
        "samples": samples,
    }
    save(state, path)


@torch.no_grad()
def level_embeddings(model: Denoiser, world: World) -> None:
    """Gives the embeddings of tokens in no caption of the base the mean length of the others."""
    table = model.text.get_input_embeddings().weight
    ids = world.ids
    seen = torch.zeros(len(table), dtype=torch.bool, device=table.device)
    seen[ids.names[world.base()].flatten()] = True
    seen[ids.phrases[ids.phrases >= 0]] = True
    seen[[ids.comma, ids.conjunction, ids.start, ids.end]] = True
    lengths = table.norm(dim=1, keepdim=True)
    print(
        f"[unet] embedding lengths: trained {lengths[seen].mean():.3f}, others {lengths[~seen].mean():.3f}", flush=True
    )
    table[~seen] *= lengths[seen].mean() / lengths[~seen]


def save_pipeline(model: Denoiser, vae_folder: Path, tokenizer: Path, folder: Path) -> None:
    """Write a Stable Diffusion pipeline in half precision."""
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(vae_folder, dtype=torch.float16),
        text_encoder=model.text.half().cpu(),
        tokenizer=CLIPTokenizer.from_pretrained(tokenizer),
        unet=model.unet.half().cpu().to(memory_format=torch.contiguous_format),
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
