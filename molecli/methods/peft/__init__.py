"""Methods whose LoRAs PEFT holds and routes with its own code: `peft_config`."""
