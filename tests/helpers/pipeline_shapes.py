"""Every shape of diffusers pipeline with a UNet, tiny and random: a table {name: factory}.

A factory returns (pipe, call); `call(pipe, seed=0, **changes)` draws with the pipeline's own call, as one tensor. They
differ in what the UNet is given: rows (guidance has two parts, PAG and InstructPix2Pix three), frames, residuals of
other networks, picture embeddings, further channels. All are built of the parts of `tiny_pipelines`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from typing import Any

import diffusers
import torch
from PIL import Image
from tiny_pipelines import WIDTHS, build_pipeline, build_unet
from torch import Tensor, nn

Call = Callable[..., Tensor]
Factory = Callable[[], tuple[Any, Call]]

PROMPT = "a cat in a hat"
SIDE = 16
FRAMES = 3


def draw(pipe: Any, seed: int | Sequence[int] = 0, **inputs: Any) -> Tensor:
    """The latents (or frames) that the pipeline's own call makes of these inputs; several seeds for a batch."""
    generators = [torch.Generator().manual_seed(one) for one in ([seed] if isinstance(seed, int) else seed)]
    inputs = {"prompt": PROMPT, "num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent"} | inputs
    inputs = {name: value for name, value in inputs.items() if value is not None}
    with torch.no_grad():
        made = pipe(generator=generators[0] if isinstance(seed, int) else generators, **inputs)
    found = made.images if "images" in made else made.frames
    return found if isinstance(found, Tensor) else torch.as_tensor(found)


