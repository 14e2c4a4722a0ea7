"""Methods that combine the UNet's outputs in a denoising step: `method`."""
