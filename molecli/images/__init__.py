"""What the commands do on a diffusion pipeline; `text` holds the same rooms for language models."""
