"""Diffusion mathematics: schedules, forward process, objectives, likelihood. Tensors in, tensors out; no trainer, no model."""

from unidiff.diffusion.noise import keyed_uniform
from unidiff.diffusion.objective import (
    ElboTerms,
    MaskedIndex,
    condition_on,
    gather_masked,
    joint_elbo,
    masked_nll,
    modality_nll,
    time_weight,
)
from unidiff.diffusion.process import NoisyBatch, hide, mask_count, mask_tokens, posterior, reverse_step
from unidiff.diffusion.schedules import Schedule, get_schedule, sample_times

__all__ = [
    "ElboTerms",
    "MaskedIndex",
    "NoisyBatch",
    "Schedule",
    "condition_on",
    "gather_masked",
    "get_schedule",
    "hide",
    "joint_elbo",
    "keyed_uniform",
    "mask_count",
    "mask_tokens",
    "masked_nll",
    "modality_nll",
    "posterior",
    "reverse_step",
    "sample_times",
    "time_weight",
]
