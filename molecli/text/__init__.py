"""What the commands do on a language model; `images` holds the same rooms for diffusion pipelines."""
