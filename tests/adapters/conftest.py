"""A LoRA that PEFT wrote for the tiny T5, and tiny pipelines of every family, which loading leaves as they were."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from peft_parity import matrices_of
from torch import Tensor


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


@pytest.fixture
def adapter(tiny_t5: Any, make_peft_adapter: Callable[..., Path], tmp_path: Path) -> Path:
    """A folder `lora` with a plain LoRA of rank 4 and alpha 8 on every q and wo of the tiny T5."""
    return make_peft_adapter(tiny_t5.model, tmp_path / "lora", rank=4, alpha=8, targets=["q", "wo"])


@pytest.fixture
def matrices(tiny_t5: Any) -> dict[str, tuple[int, int]]:
    return matrices_of(tiny_t5.model)


@pytest.fixture
def configure() -> Callable[..., None]:
    """`configure(folder, key=value)` changes keys of its adapter_config.json; None removes one."""

    def change(folder: Path, **values: Any) -> None:
        file = folder / "adapter_config.json"
        config = {**json.loads(file.read_text()), **values}
        file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))

    return change


@pytest.fixture
def rewrite() -> Callable[[Path, Callable[[dict[str, Tensor]], dict[str, Tensor]]], Path]:
    """`rewrite(folder, change)` stores `change(tensors)`; returns the file."""
    from safetensors.torch import load_file, save_file

    def change(folder: Path, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
        file = folder / "adapter_model.safetensors"
        save_file(edit(load_file(file)), file)
        return file

    return change


@pytest.fixture
def alone() -> Callable[[Path], Path]:
    """`alone(folder)` -> its weights as a single .safetensors with no configuration beside it."""

    def move(folder: Path) -> Path:
        (folder.parent / "single").mkdir()
        return Path(shutil.copy(folder / "adapter_model.safetensors", folder.parent / "single" / "x.safetensors"))

    return move
