"""Reward tuning of masked diffusion by policy gradient: UniGRPO (Yang et al. 2025, MMaDA, arXiv 2505.15809, section 3.3).

A group of completions is decoded for every prompt; a completion's advantage is its reward's distance from the group's mean
in standard deviations. The likelihood of a masked model is not a product over one order, so a completion is scored by its
tokens at masked positions, under a few random masks with rates from [0.1, 0.9], and with the same mask for all models:

    rho_i = pi(x_i | x_t) / pi_old(x_i | x_t)        k3_i = r_i - 1 - log r_i,  r_i = pi_ref(x_i | x_t) / pi(x_i | x_t)
    loss  = mean over completions of mean over masked i of  -min(rho_i A, clip(rho_i, 1 - eps, 1 + eps) A) + beta k3_i

In place of random masks, x_t can be what the decode itself saw before one of its passes (after TraceRL, Wang et al. 2025,
arXiv 2509.06949): those are the states in which the model has to decide. The sum over i is then divided by the number of
targets, so that the last passes, which leave little to decide, count for little.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from torch import Tensor

from unidiff.decoding import CacheConfig, Sampler, SamplerConfig, SamplerOutput
from unidiff.diffusion.noise import NoisyBatch, keyed_uniform, mask_tokens
from unidiff.diffusion.objective import head_parts, parts_nll
from unidiff.diffusion.streamed_nll import HeadPart
from unidiff.models.transformer import MaskedTransformer
from unidiff.schema import Between, Positive, check_fields
from unidiff.tokens import TokenBatch, Visibility, Vocabulary
from unidiff.tokens.batch import moved
from unidiff.train.build import merge_adapters
from unidiff.train.config import Count, OptimiserConfig, Share, Steps, TrackerName
from unidiff.train.data.tasks import rank_noise
from unidiff.train.optim import Optimisers

Reward = Callable[[TokenBatch], Tensor]
"""Finished rows `[B, L]` to one number each, float `[B]`."""

States = Literal["random", "decoded"]
_SEED_STREAM, _RATE_STREAM, _MASK_STREAM = 201, 10_000, 20_000  # the last two plus the mask's number


@dataclass(frozen=True)
class RewardConfig:
    """Settings of UniGRPO, and of a run of it."""

    group: Annotated[int, Between(2, 2**16)] = 8  # completions per prompt
    masks: Annotated[int, Between(1, 2**16)] = 2  # per completion, each followed by an optimiser step
    states: States = (
        "random"  # what is masked: random positions, or those that were still hidden in a pass of the decode
    )
    low: Share = 0.1  # the rate of random masks is drawn between the two
    high: Share = 0.9
    clip: Positive = 0.2  # epsilon of the ratio's range
    beta: Annotated[float, Between(0, 1e9)] = 0.01  # weight of the divergence from the starting model
    lr: Annotated[float, Between(1e-30, 1e3)] = 1e-5  # of AdamW
    chunk: Count = 512  # masked positions per piece of the head
    rows: Count = 192  # completions per decode, forward and backward pass; more are split, which changes rounding only
    seed: Annotated[int, Between(0, 2**40)] = 0  # of decodes and masks
    bf16: bool = False  # completions are decoded in bfloat16 and learnt from under autocast, which is faster
    # of a run
    steps: Steps = 100
    prompts_per_step: Count = 8
    passes: Count | None = None  # of the decodes; None for the pipeline's own. It is saved with them
    guidance_scale: float | None = None  # likewise
    cache: str = "none"  # of the decodes: "none", "auto", or the name of a policy
    lora: Annotated[int, Between(0, 2**16)] = 0  # rank of adapters; 0 trains all weights
    keep: Annotated[float, Between(1e-9, 1)] = 1.0  # share of the change that is saved, see `keep_share`
    checkpoint_every: Steps = 10
    track: list[TrackerName] = field(default_factory=list)  # where numbers go besides `metrics.jsonl`
    fallback: bool = False  # go on from the checkpoint before a damaged one, if there is one

    def __post_init__(self) -> None:
        check_fields(self, "")
        if not 0 < self.low <= self.high:
            raise ValueError(f"low is {self.low} and high {self.high}; expected 0 < low <= high <= 1")


@dataclass(frozen=True)
class PolicyTerms:
    """Loss to minimise and what it is made of, scalars: mean k3 divergence, and the share of tokens that were clipped."""

    total: Tensor
    divergence: Tensor
    clipped: Tensor


@dataclass(frozen=True)
class RewardReport:
    """Of one step: mean and spread of the rewards, and of the last mask loss, divergence, clipped share, gradient norm."""

    reward: float
    spread: float
    loss: float
    divergence: float
    clipped: float
    grad_norm: float


def advantages(rewards: Tensor) -> Tensor:
    """(r - mean) / standard deviation within each group, `[P, G]`; 0 where all rewards of a group are equal."""
    centred = rewards - rewards.mean(1, keepdim=True)
    spread = rewards.std(1, correction=0, keepdim=True)
    return torch.where(spread > 1e-8, centred / spread.clamp_min(1e-8), 0.0)


def policy_terms(
    new: Tensor,
    old: Tensor,
    reference: Tensor,
    advantage: Tensor,
    masked: Tensor,
    clip: float,
    beta: float,
    count: Tensor | None = None,
) -> PolicyTerms:
    """The loss above.

    Args:
        new, old, reference: `[B, L]`, log-probabilities of the completions' tokens under the three models.
        advantage: `[B]`. masked: bool `[B, L]`, the positions that count.
        count: `[B]`, what the sum of a row is divided by; None for its masked positions.
    """
    ratio, scale = (new - old).exp(), advantage[:, None]  # [B, L]
    surrogate = torch.minimum(ratio * scale, ratio.clamp(1 - clip, 1 + clip) * scale)
    log_r = reference - new
    divergence = log_r.exp() - 1 - log_r
    own = masked.sum(1).clamp_min(1)

    def mean(value: Tensor, count: Tensor) -> Tensor:
        return (value.where(masked, 0).sum(1) / count).mean()

    clipped = mean(((ratio - 1).abs() > clip).to(new.dtype), own).detach()
    total = mean(-surrogate + beta * divergence, own if count is None else count)
    return PolicyTerms(total, mean(divergence, own).detach(), clipped)


@torch.no_grad()
def keep_share(model: MaskedTransformer, start: MaskedTransformer, share: float) -> None:
    """Weights between a starting model's and the tuned ones, start + share (tuned - start), in place.

    After WiSE-FT (Wortsman et al. 2022, arXiv 2109.01903): what tuning costs elsewhere grows with the square of the way,
    what it gains is reached earlier. `model` is without adapters; a share of 1 changes nothing.
    """
    if share < 1:
        for weight, old in zip(model.parameters(), start.parameters(), strict=True):
            weight.copy_(old.lerp(weight, share))


@dataclass(frozen=True)
class _Piece:
    """Completions that go through a model together, with what the host knows of them."""

    noisy: NoisyBatch
    visible: Visibility | None
    parts: tuple[HeadPart, ...]
    count: Tensor  # int64 [B], targets


class RewardTuner:
    """Trains `model` towards a reward. Its starting weights are kept as the reference.

    Args:
        model: with or without adapters; those of its parameters that need gradients are trained.
        sampler: how completions are decoded.
        cache: of the decodes. One that approximates makes them faster, and is tuned for.
    """

    def __init__(
        self,
        model: MaskedTransformer,
        vocabulary: Vocabulary,
        sampler: SamplerConfig,
        reward: Reward,
        config: RewardConfig,
        cache: CacheConfig | None = None,
    ) -> None:
        self.model, self.vocabulary, self.sampler = model, vocabulary, sampler
        self.reward, self.config, self.cache = reward, config, cache or CacheConfig()
        self.optimisers = Optimisers(model, OptimiserConfig(lr=config.lr, weight_decay=0.0))
        self.reference = copy.deepcopy(model).eval()
        merge_adapters(self.reference)
        self.reference.requires_grad_(False)
        self.steps = 0

    def step(self, prompts: TokenBatch, condition: Tensor | None = None) -> RewardReport:
        """One round: decode, reward, and an optimiser step for every mask.

        Args:
            prompts: `[P, L]`; what is given is the prompt, the targets are completed.
            condition: bool `[P, L]`, what the guidance hides, see `Sampler`; None for all that is given.

        Raises:
            ValueError: the reward returns another shape, or a number that is not finite.
        """
        config = self.config
        # 1. completions
        index = moved(torch.arange(prompts.shape[0]).repeat_interleave(config.group), prompts.ids.device)
        rows = prompts.rows(index)
        keys = self.steps * len(index) + torch.arange(len(index))
        finished, seen = self.decode(rows, keys, None if condition is None else condition[index])
        # 2. rewards and advantages
        rewards = self.reward(finished).to(torch.float32).cpu()
        if rewards.shape != (len(index),) or not bool(rewards.isfinite().all()):
            raise ValueError(f"the reward gave shape {tuple(rewards.shape)}; expected ({len(index)},) finite numbers")
        grouped = rewards.view(-1, config.group)
        # 3. the same masks for all models, drawn on the host; the old model is the one that decoded
        device = finished.ids.device
        finished, seen = moved((finished, seen), "cpu")
        states = [self._pieces(finished, self.state(finished, seen, keys, number)) for number in range(config.masks)]
        states, advantage = moved((states, advantages(grouped).flatten()), device)
        with torch.no_grad():
            old, reference = (
                [[self._log_probs(model, piece) for piece in pieces] for pieces in states]
                for model in (self.model, self.reference)
            )
        # 4. an update for every mask
        for pieces, old_logs, reference_logs in zip(states, old, reference, strict=True):
            numbers = self._update(pieces, old_logs, reference_logs, advantage)
        self.steps += 1
        spread = float(grouped.std(1, correction=0).mean())
        return RewardReport(float(rewards.mean()), spread, *numbers.tolist())

    def _update(
        self, pieces: Sequence[_Piece], old: Sequence[Tensor], reference: Sequence[Tensor], advantage: Tensor
    ) -> Tensor:
        """One optimiser step; loss, divergence, clipped share and the norm of the gradient, `[4]`."""
        config = self.config
        self.optimisers.zero_grad()
        parts = []
        shares = advantage.split([len(piece.count) for piece in pieces])
        for piece, old_logs, reference_logs, own in zip(pieces, old, reference, shares, strict=True):
            new = self._log_probs(self.model, piece)
            count = piece.count if config.states == "decoded" else None
            masked = piece.noisy.masked
            terms = policy_terms(new, old_logs, reference_logs, own, masked, config.clip, config.beta, count)
            share = len(own) / len(advantage)
            (terms.total * share).backward()
            parts.append(share * torch.stack([terms.total.detach(), terms.divergence, terms.clipped]))
        norm = self.optimisers.clip()
        self.optimisers.step()
        return torch.cat([torch.stack(parts).sum(0), norm[None]])

    def _slices(self, count: int) -> list[slice]:
        return [slice(first, first + self.config.rows) for first in range(0, count, self.config.rows)]

    def _pieces(self, finished: TokenBatch, noisy: NoisyBatch) -> list[_Piece]:
        """Rows of the host that go through a model together."""
        made = []
        for rows in self._slices(len(noisy.masked)):
            x, y, masked = noisy.batch.rows(rows), finished.rows(rows), noisy.masked[rows]
            parts = head_parts(masked, y, self.vocabulary, self.config.chunk)
            made.append(_Piece(NoisyBatch(x, masked), x.visibility(), parts, y.targets.sum(1).clamp_min(1)))
        return made

    def decode(self, rows: TokenBatch, keys: Tensor, condition: Tensor | None) -> tuple[TokenBatch, Tensor | None]:
        """Finished rows, and the ids before each pass `[passes, B, L]` where states come from there."""
        config = self.config
        model = copy.deepcopy(self.model)  # decoding may run parts of layers, which adapters do not cover
        merge_adapters(model)
        if config.bf16:
            model = model.bfloat16()
        seeds = (keyed_uniform(config.seed, keys, _SEED_STREAM, 1)[:, 0] * 2**40).long()
        seeds = moved(seeds, rows.ids.device)
        record, outs = config.states == "decoded", []
        for part in self._slices(len(seeds)):
            sampler = Sampler(model.eval(), self.vocabulary, self.sampler, self.cache.build())
            hidden = None if condition is None else condition[part]
            outs.append(sampler(rows.rows(part), seeds[part], hidden, record=record))
        return TokenBatch.cat([out.batch for out in outs]), decoded_states(outs) if record else None

    def state(self, finished: TokenBatch, seen: Tensor | None, keys: Tensor, number: int) -> NoisyBatch:
        """What completions are scored from: some of their targets hidden again."""
        config, device = self.config, finished.ids.device
        u = keyed_uniform(config.seed, keys, _RATE_STREAM + number, 1)[:, 0]
        if seen is not None:
            passes = (u * len(seen)).long().clamp_max(len(seen) - 1).to(device)  # u may round up to 1
            state = seen[passes, torch.arange(len(u), device=device)]  # [B, L]
            masked = finished.targets & (state == finished.mask_ids(self.vocabulary))
            return NoisyBatch(finished.hide(masked, self.vocabulary), masked)
        noise = keyed_uniform(config.seed, keys, _MASK_STREAM + number, finished.shape[1]).to(device)
        noise, _ = rank_noise(noise, finished.targets)
        rate = (config.low + (config.high - config.low) * u).to(device)
        return mask_tokens(finished, rate, self.vocabulary, noise)

    def _log_probs(self, model: MaskedTransformer, piece: _Piece) -> Tensor:
        """`[B, L]`, of the completions' tokens where they are masked."""
        x, masked = piece.noisy.batch, piece.noisy.masked
        mask = None if piece.visible is None else piece.visible.dense()
        time = (masked.sum(1) / piece.count).float()
        with torch.autocast(x.ids.device.type, torch.bfloat16, enabled=self.config.bf16):
            hidden = model.hidden(x.ids, x.modality, x.positions, mask, time, **x.continuous())
            return -parts_nll(hidden, model, piece.parts)


def decoded_states(outs: list[SamplerOutput]) -> Tensor:
    """Ids before each pass, `[passes, B, L]`; rows that took fewer passes repeat their last ones."""
    kept = [torch.stack(out.trajectory[:-1]) for out in outs if out.trajectory is not None]
    most = max(len(ids) for ids in kept)
    return torch.cat([torch.cat([ids, ids[-1:].expand(most - len(ids), -1, -1)]) for ids in kept], 1)
