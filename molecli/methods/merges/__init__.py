"""Methods that merge all LoRAs into one, matrix by matrix: `merge`."""
