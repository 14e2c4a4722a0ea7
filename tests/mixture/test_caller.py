"""A pipeline that shares the UNet of the one that LoRAs are attached to: its own guidance counts, or it is refused."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from molecli.errors import RunError
from molecli.mixture.build import build_mixture, sum_of
from molecli.mixture.layout import adaptable_matrices, host_of
from tests.helpers.tiny_pipelines import attention_only, build_pipeline, make_expert


def shared(pipe: Any) -> Any:
    """Another pipeline of the same parts."""
    other = diffusers.StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    return other


def drawn(pipe: Any, guidance: float, **more: Any) -> Tensor:
    return pipe(
        "a cat", num_inference_steps=2, guidance_scale=guidance, generator=torch.Generator().manual_seed(0),
        output_type="latent", **more,
    ).images  # fmt: skip


def experts(model: Any) -> list[Any]:
    matrices = adaptable_matrices(model)
    return [make_expert(name, matrices, seed=seed, keep=attention_only) for seed, name in enumerate("ab")]


@pytest.mark.parametrize("mode", ["switch", "composite", "loratorio"])
def test_the_guidance_is_that_of_the_pipeline_that_calls(mode: str) -> None:
    pipe = build_pipeline("sd")
    other = shared(pipe)
    model = host_of(pipe)
    with build_mixture(model, experts(model), mode=mode):
        drawn(pipe, 1.0)  # what the pipeline before it was called with
        found = [drawn(other, 5.0), drawn(pipe, 1.0)]
    own = host_of(other)
    with build_mixture(own, experts(own), mode=mode):
        assert torch.equal(found[0], drawn(other, 5.0))
        assert torch.equal(found[1], drawn(other, 1.0))


def test_a_scale_that_would_miss_the_text_encoders_is_refused() -> None:
    pipe = build_pipeline("sd")
    other = shared(pipe)
    model = host_of(pipe)
    with sum_of(model, experts(model)):
        drawn(other, 2.0)
        drawn(pipe, 2.0, cross_attention_kwargs={"scale": 0.5})
        with pytest.raises(RunError) as error:
            drawn(other, 2.0, cross_attention_kwargs={"scale": 0.5})
    assert str(error.value) == (
        "pipeline: a scale reaches the text encoders only in the pipeline that the LoRAs are attached to. Attach the "
        "LoRAs to the pipeline that you call."
    )
