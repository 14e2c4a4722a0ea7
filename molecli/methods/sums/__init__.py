"""Methods that add the LoRAs up with weights that never change: `gate`."""
