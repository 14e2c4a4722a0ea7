"""Methods that act on a denoising step of a UNet: `method`."""
