"""Methods whose learned gates weigh the LoRAs at every site: `build_gates`."""
