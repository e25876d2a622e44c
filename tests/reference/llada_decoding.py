"""LLaDA's and Fast-dLLM's decoding loops and losses with all their quirks, for comparisons with recorded runs.

The sampler is the decoder of this library. This loop reproduces what the reference programs do differently, on the same
forward, cache policies and commit rules; each quirk is a field of `LladaCompat`. Greedy: temperature 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from reference.batches import llada_batch
from unidiff.decoding.cache import DualCache, NoCache, PrefixCache, RefreshPolicy
from unidiff.decoding.commit.base import take_best
from unidiff.decoding.commit.factor import factor_count
from unidiff.decoding.commit.threshold import above_threshold
from unidiff.decoding.config import ModalityDecoding
from unidiff.decoding.draw import Blend
from unidiff.decoding.forward import StreamedModel
from unidiff.decoding.state import DecodeState, ModalityProgress
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Modality, Vocabulary

CACHES: dict[str, Callable[[], RefreshPolicy]] = {"none": NoCache, "prefix": PrefixCache, "dual": DualCache}
RULES = ("topk", "threshold", "factor")


@dataclass(frozen=True)
class LladaCompat:
    """What the reference programs do and the sampler does not.

    Two quirks are common to all: [MASK] tokens inside the prompt are candidates and use up the quota of the blocks, so
    that masks remain at the end; and [MASK]'s own logit takes part in proposal and confidence.

    Args:
        idle_passes: a block makes all its passes, also when nothing is left to write (LLaDA).
        capped_blocks: a block ends after its share of the passes with whatever it has (LLaDA; Fast-dLLM's dual cache,
            which may leave masks behind).
        factor_takes_last: where all candidates but one pass the factor rule, the last is written too (Fast-dLLM).
    """

    idle_passes: bool = False
    capped_blocks: bool = False
    factor_takes_last: bool = True

    @classmethod
    def of(cls, program: str, cache: str) -> LladaCompat:
        """The quirks of `LLaDA` or `Fast-dLLM` with one of its caches."""
        if program not in ("LLaDA", "Fast-dLLM"):
            raise ValueError(f"program is {program!r}; expected 'LLaDA' or 'Fast-dLLM'")
        slow = program == "LLaDA"
        return cls(idle_passes=slow, capped_blocks=slow or cache == "dual")


@dataclass(frozen=True)
class LladaSettings:
    """Arguments of the reference `generate` functions.

    Args:
        steps, gen_length, block_length: passes for all blocks, generated tokens, tokens per block.
        rule: `topk` (a fixed quota per pass), `threshold` or `factor`, with their values.
        cache: `none`, `prefix` or `dual`.
        cfg_scale: 0 is off; the mix is uncond + (cfg_scale + 1) (cond - uncond).
        random_order: rank by given uniforms (`remasking="random"`) instead of probabilities.
        no_proposal: ids that are never proposed. no_confidence: ids whose logits the confidence leaves out.

    Raises:
        ValueError: lengths that do not divide, or an unknown rule or cache.
    """

    steps: int = 128
    gen_length: int = 128
    block_length: int = 128
    rule: str = "topk"
    threshold: float = 0.9
    factor: float = 1.0
    cache: str = "none"
    cfg_scale: float = 0.0
    random_order: bool = False
    no_proposal: tuple[int, ...] = ()
    no_confidence: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.gen_length % self.block_length or self.steps % (self.gen_length // self.block_length):
            raise ValueError(
                f"gen_length {self.gen_length} must be whole blocks of {self.block_length}, and steps {self.steps} "
                "whole passes per block"
            )
        if self.rule not in RULES or self.cache not in CACHES:
            raise ValueError(
                f"rule {self.rule!r}, cache {self.cache!r}; expected one of {RULES}, one of {list(CACHES)}"
            )


@dataclass
class LladaTrace:
    """ids: int64 `[B, L]` before the first and after every pass. fed: `[start, stop)` of the positions of each pass."""

    ids: list[Tensor]
    fed: list[tuple[int, int]] = field(default_factory=list)


@torch.no_grad()
def generate(
    model: MaskedTransformer,
    vocabulary: Vocabulary,
    prompt: Tensor,
    settings: LladaSettings,
    compat: LladaCompat,
    uniforms: Tensor | None = None,
    on_pass: Callable[[int, StreamedModel], None] | None = None,
) -> LladaTrace:
    """Decode `gen_length` tokens behind the prompts.

    Args:
        prompt: int64 `[B, P]`.
        uniforms: `[passes, B, L]` for `random_order`.
        on_pass: called as `on_pass(pass, forward)` after each forward.
    """
    # 1. the sequence, its blocks, the unconditional stream and the cache
    length, mask_id = prompt.shape[1], vocabulary.mask_id
    ids = F.pad(prompt, (0, settings.gen_length), value=mask_id)  # [B, L]
    place = torch.arange(ids.shape[1], device=ids.device)
    batch = llada_batch(ids, given=(place < length).expand(ids.shape))
    progress = ModalityProgress(Modality.TEXT, ModalityDecoding(block_length=settings.block_length), batch)
    state = DecodeState.start(batch, {Modality.TEXT: progress})
    streams = (0, 1) if settings.cfg_scale else (0,)
    policy = CACHES[settings.cache]().start(batch, model)
    forward = StreamedModel(model, vocabulary, batch, [batch.given & (ids != mask_id)][: len(streams) - 1], policy)
    trace = LladaTrace([ids.clone()])
    blocks = settings.gen_length // settings.block_length
    share = settings.steps // blocks
    for block in range(blocks):
        # 2. open the block in all rows
        first, stop = length + block * settings.block_length, length + (block + 1) * settings.block_length
        progress.block, progress.running = torch.full_like(progress.block, block), torch.ones_like(progress.running)
        start = (state.ids[:, first:stop] == mask_id).sum(1)  # [B]
        step = 0
        while not (compat.capped_blocks and step == share):
            left = state.ids == mask_id
            if not (compat.idle_passes or bool(left[:, first:stop].any())):
                break
            # 3. forward; candidates are the masks among the positions fed, up to the end of the block
            left = left & (place < stop)
            state.streams, state.users = streams, dict.fromkeys(streams, left.any(1))
            plan = policy.plan(state, left if settings.cache == "none" else left & (place >= first))
            fed = torch.ones_like(left) if plan.query is None else plan.query
            fed = fed if plan.fresh is None else fed | plan.fresh[:, None]
            left = left & fed
            time = torch.ones(len(ids), device=ids.device)
            forward.run(state.ids, plan, streams, time)
            number = len(trace.fed)
            if on_pass is not None:
                on_pass(number, forward)
            # 4. propose, select, write
            quota = start // share + (step < start % share)
            noise = None if uniforms is None else uniforms[number]
            _write(state, forward, streams, left, quota, settings, compat, noise)
            where = fed.any(0).nonzero()
            trace.ids.append(state.ids.clone())
            trace.fed.append((int(where[0]), int(where[-1]) + 1))
            step += 1
    return trace


def _write(
    state: DecodeState,
    forward: StreamedModel,
    streams: Sequence[int],
    left: Tensor,
    quota: Tensor,
    settings: LladaSettings,
    compat: LladaCompat,
    noise: Tensor | None,
) -> None:
    """One commit at the candidates `left` `[B, L]`."""
    if not (most := int(left.sum(1).max())):
        return
    logits = forward.logits(Modality.TEXT, left, most, streams)
    values = logits.values[0]  # [B, n, V]
    if len(streams) > 1:
        values = Blend(torch.full((len(values),), settings.cfg_scale + 1, device=values.device))(
            [values, logits.values[1]]
        )
    proposal, confidence = propose(values, settings.no_proposal, settings.no_confidence)
    if settings.random_order:
        if noise is None:
            raise ValueError("random_order needs `uniforms` [passes, B, L]")
        confidence = noise.double().gather(1, logits.index)
    pick = select(confidence, logits.is_real, quota, settings, compat)
    state.write(logits.index, pick, proposal, confidence)


def propose(
    logits: Tensor, no_proposal: Sequence[int] = (), no_confidence: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """Best token int64 `[...]` and its probability, float64 `[...]`, from logits `[..., V]`."""
    logits = logits.double()
    for token in no_proposal:
        logits = logits.index_fill(-1, torch.tensor(token, device=logits.device), -math.inf)
    proposal = logits.argmax(-1)
    for token in no_confidence:
        logits = logits.index_fill(-1, torch.tensor(token, device=logits.device), -math.inf)
    return proposal, logits.softmax(-1).gather(-1, proposal[..., None])[..., 0]


def select(confidence: Tensor, live: Tensor, quota: Tensor, settings: LladaSettings, compat: LladaCompat) -> Tensor:
    """bool `[B, n]`: the candidates that are written."""
    if settings.rule == "threshold":
        return above_threshold(confidence, live, settings.threshold)
    if settings.rule == "factor":
        quota = factor_count(confidence, live, settings.factor)
        if compat.factor_takes_last:
            quota = torch.where(quota == live.sum(1) - 1, live.sum(1), quota)
    return take_best(confidence, live, quota)


def gumbel_scores(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """exp(logit) / (-log u)^T in float64 `[..., V]`; its argmax is LLaDA's draw (a Gumbel draw at temperature T)."""
    return logits.double().exp() / (-uniform.double().log()) ** temperature


