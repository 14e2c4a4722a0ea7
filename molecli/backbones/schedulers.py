"""Schedulers by name: how a pipeline steps from noise to a picture."""

from __future__ import annotations

import difflib
from typing import Any

import diffusers

from molecli.errors import RunError, UsageError

# name -> diffusers' class, and what its configuration is to say whatever the base's own scheduler says.
# Latents do not lie in [-1, 1]: a prediction of them must not be clipped there.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpmsolver++_karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True},
    ),
    "unipc": ("UniPCMultistepScheduler", {}),
}


def make_scheduler(name: str | None, own: Any) -> Any:
    """A fresh scheduler with the noise schedule of `own`; of its kind too where no name is given.

    Raises: UsageError for an unknown name, naming the nearest; RunError where a package is missing that it needs.
    """
    if name is None:
        return type(own).from_config(own.config)
    if name not in SCHEDULERS:
        near = difflib.get_close_matches(name, SCHEDULERS, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(SCHEDULERS)}."
        raise UsageError("--scheduler", f"no scheduler {name!r}", hint)
    kind, settings = SCHEDULERS[name]
    try:
        return getattr(diffusers, kind).from_config(own.config, **settings)
    except ImportError as error:
        what = f"the scheduler {name} needs a package that is not installed"
        raise RunError("--scheduler", what, "Run: pip install scipy.") from error


def noise_schedule(own: Any) -> Any:
    """What adds noise in training: DDPM's forward process on the betas of the base's own scheduler."""
    return diffusers.DDPMScheduler.from_config(own.config, clip_sample=False)
