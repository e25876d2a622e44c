"""The reverse process, token by token: the posterior q(x_s | x_t, x) and an exact ancestral step."""

from __future__ import annotations

import torch
from torch import Tensor


def unmask_probability(alpha_t: Tensor, alpha_s: Tensor) -> Tensor:
    """(alpha_s - alpha_t) / (1 - alpha_t) for s < t: chance that a token masked at t is visible at s."""
    return (alpha_s - alpha_t) / (1 - alpha_t)


def posterior(x0_probs: Tensor, x_t: Tensor, mask_id: int, alpha_t: Tensor, alpha_s: Tensor) -> Tensor:
    """q(x_s | x_t, x) with x replaced by a distribution: MDLM eq. 4 and 7.

    A masked position stays masked with (1 - alpha_s)/(1 - alpha_t), else it becomes x; a visible one stays as it is.

    Args:
        x0_probs: `[..., V]`, the clean-token distribution; the [MASK] column must be 0.
        x_t: int64 `[...]`, ids in the same V columns.
        mask_id: column of [MASK].
        alpha_t, alpha_s: broadcastable to `x_t`, alpha_t <= alpha_s.

    Returns:
        `[..., V]`, summing to 1.
    """
    alpha_t, alpha_s = torch.as_tensor(alpha_t), torch.as_tensor(alpha_s)
    unmask = unmask_probability(alpha_t, alpha_s).expand(x_t.shape)[..., None]
    probs = unmask * x0_probs
    probs[..., mask_id] = 1 - unmask[..., 0]
    visible = torch.nn.functional.one_hot(x_t, x0_probs.shape[-1]).to(probs)
    return torch.where((x_t == mask_id)[..., None], probs, visible)


def reverse_step(
    x_t: Tensor, masked: Tensor, x0_probs: Tensor, unmask: Tensor, u_unmask: Tensor, u_token: Tensor, start: int = 0
) -> Tensor:
    """One exact ancestral step: decide *whether* to unmask, then *which* token, by separate uniforms.

    A single float32 Gumbel draw over [MASK] and the tokens would pick rare tokens at a wrong rate.

    Args:
        x_t: int64 `[...]`.
        masked: bool `[...]`, the positions that may change.
        x0_probs: `[..., n]` over ids start .. start + n - 1.
        unmask: chance of unmasking, broadcastable to `x_t` (see `unmask_probability`).
        u_unmask, u_token: uniforms `[...]`.
    """
    chosen = start + draw_token(x0_probs, u_token)
    return torch.where(masked & (u_unmask < unmask), chosen, x_t)


def draw_token(probs: Tensor, u: Tensor) -> Tensor:
    """Inverse-CDF draw in float64: int64 `[...]` from `[..., n]` weights and uniforms `[...]`; zero weights never win."""
    cdf = probs.double().cumsum(-1)
    token = torch.searchsorted(cdf, (u.double() * cdf[..., -1])[..., None], right=True)[..., 0]
    # u times the total may round up to the total: take the last token with weight
    last = (probs > 0).to(torch.int64).cumsum(-1).argmax(-1)
    return torch.minimum(token, last)