def picture(seed: int = 0, side: int = SIDE, mode: str = "RGB") -> Image.Image:
    """A picture of noise."""
    channels = len(mode)
    numbers = torch.randint(0, 255, (side, side, channels), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(numbers.to(torch.uint8).squeeze(-1).numpy(), mode)


def mask(side: int = SIDE) -> Image.Image:
    """White on the right half, which is drawn anew."""
    half = torch.zeros(side, side, dtype=torch.uint8)
    half[:, side // 2 :] = 255
    return Image.fromarray(half.numpy(), "L")


def _made(kind: str, pipeline: Any, call: dict[str, Any], *, unet: dict[str, Any] | None = None, **parts: Any) -> Any:
    """The pipeline class on the parts of `kind`, with another UNet and further parts; and its call."""
    torch.manual_seed(1)
    given = build_pipeline(kind).components
    if unet:
        given["unet"] = build_unet(kind, **unet)
    given |= {name: part(given) if callable(part) else part for name, part in parts.items()}
    names = set(signature(pipeline.__init__).parameters)
    given = {name: part for name, part in given.items() if name in names}
    given |= {name: False for name in ("requires_safety_checker", "add_watermarker") if name in names}
    pipe = pipeline(**given)
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
    return pipe, partial(draw, **call)


def _spread(module: nn.Module) -> nn.Module:
    """The module with its layers that start at zero filled, so that it does something."""
    for parameter in module.parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.3)
    return module


def _controlnet(own: dict[str, Any]) -> nn.Module:
    net = diffusers.ControlNetModel.from_unet(own["unet"], conditioning_channels=3)
    net.controlnet_cond_embedding = type(net.controlnet_cond_embedding)(
        conditioning_embedding_channels=8, conditioning_channels=3, block_out_channels=(8, 8)
    )
    return _spread(net)


def _adapter(own: dict[str, Any], factor: int = 2, kind: str = "full_adapter") -> nn.Module:
    return _spread(diffusers.T2IAdapter(channels=[8, 16], num_res_blocks=1, downscale_factor=factor, adapter_type=kind))


def _motion(own: dict[str, Any]) -> nn.Module:
    adapter = diffusers.MotionAdapter(
        block_out_channels=(8, 16), motion_layers_per_block=1, motion_norm_num_groups=4,
        motion_num_attention_heads=2, motion_max_seq_length=8,
    )  # fmt: skip
    return _spread(adapter)


def load_ip_adapter(pipe: Any, seed: int = 0) -> None:
    """A random IP-Adapter of four image tokens on the pipeline's UNet; its picture embeddings have width 6."""
    unet, random = pipe.unet, torch.Generator().manual_seed(seed)

    def weights(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random) * shape[-1] ** -0.5

    width, layers = unet.config.cross_attention_dim, {}
    crossing = [n for n in unet.attn_processors if n.endswith("attn2.processor") and "motion_modules" not in n]
    for i, name in enumerate(crossing):
        attention = unet.get_submodule(name.removesuffix(".processor"))
        for leaf in ("to_k_ip", "to_v_ip"):
            layers[f"{2 * i + 1}.{leaf}.weight"] = weights(attention.to_k.out_features, width)
    projection = {
        "proj.weight": weights(4 * width, 6), "proj.bias": torch.zeros(4 * width),
        "norm.weight": torch.ones(width), "norm.bias": torch.zeros(width),
    }  # fmt: skip
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": layers}])
    unet.requires_grad_(False)


def picture_embeddings(parts: int = 2, seed: int = 3) -> list[Tensor]:
    """For `ip_adapter_image_embeds`: [parts, 1, 6] of one picture."""
    return [torch.randn(parts, 1, 6, generator=torch.Generator().manual_seed(seed))]


def _with_ip_adapter(make: Factory) -> tuple[Any, Call]:
    pipe, call = make()
    load_ip_adapter(pipe)
    return pipe, partial(call, ip_adapter_image_embeds=picture_embeddings())


def _lcm(kind: str, pipeline: Any, call: dict[str, Any]) -> Any:
    def scheduler(own: dict[str, Any]) -> Any:
        return diffusers.LCMScheduler.from_config(own["scheduler"].config)

    return _made(kind, pipeline, {"num_inference_steps": 2} | call, unet={"time_cond_proj_dim": 8}, scheduler=scheduler)


def _refiner() -> tuple[Any, Call]:
    """SDXL's refiner: one text encoder, the second, and an aesthetic score."""
    width = WIDTHS["sdxl"][1]
    unet = {"cross_attention_dim": width, "projection_class_embeddings_input_dim": 5 * 8 + 12}
    pipe, call = _made(
        "sdxl", diffusers.StableDiffusionXLImg2ImgPipeline, {"image": picture(), "strength": 0.9}, unet=unet,
    )  # fmt: skip
    pipe.register_modules(text_encoder=None, tokenizer=None)
    pipe.register_to_config(requires_aesthetics_score=True)
    return pipe, call


def _upscale() -> tuple[Any, Call]:
    low = diffusers.DDPMScheduler(beta_schedule="scaled_linear")
    return _made(
        "sd2", diffusers.StableDiffusionUpscalePipeline,
        {"image": picture(side=8), "noise_level": 20, "output_type": "np"},
        unet={"in_channels": 7, "num_class_embeds": 1000}, low_res_scheduler=low,
    )  # fmt: skip


def _depth() -> tuple[Any, Call]:
    depth = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(5))
    call = {"image": picture(), "depth_map": depth, "strength": 0.9}
    return _made("sd", diffusers.StableDiffusionDepth2ImgPipeline, call, unet={"in_channels": 5}, depth_estimator=None)


def _text_to_image(kind: str, **call: Any) -> Factory:
    pipeline = diffusers.StableDiffusionXLPipeline if kind == "sdxl" else diffusers.StableDiffusionPipeline
    return partial(_made, kind, pipeline, {"height": SIDE, "width": SIDE} | call)


