"""A LoRA that PEFT wrote for the tiny T5, and what a broken copy of one says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft_parity import matrices_of
from torch import Tensor

from molecli.errors import UserError

Explained = Callable[..., None]


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


@pytest.fixture
def explained() -> Explained:
    """`explained(call, code, message)` asserts the exact message and exit code of the UserError that `call` raises."""

    def check(call: Callable[[], Any], code: int, message: str) -> None:
        with pytest.raises(UserError) as caught:
            call()
        assert (caught.value.exit_code, str(caught.value)) == (code, message)
        assert message.count("\n") < 3

    return check
