"""Methods whose learned gates weight the LoRAs at every site: `build_gates`."""
