"""The factor on the LoRAs' updates that a pipeline's caller gives: `cross_attention_kwargs={"scale": s}`.

diffusers reads it for its own LoRAs, in the UNet from the call, and in the text encoders from `encode_prompt`.
Contents: called_scale, TextScale.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import wraps
from inspect import signature
from typing import Any

from torch.utils.hooks import RemovableHandle

from molecli.mixture.covered import Covered


def called_scale(kwargs: Mapping[str, Any]) -> float:
    """The factor on the LoRAs' updates in a UNet call, as diffusers reads it for its own: `cross_attention_kwargs`."""
    return float((kwargs.get("cross_attention_kwargs") or {}).get("scale", 1.0))


class TextScale(RemovableHandle):
    """Notes the factor on the LoRAs of the text encoders, `lora_scale`, while the pipeline encodes a prompt.

    diffusers gives it to the layers of its own LoRAs, and to nothing that a hook of the encoder could see. So the
    pipeline's `encode_prompt` is covered by an attribute of the same name until the handle is removed.
    """

    def __init__(self, pipe: Any, note: Callable[[float], None]) -> None:
        super().__init__(OrderedDict())
        self._attached = True
        encode, arguments = pipe.encode_prompt, signature(pipe.encode_prompt)
        takes_loras = hasattr(pipe, "load_lora_weights")  # the others ignore the factor

        @wraps(encode)
        def noting(*args: Any, **kwargs: Any) -> Any:
            scale = arguments.bind_partial(*args, **kwargs).arguments.get("lora_scale")
            if scale is None or not takes_loras or not self._attached:
                return encode(*args, **kwargs)
            note(float(scale))
            try:
                return encode(*args, **kwargs)
            finally:
                note(1.0)

        self._covered = Covered(pipe, "encode_prompt", noting)

    def remove(self) -> None:
        self._attached = False  # another mixture that has covered it since calls through it
        self._covered.remove()
