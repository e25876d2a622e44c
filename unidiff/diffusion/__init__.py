"""Diffusion mathematics: schedules, forward process, objectives, likelihood. Tensors in, tensors out; no trainer, no model."""

from unidiff.diffusion.likelihood import Nelbo, mask_count_nelbo, model_scorer, without_eos_fill
from unidiff.diffusion.noise import NoisyBatch, keyed_uniform, mask_count, mask_tokens
from unidiff.diffusion.objective import ElboTerms, gather_masked, joint_elbo, masked_nll
from unidiff.diffusion.schedules import Schedule, get_schedule

__all__ = [
    "ElboTerms",
    "Nelbo",
    "NoisyBatch",
    "Schedule",
    "gather_masked",
    "get_schedule",
    "joint_elbo",
    "keyed_uniform",
    "mask_count",
    "mask_count_nelbo",
    "mask_tokens",
    "masked_nll",
    "model_scorer",
    "without_eos_fill",
]
