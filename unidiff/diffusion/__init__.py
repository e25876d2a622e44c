"""Diffusion mathematics: schedules, forward process, objectives, likelihood. Tensors in, tensors out; no trainer, no model."""
