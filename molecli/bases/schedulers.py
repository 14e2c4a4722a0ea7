"""A pipeline's scheduler by name, with the noise schedule of the base's own one.

Contents: make_scheduler, seed_noise, check_eta, noise_schedule.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers

from molecli.catalog.schedulers import SCHEDULERS, scheduler_called, unknown_scheduler
from molecli.errors import RunError, UsageError, suggestion

# Draws its noise from a Brownian tree with a seed of its own, not from the generators that the pipeline passes on.
_OWN_NOISE = "DPMSolverSDEScheduler"


def make_scheduler(name: str | None, own: Any, options: Mapping[str, Any] | None = None) -> Any:
    """A new scheduler with the noise schedule of `own`; without a name it is also of the same class.

    options: settings of its class, such as timestep_spacing="trailing"; they come before those of the name.
    Raises: UsageError for an unknown name or option, with the known ones; RunError if a required package is missing.
    """
    called = None if name is None else scheduler_called(name)
    if name is not None and called is None:
        raise UsageError("--scheduler", f"there is no scheduler {name!r}", unknown_scheduler(name))
    kind: Any = type(own)
    settings: Mapping[str, Any] = {}
    if called is not None:
        kind, settings = getattr(diffusers, SCHEDULERS[called].kind), SCHEDULERS[called].settings
    try:
        # With the default backends missing, the class is a stand-in that raises an ImportError.
        return kind.from_config(own.config, **{**settings, **_checked(kind, options or {})})
    except ImportError as error:
        package = "torchsde" if kind.__name__ == _OWN_NOISE else "scipy"
        what = f"the scheduler {called or kind.__name__} needs a package that is not installed"
        raise RunError("--scheduler", what, f"Run: pip install {package}.") from error
    except ValueError as error:  # diffusers refuses combinations of settings
        what = f"diffusers refuses these settings ({str(error).splitlines()[0]})"
        raise UsageError(f"--scheduler {called or kind.__name__}", what, "Change image.scheduler_options.") from error


def seed_noise(scheduler: Any, seeds: Sequence[int]) -> None:
    """Gives a scheduler with noise of its own each picture's seed, so that no picture depends on its batch."""
    if type(scheduler).__name__ == _OWN_NOISE:
        scheduler.noise_sampler_seed = list(seeds)


def check_eta(scheduler: Any, eta: float) -> None:
    """Raises: UsageError if `eta` is not 0 and the scheduler has no such setting."""
    if eta and "eta" not in inspect.signature(scheduler.step).parameters:
        name = type(scheduler).__name__
        raise UsageError("image.eta", f"{name} has no eta", "Leave it out, or choose --scheduler ddim or tcd.")


def noise_schedule(own: Any) -> Any:
    """The scheduler that adds noise in training: DDPM's forward process with the betas of the base's own scheduler."""
    return diffusers.DDPMScheduler.from_config(own.config, clip_sample=False)


def _checked(kind: Any, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """`options`, if the class has them. Raises: UsageError."""
    known = [name for name in inspect.signature(kind.__init__).parameters if name not in ("self", "args", "kwargs")]
    for name in options:
        if name not in known:
            where = f"image.scheduler_options.{name}"
            raise UsageError(where, f"{kind.__name__} has no such setting", suggestion(name, known))
    return options
