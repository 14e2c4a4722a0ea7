"""Methods that add the LoRAs with constant weights: `gate`."""
