"""`CacheConfig`: plain data, policies and segments by name, one sentence per mistake."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest

from unidiff.decoding import cache as policies
from unidiff.decoding.cache import AdaptiveCache, DualCache, IntervalCache, MaxLogitCache, NoCache, SegmentCache
from unidiff.decoding.cache.config import CACHES, CacheConfig


@pytest.mark.parametrize("name", CACHES)
def test_every_policy_has_a_name_and_survives_json(name):
    config = CacheConfig(name)
    made = config.build()
    assert CacheConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config == CacheConfig.of(name)
    if name != "none":  # all settings of the policy are settings of the config
        options = {f.name: getattr(made, f.name) for f in fields(made) if f.init}
        full = CacheConfig(name, options)
        assert full.build() == made
        assert CacheConfig.from_dict(json.loads(json.dumps(full.to_dict()))) == full


def test_no_policy_is_left_without_a_name():
    named = {type(CacheConfig(name).build()) for name in CACHES} | {SegmentCache}
    public = {getattr(policies, name) for name in policies.__all__}
    assert named == public - {policies.Policy, policies.RefreshPolicy, policies.HeldGuidance, policies.CacheByRow}


def test_options_reach_the_policy():
    assert CacheConfig("dual", {"interval": 4, "drift": 0.2}).build() == DualCache(interval=4, drift=0.2)
    adaptive = CacheConfig.from_dict({"policy": "adaptive", "options": {"full_layers": [0, 3], "ratio": 0.5}})
    assert adaptive.build() == AdaptiveCache(ratio=0.5, full_layers=(0, 3))


def test_segments_by_name():
    config = CacheConfig.from_dict(
        {
            "policy": "interval",
            "segments": {"image": "max-logit", "prompt": {"policy": "dual"}, "image_prompt": {"options": {}}},
        }
    )
    made = config.build()
    assert (made.text, made.image) == (IntervalCache(), MaxLogitCache())
    assert made.text_prompt == DualCache() and isinstance(made.image_prompt, NoCache)
    assert CacheConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CacheConfig("duel"), "cache policy is 'duel'; expected one of adaptive, block-causal"),
        (lambda: CacheConfig("dual", {"intervall": 3}), "'dual' has no settings \\['intervall'\\]; expected some of"),
        (lambda: CacheConfig("none", {"interval": 3}), "'none' has no settings \\['interval'\\]"),
        (lambda: CacheConfig("dual", {"_past": {}}), "no settings \\['_past'\\]"),
        (lambda: CacheConfig("dual", {"interval": 0}), "interval is 0"),
        (lambda: CacheConfig("dual", segments={"sound": "dual"}), "unknown cache segments \\['sound'\\]"),
        (lambda: CacheConfig(segments={"text": "modality"}), "ModalityCache decides for whole rows"),
        (lambda: CacheConfig(segments={"text": CacheConfig(segments={"image": "dual"})}), "segments of their own"),
        (lambda: CacheConfig("dual", 5), "cache options is 5; expected a mapping"),
        (lambda: CacheConfig.from_dict({"name": "dual"}), "cache has unknown settings \\['name'\\]"),
        (lambda: CacheConfig.of(DualCache()), "cache is a DualCache.*there is policy="),
    ],
)
def test_bad_data_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