def masked_nll(
    model: MaskedTransformer, noisy: Tensor, x0: Tensor, mask_id: int, prompt_length: int = 0, cfg_scale: float = 0.0
) -> Tensor:
    """-log p(x0) over the whole vocabulary at the masked positions, float32 `[B, L]`, 0 elsewhere.

    With `cfg_scale` the prompt is hidden from the unconditional pass.
    """
    logits = model(llada_batch(noisy))  # [B, L, V]
    if cfg_scale:
        hidden = torch.arange(noisy.shape[1], device=noisy.device) < prompt_length
        other = model(llada_batch(torch.where(hidden, mask_id, noisy)))
        logits = Blend(torch.full((len(logits),), cfg_scale + 1.0, device=logits.device))([logits, other])
    nll = F.cross_entropy(logits.flatten(0, 1), x0.flatten(), reduction="none").view_as(x0)
    return torch.where(noisy == mask_id, nll, 0.0)


def answer_nll(nll: Tensor, ratio: Tensor) -> Tensor:
    """Monte-Carlo -log p(answer | prompt) `[]`: mean over copies of sum(nll) / (share of the answer that is masked).

    Args:
        nll: `[B, L]` from `masked_nll`. ratio: `[B]`.
    """
    return (nll.sum(1) / ratio).mean()


def pretraining_loss(nll: Tensor, p_mask: Tensor) -> Tensor:
    """Mean over rows and positions of nll / p_mask: `[B, L]` and `[B]` to `[]`."""
    return (nll / p_mask[:, None]).mean()


def finetuning_loss(nll: Tensor, p_mask: Tensor, prompt_lengths: Tensor) -> Tensor:
    """Each token's nll / p_mask over the answer length of its row (end-of-text fill counts), mean over rows."""
    return (nll.sum(1) / p_mask / (nll.shape[1] - prompt_lengths)).mean()
