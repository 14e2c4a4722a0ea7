"""Diffusion bases at work: training LoRAs on pictures, learning gates, drawing and scoring."""
