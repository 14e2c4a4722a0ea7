"""mole: compose trained LoRAs on one frozen base, by learned gates or a fixed mixture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from molecli.mixture.attach import attach

__version__ = "0.1.0"
__all__ = ["__version__", "attach"]


def __getattr__(name: str) -> Any:
    # Lazy: `mole --help` imports this package, and must not wait for torch.
    if name == "attach":
        from molecli.mixture.attach import attach

        return attach
    raise AttributeError(f"module 'molecli' has no attribute {name!r}")
