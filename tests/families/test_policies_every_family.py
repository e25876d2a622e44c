"""Every cache policy on every released family: refreshed in every pass it is no cache; otherwise it is one and ends."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from tiny_families import FAMILIES, TinyFamily, family

from unidiff.decoding import NoCache, RefreshPolicy, Sampler, SamplerOutput
from unidiff.decoding import cache as policies
from unidiff.decoding.cache import BlockCausalCache

SEEDS = torch.tensor([3, 4, 5])
LAZY: dict[str, dict[str, Any]] = {  # settings under which features get old
    "PrefixCache": {},
    "DualCache": {},
    "VicinityCache": {"warmup": 1, "look_back": 1, "look_ahead": 1},
    "AdaptiveCache": {"prompt_interval": 4, "response_interval": 3, "ratio": 0.4},
    "MaxLogitCache": {"ratio": 0.6, "warmup": 0.2, "interval": 4},
    "IntervalCache": {"interval": 4},
    "ModalityCache": {"interval": 3},
}
REFRESHED: dict[str, dict[str, Any]] = {  # settings under which every pass recomputes everything
    **{name: {"interval": 1} for name in LAZY},
    "AdaptiveCache": {"prompt_interval": 1, "response_interval": 1},
}
OTHERS = {
    "Policy",
    "RefreshPolicy",
    "NoCache",
    "BlockCausalCache",
    "CacheByRow",
    "SprintCache",
}  # no cache, other weights, or other policies
POLICIES = [name for name in (*LAZY, "SegmentCache", "HeldGuidance") if name in policies.__all__]
EVERY = pytest.mark.parametrize("name", FAMILIES)


def made(name: str, table: dict[str, dict[str, Any]]) -> RefreshPolicy:
    if name == "SegmentCache":  # text and image by policies of their own, in the same decode
        parts = {"text": "DualCache", "image": "MaxLogitCache"}
        parts |= dict.fromkeys(("text_prompt", "image_prompt"), "IntervalCache")
        return policies.SegmentCache(**{part: made(kind, table) for part, kind in parts.items()})
    if name == "HeldGuidance":  # around a cache, with the guidance evaluated as often as the cache is refreshed
        return policies.HeldGuidance(made("IntervalCache", table), table["IntervalCache"]["interval"], warmup=1)
    return getattr(policies, name)(**table[name])


def decode(tiny: TinyFamily, policy: RefreshPolicy, rows=slice(None)):
    other = None if tiny.unconditional is None else tiny.unconditional.rows(rows)
    sampler = Sampler(tiny.model, tiny.vocabulary, tiny.config, policy)
    return sampler(tiny.batch.rows(rows), SEEDS[rows], record=True, unconditional=other)


@lru_cache
def undisturbed(name: str) -> SamplerOutput:
    """A family's decode without a cache."""
    return decode(family(name), NoCache())


def test_no_policy_is_left_out():
    """A new policy has to be added here, or named as one that needs another kind of weights."""
    assert set(policies.__all__) - OTHERS == set(POLICIES)


@EVERY
@pytest.mark.parametrize("policy", POLICIES)
def test_refreshing_in_every_pass_is_no_cache(name: str, policy: str):
    tiny = family(name)
    plain, cached = undisturbed(name), decode(tiny, made(policy, REFRESHED))
    assert len(plain.trajectory) == len(cached.trajectory)
    assert all(torch.equal(a, b) for a, b in zip(plain.trajectory, cached.trajectory, strict=True))
    torch.testing.assert_close(plain.confidence, cached.confidence, atol=1e-5, rtol=0)


@EVERY
@pytest.mark.parametrize("policy", POLICIES)
def test_with_old_features_every_target_is_filled_and_known_tokens_stay(name: str, policy: str):
    tiny, masks = family(name), torch.tensor([family(name).vocabulary.mask_id, family(name).vocabulary.image_mask])
    out = decode(tiny, made(policy, LAZY))
    batch = tiny.batch
    assert not torch.isin(out.batch.ids[batch.targets], masks).any()
    assert torch.equal(out.batch.ids[~batch.targets], batch.ids[~batch.targets])
    plain = undisturbed(name)
    if policy == "ModalityCache" and len(batch.modality[batch.targets].unique()) < 2:
        assert out.nfe == plain.nfe  # nothing to alternate with
    else:
        per_pass, whole = (x.stats.model_tokens / x.nfe for x in (out, plain))
        assert out.stats.partial_passes > 0
        # rows of different sizes begin their blocks in different passes, and padding of the index counts as work
        assert per_pass <= whole * {"ModalityCache": 1.0, "PrefixCache": 1.05}.get(policy, 0.99)


@EVERY
@pytest.mark.parametrize("policy", [None, *POLICIES])
def test_rows_of_the_batch_are_the_rows_alone(name: str, policy: str | None):
    """Whatever the padding, the prompt lengths and the unconditional rows."""
    tiny, chosen = family(name), NoCache() if policy is None else made(policy, LAZY)
    together = decode(tiny, chosen)
    row = (POLICIES.index(policy) if policy else 0) % len(SEEDS)  # another one for every policy
    alone = decode(tiny, chosen, slice(row, row + 1))
    assert torch.equal(alone.batch.ids[0], together.batch.ids[row])


@EVERY
def test_the_exact_cache_is_for_block_causal_weights_only(name: str):
    """For those it changes nothing, and computes every block that is finished once."""
    tiny = family(name)
    if tiny.model.traits.block_length is None:
        with pytest.raises(ValueError, match="block_causal"):
            decode(tiny, BlockCausalCache())
        return
    plain, cached = undisturbed(name), decode(tiny, BlockCausalCache())
    assert len(plain.trajectory) == len(cached.trajectory)
    assert all(torch.equal(a, b) for a, b in zip(plain.trajectory, cached.trajectory, strict=True))
    assert cached.stats.model_tokens < 0.5 * plain.stats.model_tokens
    for row in range(len(SEEDS)):
        alone = decode(tiny, BlockCausalCache(), slice(row, row + 1))
        assert torch.equal(alone.batch.ids[0], cached.batch.ids[row])
