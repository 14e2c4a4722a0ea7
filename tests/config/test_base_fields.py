"""Settings that a base does not read are refused, and a base that is not to be had is said to be just that."""

from __future__ import annotations

from typing import Any

import huggingface_hub
import pytest

from molecli.config import ComposeRecipe
from molecli.config.unread import check_fields
from molecli.errors import UsageError, UserError


@pytest.mark.parametrize(
    ("offline", "error", "message"),
    [
        (True, OSError("not cached"), "HF_HUB_OFFLINE=1 forbids downloads"),
        (False, OSError("cannot connect to it"), "the hub cannot be reached"),
        (False, OSError("404: no such repository"), "the hub answers: 404: no such repository"),
    ],
)
def test_a_pipeline_that_is_not_to_be_had_is_not_taken_for_a_language_model(
    monkeypatch: pytest.MonkeyPatch, offline: bool, error: Exception, message: str
) -> None:
    def missing(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", missing)
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: offline)
    recipe = ComposeRecipe.model_validate(
        {"base": "somebody/pipeline", "loras": ["a=x"], "concepts": {"a": {"prompt": "a cat"}}}
    )
    with pytest.raises(UserError, match=message):
        check_fields(recipe, ("concepts",), "pictures")


def test_what_only_pictures_read_is_refused_on_a_language_model_that_is_there(tiny_folder: Any) -> None:
    recipe = ComposeRecipe.model_validate(
        {"base": str(tiny_folder("llama")), "loras": ["a=x"], "concepts": {"a": {"prompt": "a cat"}}}
    )
    with pytest.raises(UsageError, match="concepts: it is only for diffusion pipelines"):
        check_fields(recipe, ("concepts",), "pictures")