def _shapes() -> dict[str, Factory]:
    d, size = diffusers, {"height": SIDE, "width": SIDE}
    start = {"image": picture(), "strength": 0.9}
    hole = start | {"mask_image": mask(), **size}
    hint = {"image": picture(7)}
    control = {"control_image": picture(7)}
    video = {"num_frames": FRAMES, **size}
    clip = {"video": [picture(i) for i in range(FRAMES)], "strength": 0.9}
    pag = {"pag_scale": 2.0}
    edit = {"image": picture(), "image_guidance_scale": 1.5}
    nine = {"in_channels": 9}
    return {
        "sd": _text_to_image("sd"),
        "sd_unguided": _text_to_image("sd", guidance_scale=1.0),
        "sd2": _text_to_image("sd2"),
        "sdxl": _text_to_image("sdxl"),
        "sd_img2img": partial(_made, "sd", d.StableDiffusionImg2ImgPipeline, start),
        "sdxl_img2img": partial(_made, "sdxl", d.StableDiffusionXLImg2ImgPipeline, start),
        "sdxl_refiner": _refiner,
        "sd_inpaint": partial(_made, "sd", d.StableDiffusionInpaintPipeline, hole),
        "sd_inpaint_9": partial(_made, "sd", d.StableDiffusionInpaintPipeline, hole, unet=nine),
        "sdxl_inpaint": partial(_made, "sdxl", d.StableDiffusionXLInpaintPipeline, hole),
        "sdxl_inpaint_9": partial(_made, "sdxl", d.StableDiffusionXLInpaintPipeline, hole, unet=nine),
        "sd_controlnet": partial(_made, "sd", d.StableDiffusionControlNetPipeline, hint, controlnet=_controlnet),
        "sd_controlnet_img2img": partial(
            _made, "sd", d.StableDiffusionControlNetImg2ImgPipeline, start | control, controlnet=_controlnet
        ),
        "sd_controlnet_inpaint": partial(
            _made, "sd", d.StableDiffusionControlNetInpaintPipeline, hole | control, controlnet=_controlnet
        ),
        "sdxl_controlnet": partial(_made, "sdxl", d.StableDiffusionXLControlNetPipeline, hint, controlnet=_controlnet),
        "sd_t2i_adapter": partial(_made, "sd", d.StableDiffusionAdapterPipeline, hint | size, adapter=_adapter),
        "sdxl_t2i_adapter": partial(
            _made, "sdxl", d.StableDiffusionXLAdapterPipeline, hint | size,
            adapter=partial(_adapter, factor=4, kind="full_adapter_xl"),
        ),
        "sd_ip_adapter": partial(_with_ip_adapter, _text_to_image("sd")),
        "sdxl_ip_adapter": partial(_with_ip_adapter, _text_to_image("sdxl")),
        "sd_pag": partial(_made, "sd", d.StableDiffusionPAGPipeline, pag | size),
        "sd_pag_unguided": partial(_made, "sd", d.StableDiffusionPAGPipeline, pag | size | {"guidance_scale": 0.0}),
        "sd_pag_img2img": partial(_made, "sd", d.StableDiffusionPAGImg2ImgPipeline, pag | start),
        "sdxl_pag": partial(_made, "sdxl", d.StableDiffusionXLPAGPipeline, pag | size),
        "sd_pix2pix": partial(_made, "sd", d.StableDiffusionInstructPix2PixPipeline, edit, unet={"in_channels": 8}),
        "sdxl_pix2pix": partial(
            _made, "sdxl", d.StableDiffusionXLInstructPix2PixPipeline, edit | size, unet={"in_channels": 8}
        ),
        "sd_lcm": partial(_lcm, "sd", d.LatentConsistencyModelPipeline, size),
        "sd_lcm_img2img": partial(_lcm, "sd", d.LatentConsistencyModelImg2ImgPipeline, start),
        "sdxl_lcm": partial(_lcm, "sdxl", d.StableDiffusionXLPipeline, size),
        "sd_upscale": _upscale,
        "sd_depth": _depth,
        "animatediff": partial(_made, "sd", d.AnimateDiffPipeline, video, motion_adapter=_motion),
        "animatediff_unguided": partial(
            _made, "sd", d.AnimateDiffPipeline, video | {"guidance_scale": 1.0}, motion_adapter=_motion
        ),
        "animatediff_video2video": partial(
            _made, "sd", d.AnimateDiffVideoToVideoPipeline, clip | size, motion_adapter=_motion
        ),
        "animatediff_controlnet": partial(
            _made, "sd", d.AnimateDiffControlNetPipeline,
            video | {"conditioning_frames": [picture(i) for i in range(FRAMES)]},
            motion_adapter=_motion, controlnet=_controlnet,
        ),
        "animatediff_sdxl": partial(_made, "sdxl", d.AnimateDiffSDXLPipeline, video, motion_adapter=_motion),
        "animatediff_pag": partial(
            _made, "sd", d.AnimateDiffPAGPipeline, video | pag | {"pag_applied_layers": None},
            motion_adapter=_motion, pag_applied_layers="mid_block.*attn1",
        ),
    }  # fmt: skip


SHAPES: dict[str, Factory] = _shapes()
