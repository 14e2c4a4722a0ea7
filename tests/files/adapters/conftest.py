"""Tiny pipelines of every family, shared by the tests of this folder: loading a LoRA leaves them as they were."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest


@pytest.fixture(scope="session")
def pipeline_of() -> Callable[[str], Any]:
    """`pipeline_of(family)` -> a tiny random pipeline of "sd1", "sd2" or "sdxl"."""
    from diffusers.utils import logging
    from lora_pipelines import build_pipeline
    from transformers.utils import logging as transformers_logging

    logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    return cache(build_pipeline)


@pytest.fixture(scope="session")
def matrices_in(pipeline_of: Callable[[str], Any]) -> Callable[[str], dict[str, tuple[int, ...]]]:
    """`matrices_in(family)` -> the adaptable matrices of its pipeline."""
    from lora_pipelines import pipeline_matrices

    return cache(lambda family: pipeline_matrices(pipeline_of(family)))
