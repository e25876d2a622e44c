"""How MDLM and UniDisc draw times: independent, stratified, by importance. Nothing is drawn here: uniforms come in."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unidiff.diffusion.schedules import Schedule


def sample_times(
    n: int,
    u: Tensor,
    mode: str = "stratified",
    *,
    index: Tensor | None = None,
    rotation: Tensor | float = 0.0,
    low: float = 0.0,
    schedule: Schedule | None = None,
    rate_range: tuple[float, float] = (1e-3, 1.0),
) -> Tensor:
    """Times in (low, 1) from uniforms; nothing is drawn here, so times may be keyed by global sample index.

    Args:
        n: number of strata, normally the *global* batch size.
        u: uniforms `[B]`.
        mode: `iid`: z = u. `stratified`: z = ((k + u)/n + rotation) mod 1 for sample k, which MDLM calls antithetic.
            `importance`: stratified z, then t with log(1 - alpha(t)) linear in z; the loss weight then is the
            constant `importance_weight(rate_range)` in place of -alpha'/(1 - alpha).
        index: int64 `[B]`, place k of each sample in the global batch (taken modulo n); 0..B-1 when left out.
        rotation: one shared uniform per global batch makes each single time uniform; 0 gives MDLM's strata.
        low: z is squeezed into (low, 1). Any low > 0 biases the NELBO; MDLM trains with 1e-3.
        schedule, rate_range: for `importance`; the mask rates at z = 0 and z = 1.
    """
    if mode not in ("iid", "stratified", "importance"):
        raise ValueError(f"unknown time sampling {mode!r}; expected 'iid', 'stratified' or 'importance'")
    if mode == "importance" and schedule is None:
        raise ValueError("importance sampling of times needs a schedule; pass schedule=get_schedule(...)")
    z = u
    if mode != "iid":
        index = torch.arange(len(u), device=u.device) if index is None else index
        z = torch.remainder((index % n + u) / n + rotation, 1.0)
        # a float remainder may land on 0, where weights are infinite
        z = z.clamp_min(torch.finfo(z.dtype).tiny)
    z = low + (1 - low) * z
    return z if mode != "importance" or schedule is None else importance_times(z, schedule, rate_range)


def importance_times(z: Tensor, schedule: Schedule, rate_range: tuple[float, float] = (1e-3, 1.0)) -> Tensor:
    """t whose mask rate is low^(1-z) high^z, so that the density of t is proportional to -alpha'/(1 - alpha)."""
    low, high = rate_range
    if not 0 < low < high <= 1:
        raise ValueError(f"rate_range {rate_range} must satisfy 0 < low < high <= 1")
    return schedule.inverse_rate(torch.exp((1 - z) * math.log(low) + z * math.log(high)))


def importance_weight(rate_range: tuple[float, float] = (1e-3, 1.0)) -> float:
    """The constant log(high / low) that replaces the ELBO weight under `importance` times."""
    return math.log(rate_range[1] / rate_range[0])
