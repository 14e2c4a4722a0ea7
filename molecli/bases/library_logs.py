"""The libraries' own chatter while a base is read, and their errors in one line."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator

from transformers.utils import logging as transformers_logging

from molecli.files.base_source import Source


def first_line(error: Exception) -> str:
    """The error's type and the first line of its text, short enough for a message."""
    text = " ".join(str(error).strip().split("\n")[0].split()).rstrip(".")
    return f"{type(error).__name__}: {text}"[:160]


@contextlib.contextmanager
def quiet(source: Source) -> Iterator[None]:
    """Inside, transformers prints nothing, unless molecli's log level is DEBUG (`--verbose`).

    Its log level stays at errors afterwards too: generation warns about settings that are ours on purpose.
    """
    if logging.getLogger("molecli").isEnabledFor(logging.DEBUG):
        yield
        return
    transformers_logging.set_verbosity_error()
    bars = transformers_logging.is_progress_bar_enabled()
    if source.local or not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()  # But a download shows its bar.
    # The GGUF reader draws a bar that no setting turns off.
    hidden = contextlib.redirect_stderr(io.StringIO()) if source.gguf_file else contextlib.nullcontext()
    try:
        with hidden, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
