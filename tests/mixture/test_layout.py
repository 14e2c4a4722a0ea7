"""What experts are attached to: a model without its wrappers, and never a part of one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from molecli.errors import UsageError
from molecli.mixture.layout import host_of


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process only."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_distributed_model_is_its_inner_one(alone: None) -> None:
    model = nn.Linear(2, 2)
    assert host_of(nn.parallel.DistributedDataParallel(model)) is model


def test_sharded_weights_are_refused(alone: None) -> None:
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    model = fully_shard(nn.Sequential(nn.Linear(2, 2)), mesh=mesh)
    with pytest.raises(UsageError) as caught:
        host_of(model)
    assert str(caught.value) == (
        "attach: the model's weights are shared out among processes (FSDP, tensor parallel or ZeRO-3). "
        "Attach LoRAs to a whole model, such as one in DistributedDataParallel."
    )


def test_copies_on_several_devices_are_refused() -> None:
    model = nn.DataParallel(nn.Linear(2, 2))
    model.device_ids = [0, 1]
    with pytest.raises(UsageError, match="DataParallel copies the model to 2 devices, and LoRAs are attached to one"):
        host_of(model)
