"""Frozen models that host experts: language models and diffusion pipelines, loaded and wrapped."""
