"""unidiff: unified multimodal discrete diffusion in PyTorch (text and image tokens, one masked diffusion model)."""

__version__ = "0.1.0"
