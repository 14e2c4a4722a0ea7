"""Methods that PEFT hosts and routes by its own code: `peft_config`."""
