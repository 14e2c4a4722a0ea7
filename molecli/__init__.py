"""mole: compose trained LoRAs."""

__version__ = "0.1.0"
