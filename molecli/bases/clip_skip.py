"""Text encoders of which the last layers are skipped, in diffusers' count: 1 reads the last layer but one.

Contents: check_skip, skipping.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from molecli.errors import UsageError

_INNER = "text_model"


def check_skip(encoders: Iterable[Any], skip: int | None) -> None:
    """Raises: UsageError if a text encoder has too few layers to skip that many."""
    layers = [int(encoder.config.num_hidden_layers) for encoder in encoders]
    # SDXL, with two encoders, reads the last layer but one, so that one layer is skipped already.
    most = min(layers, default=0) - len(layers)
    if skip is not None and not 0 <= skip <= most:
        what = f"the text encoder has {min(layers, default=0)} layers"
        remedy = f"Write at most {most}; A1111 counts one more." if most > 0 else "Leave it out."
        raise UsageError(f"--clip-skip {skip}", what, remedy)


@contextmanager
def skipping(encoders: Iterable[Any], skip: int | None) -> Iterator[None]:
    """A context in which diffusers can skip layers of these encoders.

    It looks for the last norm in `text_model`, which the encoders of transformers 5.6 and later no longer have.
    """
    changed = [] if skip is None else [encoder for encoder in encoders if not hasattr(encoder, _INNER)]
    for encoder in changed:
        encoder.__dict__[_INNER] = encoder  # not as a submodule: it would contain itself
    try:
        yield
    finally:
        for encoder in changed:
            del encoder.__dict__[_INNER]
