"""The schedulers of diffusers by name: each one's class and settings. Needs no torch.

Contents: SchedulerRow, SCHEDULERS, scheduler_names, scheduler_called.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from molecli.errors import near


@dataclass(frozen=True)
class SchedulerRow:
    """A scheduler: diffusers' class, settings that override those of the base's own scheduler, other names for it."""

    kind: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()


# Latents can lie outside [-1, 1], so their prediction must not be clipped to it.
_UNCLIPPED = {"clip_sample": False}
_PLAIN, _KARRAS = {"use_karras_sigmas": False}, {"use_karras_sigmas": True}
_MULTI = "DPMSolverMultistepScheduler"
_SDE = {"algorithm_type": "sde-dpmsolver++"}
_ODE = {"algorithm_type": "dpmsolver++"}
# The other names are those of A1111, ComfyUI and diffusers' classes.
SCHEDULERS: dict[str, SchedulerRow] = {
    "ddim": SchedulerRow("DDIMScheduler", _UNCLIPPED),
    "ddpm": SchedulerRow("DDPMScheduler", _UNCLIPPED),
    "pndm": SchedulerRow("PNDMScheduler", {"skip_prk_steps": True}, ("plms",)),
    "euler": SchedulerRow("EulerDiscreteScheduler", _PLAIN),
    "euler_karras": SchedulerRow("EulerDiscreteScheduler", _KARRAS),
    "euler_a": SchedulerRow("EulerAncestralDiscreteScheduler", {}, ("euler ancestral",)),
    "heun": SchedulerRow("HeunDiscreteScheduler", _PLAIN),
    "heun_karras": SchedulerRow("HeunDiscreteScheduler", _KARRAS),
    "lms": SchedulerRow("LMSDiscreteScheduler", _PLAIN),
    "lms_karras": SchedulerRow("LMSDiscreteScheduler", _KARRAS),
    "dpmsolver++": SchedulerRow(_MULTI, {**_ODE, **_PLAIN}, ("dpm++ 2m", "dpmpp_2m", "dpm++")),
    "dpmsolver++_karras": SchedulerRow(
        _MULTI, {**_ODE, **_KARRAS}, ("dpm++ 2m karras", "dpmpp_2m_karras", "dpm++ karras")
    ),
    "dpmsolver++_sde": SchedulerRow(_MULTI, {**_SDE, **_PLAIN}, ("dpm++ 2m sde", "dpmpp_2m_sde")),
    "dpmsolver++_sde_karras": SchedulerRow(_MULTI, {**_SDE, **_KARRAS}, ("dpm++ 2m sde karras", "dpmpp_2m_sde_karras")),
    "dpmsolver++_single": SchedulerRow("DPMSolverSinglestepScheduler", {**_ODE, **_PLAIN}, ("dpm++ 2s", "dpmpp_2s")),
    "dpmsolver++_single_karras": SchedulerRow(
        "DPMSolverSinglestepScheduler", {**_ODE, **_KARRAS}, ("dpm++ 2s karras", "dpmpp_2s_karras")
    ),
    "dpm_sde": SchedulerRow("DPMSolverSDEScheduler", _PLAIN, ("dpm++ sde", "dpmpp_sde")),
    "dpm_sde_karras": SchedulerRow("DPMSolverSDEScheduler", _KARRAS, ("dpm++ sde karras", "dpmpp_sde_karras")),
    "dpm2": SchedulerRow("KDPM2DiscreteScheduler", _PLAIN, ("dpm_2", "kdpm2")),
    "dpm2_karras": SchedulerRow("KDPM2DiscreteScheduler", _KARRAS),
    "dpm2_a": SchedulerRow("KDPM2AncestralDiscreteScheduler", _PLAIN, ("dpm_2_ancestral", "kdpm2 ancestral")),
    "dpm2_a_karras": SchedulerRow("KDPM2AncestralDiscreteScheduler", _KARRAS),
    "deis": SchedulerRow("DEISMultistepScheduler", _PLAIN),
    "unipc": SchedulerRow("UniPCMultistepScheduler", _PLAIN, ("uni_pc",)),
    "unipc_karras": SchedulerRow("UniPCMultistepScheduler", _KARRAS),
    "sasolver": SchedulerRow("SASolverScheduler", _PLAIN),
    "lcm": SchedulerRow("LCMScheduler", _UNCLIPPED),
    "tcd": SchedulerRow("TCDScheduler", _UNCLIPPED),
}


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9+]", "", name.lower())


# The class alone means its first row.
_CALLED = {_key(row.kind): name for name, row in reversed(SCHEDULERS.items())}
_CALLED |= {_key(row.kind.removesuffix("Scheduler")): name for name, row in reversed(SCHEDULERS.items())}
_CALLED |= {_key(called): name for name, row in SCHEDULERS.items() for called in (*row.aliases, name)}


def scheduler_called(name: str) -> str | None:
    """The scheduler's own name for any of its names, such as "DPM++ 2M Karras"; None if there is none."""
    return name if name in SCHEDULERS else _CALLED.get(_key(name))


def unknown_scheduler(name: str) -> str:
    """What to do about an unknown name: the nearest one, if any is near, and all names."""
    nearest = near(_key(name), _CALLED)
    hint = f"Did you mean {_CALLED[nearest]}? " if nearest else ""
    return f"{hint}Known: {', '.join(SCHEDULERS)}; A1111's and diffusers' names mean the same."
