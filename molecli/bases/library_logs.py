"""Silences the libraries' output while a base is read, and shortens their errors to one line."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator

from transformers.utils import logging as transformers_logging

from molecli.files.base_source import BaseSource


def first_line(error: Exception) -> str:
    """The error's type and the first line of its text, shortened for a message."""
    text = " ".join(str(error).strip().split("\n")[0].split()).rstrip(".")
    return f"{type(error).__name__}: {text}"[:160]


@contextlib.contextmanager
def quiet(source: BaseSource) -> Iterator[None]:
    """A context in which transformers prints nothing, unless molecli's log level is DEBUG (`--verbose`).

    Its log level stays at errors afterwards, because generation warns about settings that we choose on purpose.
    """
    if logging.getLogger("molecli").isEnabledFor(logging.DEBUG):
        yield
        return
    transformers_logging.set_verbosity_error()
    bars = transformers_logging.is_progress_bar_enabled()
    if source.local or not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()  # a download keeps its bar
    # The GGUF reader draws a bar that cannot be turned off by a setting.
    hidden = contextlib.redirect_stderr(io.StringIO()) if source.gguf_file else contextlib.nullcontext()
    try:
        with hidden, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
