"""The section of a recipe that turns the vision-language judge on."""

from __future__ import annotations

from pydantic import Field

from molecli.files.recipe.parts import Section


class JudgeConfig(Section):
    """A vision-language model that compares pictures in pairs (Multi-LoRA Composition, arXiv 2402.16843)."""

    endpoint: str = Field(
        default="https://api.openai.com/v1", min_length=1, description="base URL of an OpenAI-compatible endpoint"
    )
    model: str = Field(default="gpt-4o", min_length=1, description="model that the endpoint knows")
    key_env: str = Field(
        default="OPENAI_API_KEY", min_length=1, description="environment variable that holds the key; never written"
    )
    baseline: str = Field(default="linear", min_length=1, description="the method every other is compared with")
    timeout_s: float = Field(default=60.0, gt=0.0, allow_inf_nan=False, description="seconds to wait for one answer")
    retries: int = Field(default=4, ge=0, description="further tries after a failure or an answer without scores")
    pause_s: float = Field(default=1.0, ge=0.0, allow_inf_nan=False, description="first pause; it doubles every time")
    concurrency: int = Field(default=4, ge=1, description="requests at once")
