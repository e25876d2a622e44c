"""Wrong kinds of settings and arguments: one sentence each, whatever the value, before anything is decoded."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from cache_cases import VOCABULARY, make_model, rows

from unidiff.decoding import CacheConfig, Guidance, ModalityDecoding, Sampler, SamplerConfig
from unidiff.decoding.cache import (
    AdaptiveCache,
    DualCache,
    HeldGuidance,
    IntervalCache,
    MaxLogitCache,
    ModalityCache,
    NoCache,
    PrefixCache,
    SegmentCache,
    VicinityCache,
)
from unidiff.decoding.cache.config import CACHES
from unidiff.pipelines.options import DecodeOptions
from unidiff.pipelines.settings import PipelineSettings
from unidiff.tokens import Modality, TokenBatch, Vocabulary

WRONG = [
    "x", "", "3", b"3", [], ["a"], [1.5], [None], [[1]], {}, {"a": 1}, {1}, (1, "b"), None, True, False, object(), int,
    -1, 0, 0.5, 2**62, 2**63, 2**70, -(2**63), 10**400, 1e300, -1e300, math.inf, -math.inf, math.nan, 1j,
    np.int64(3), np.float32(0.5), np.float64(0.5), np.array([1, 2]), torch.tensor(3), torch.tensor([1.0, 2.0]),
    torch.empty(2, device="meta"), range(3), lambda: 3,
]  # fmt: skip
SETTINGS = {
    "text": (ModalityDecoding, {}),
    "ancestral": (ModalityDecoding, {"rule": "ancestral", "remask": "remdm"}),
    "blocks": (ModalityDecoding, {"block_length": 4, "blocks_in_flight": 2, "rule": "credit"}),
    "guidance": (Guidance, {}),
    "sampler": (SamplerConfig, {}),
    "cache": (CacheConfig, {}),
    "pipeline": (PipelineSettings, {"vocabulary": VOCABULARY, "text_length": 8, "grid": (3, 3)}),
}


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.mark.parametrize(("schema", "start"), SETTINGS.values(), ids=SETTINGS.keys())
def test_every_setting_takes_what_it_says_or_one_sentence(schema, start, model) -> None:
    """Every value in every field, by name and from plain data. What is accepted decodes, and comes back from JSON data."""
    accepted = refused = 0
    for field in fields(schema):
        for value in WRONG:
            try:
                made = schema(**{**start, field.name: value})
            except ValueError as error:
                assert len(str(error)) < 700 and "\n" not in str(error).strip(), error
                refused += 1
                if hasattr(schema, "from_dict") and not isinstance(value, dict):
                    with pytest.raises(ValueError):
                        schema.from_dict({**start, field.name: value})
                continue
            accepted += 1
            if hasattr(made, "to_dict"):
                assert schema.from_dict(made.to_dict()) == made
    assert refused > 10 * len(fields(schema)) and accepted > 0


@pytest.mark.parametrize("value", WRONG, ids=lambda value: f"{type(value).__name__} {str(value)[:12]}")
def test_data_that_is_no_mapping_is_refused(value) -> None:
    for schema in (SamplerConfig, CacheConfig, PipelineSettings):
        if isinstance(value, dict) and not value and schema is not PipelineSettings:
            assert schema.from_dict(value) == schema()
            continue
        with pytest.raises(ValueError):
            schema.from_dict(value)
        with pytest.raises(ValueError):
            schema.from_dict({1: value, "b": value})


@pytest.mark.parametrize("name", CACHES)
def test_options_of_every_cache(name: str) -> None:
    make = type(CacheConfig(name).build())
    for option in [f.name for f in fields(make) if f.init] if name != "none" else []:
        for value in WRONG:
            try:
                config = CacheConfig(name, {option: value})
            except ValueError:
                continue
            assert CacheConfig.from_dict(config.to_dict()) == config
    for value in WRONG:
        with pytest.raises(ValueError):
            CacheConfig(name, {"nope": value})
        with pytest.raises(ValueError):
            CacheConfig(name, {3: value})


POLICIES = [
    DualCache,
    IntervalCache,
    PrefixCache,
    VicinityCache,
    AdaptiveCache,
    MaxLogitCache,
    ModalityCache,
    HeldGuidance,
    SegmentCache,
]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.__name__)
def test_policies_made_by_hand_check_their_settings(policy, model) -> None:
    """What is accepted starts; the rest is one sentence that names the setting."""
    start = {"policy": NoCache()} if policy is HeldGuidance else {}
    for name in [f.name for f in fields(policy) if f.init]:
        for value in WRONG:
            try:
                made = policy(**{**start, name: value})
            except ValueError as error:
                assert name in str(error)
                continue
            made.start(rows()[0], model)


NUMBERS = [v for v in WRONG if isinstance(v, int | float) and not isinstance(v, bool)]
NUMBERS += [1e-308, 1e-20, 1 - 2**-53, 3, 100, 1e4, 1e6, 1e30]
EXTREME = [0, 1, 5e-324, 1e6, 2**62, 1.7976931348623157e308]


@pytest.mark.parametrize("numbers", [EXTREME, pytest.param(NUMBERS, marks=pytest.mark.slow)], ids=["extreme", "many"])
def test_what_is_accepted_decodes(model, numbers: list[float]) -> None:
    """Every number that a setting takes gives a decode that ends."""
    batch, seeds = rows()[1], torch.tensor([3])
    for schema, start in (SETTINGS["text"], SETTINGS["ancestral"], SETTINGS["blocks"], SETTINGS["guidance"]):
        for field in fields(schema):
            for value in numbers:
                try:
                    made = schema(**{**start, field.name: value})
                except ValueError:
                    continue
                if field.name == "steps" and value > 1000 and made.rule == "ancestral":
                    continue
                config = SamplerConfig(guidance=made) if schema is Guidance else SamplerConfig(made, made)
                out = Sampler(model, VOCABULARY, config)(batch, seeds)
                assert not (out.batch.ids == VOCABULARY.mask_id)[batch.targets].any()
                assert out.confidence.isfinite().all(), (field.name, value)


def request(**changes):
    batch = TokenBatch.cat(rows())
    return {"batch": batch, "seeds": torch.arange(3)} | changes


BATCH = request()["batch"]


def test_data_nested_without_end_gets_a_sentence() -> None:
    deep: object = []
    for _ in range(100_000):
        deep = [deep]
    many = 10**5000
    for value in (deep, many):
        for make in (
            lambda v: ModalityDecoding(steps=v),
            lambda v: ModalityDecoding(rule=v),
            lambda v: Guidance(window=v),
            lambda v: SamplerConfig.from_dict({"text": v}),
            lambda v: SamplerConfig.from_dict({"text": {"forbid": v}}),
            lambda v: CacheConfig("adaptive", {"full_layers": v}),
            lambda v: CacheConfig(segments=v),
            lambda v: CacheConfig(v),
        ):
            with pytest.raises(ValueError, match=r"is .*expected"):
                make(value)
    segments: dict = {"policy": "dual"}
    for _ in range(5000):
        segments = {"segments": {"text": segments}}
    for make in (CacheConfig.from_dict, CacheConfig.of):
        with pytest.raises(ValueError, match="segments of their own"):
            make(segments)


CALLS = {
    "batch is a dict": dict(batch={}),
    "batch gives ids from": dict(batch=BATCH.replace(ids=BATCH.ids + 100)),
    "batch has modalities from": dict(batch=BATCH.replace(modality=BATCH.modality + 1)),
    r"batch given have shape \(3, 17\) and dtype torch.int64": dict(batch=BATCH.replace(given=BATCH.given.long())),
    r"batch ids have shape \(3, 17\) and dtype torch.int32": dict(batch=BATCH.replace(ids=BATCH.ids.int())),
    "batch positions have shape": dict(batch=BATCH.replace(positions=BATCH.positions[:, :3])),
    "batch has shape": dict(batch=BATCH.rows(slice(0, 0)), seeds=torch.arange(0)),
    "batch ids is a tensor on the meta device": dict(batch=BATCH.replace(ids=BATCH.ids.to("meta"))),
    "batch ids is a tensor sparse_coo": dict(batch=BATCH.replace(ids=BATCH.ids.to_sparse())),
    "seeds are a list": dict(seeds=[1, 2, 3]),
    "seeds are 5": dict(seeds=5),
    r"seeds have shape \(3,\) and dtype torch.float32": dict(seeds=torch.zeros(3)),
    r"seeds have shape \(3,\) and dtype torch.bool": dict(seeds=torch.zeros(3, dtype=torch.bool)),
    r"seeds have shape \(2,\)": dict(seeds=torch.arange(2)),
    "seeds is a tensor on the meta": dict(seeds=torch.arange(3, device="meta")),
    "condition is 5": dict(condition=5),
    "condition has shape": dict(condition=torch.ones(3, 2, dtype=torch.bool)),
    "callback is 5": dict(callback=5),
    "record is 'yes'": dict(record="yes"),
    "unconditional is 5": dict(unconditional=5),
    "unconditional is 'text'": dict(unconditional="text"),
}


@pytest.mark.parametrize(("message", "changes"), CALLS.items(), ids=CALLS.keys())
def test_a_request_of_another_kind_is_refused(model, message: str, changes: dict) -> None:
    with pytest.raises(ValueError, match=message):
        Sampler(model, VOCABULARY, SamplerConfig())(**request(**changes))


MAKES = {
    "model is 5 without hidden and head": dict(model=5),
    "model is a Linear without hidden and head": dict(model=torch.nn.Linear(1, 1)),
    "vocabulary is a dict; expected a Vocabulary": dict(vocabulary={}),
    "config is a dict; expected a SamplerConfig": dict(config={}),
    "config is 'fast'": dict(config="fast"),
    "policy is 'dual' without start and plan; .*CacheConfig": dict(policy="dual"),
    "policy is a type": dict(policy=(5.0).__class__),
    "rules is 5": dict(rules=5),
    "rules has 5 as a rule": dict(rules={Modality.TEXT: 5}),
    "rules has the key 'text'": dict(rules={"text": print}),
    "graphs is 'yes'": dict(graphs="yes"),
    "ends names id 19": dict(config=SamplerConfig(ends=(3, 19))),
    r"fill is id 11; expected a text id from 0 to 10 that is not \[MASK\]": dict(config=SamplerConfig(fill=11)),
    "fill is id 12": dict(config=SamplerConfig(fill=12)),
    "the model has 19 ids, the vocabulary 20": dict(vocabulary=Vocabulary.unified(11, 8)),
}


@pytest.mark.parametrize(("message", "changes"), MAKES.items(), ids=MAKES.keys())
def test_a_sampler_of_other_parts_is_refused(model, message: str, changes: dict) -> None:
    with pytest.raises(ValueError, match=message):
        Sampler(
            **({"model": model, "vocabulary": VOCABULARY, "config": SamplerConfig(), "policy": DualCache()} | changes)
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_guidance_that_overflows_is_named_and_the_weights_are_not_blamed(dtype) -> None:
    net = make_model().to(dtype)
    with torch.no_grad():
        net.final_norm.weight.mul_(300.0 if dtype == torch.float16 else 1e33)
    batch, seeds = TokenBatch.cat(rows()), torch.arange(3)
    config = SamplerConfig(text=ModalityDecoding(temperature=0.0), image=ModalityDecoding(temperature=0.0))
    assert Sampler(net, VOCABULARY, config)(batch, seeds).nfe > 0
    with pytest.raises(ValueError, match=r"guidance\.scale = 1e\+06.*lower") as caught:
        Sampler(net, VOCABULARY, replace(config, guidance=Guidance(1e6)))(batch, seeds)
    assert "weights" not in str(caught.value) and str(dtype).removeprefix("torch.") in str(caught.value)


def test_broken_weights_are_blamed_with_guidance_as_without() -> None:
    net = make_model()
    with torch.no_grad():
        net.final_norm.weight[0] = torch.nan
    for scale in (1.0, 3.0):
        with pytest.raises(ValueError, match="NaN or infinite logits; check the weights"):
            Sampler(net, VOCABULARY, SamplerConfig(guidance=Guidance(scale)))(TokenBatch.cat(rows()), torch.arange(3))


class Narrow:
    """Gives probability to two ids only, or too few logits."""

    def __init__(self, width: int | None = None) -> None:
        self.width = width

    def hidden(self, ids, modality, positions, attention_mask, time=None):
        out = torch.full((*ids.shape, VOCABULARY.size), -torch.inf)
        out[..., [3, 4, 13, 14]] = 0.0
        return out

    def head(self, hidden, start=0, stop=None):
        return hidden[..., start : stop if self.width is None else start + self.width]


def test_no_token_left_and_too_few_logits_have_their_own_sentences() -> None:
    batch, seeds = TokenBatch.cat(rows()), torch.arange(3)
    text = ModalityDecoding(forbid=(3, 4))
    with pytest.raises(ValueError, match="no text id that may be emitted any probability"):
        Sampler(Narrow(), VOCABULARY, SamplerConfig(text=text))(batch, seeds)
    with pytest.raises(
        ValueError, match=r"the model's head returned .* for the ids 0 to 10; expected floats \[1, 3, \d+, 11\]"
    ):
        Sampler(Narrow(5), VOCABULARY, SamplerConfig())(batch, seeds)


def test_overrides_check_what_they_are_given() -> None:
    base = SamplerConfig()
    for value in WRONG:
        if value is not None:
            with pytest.raises(ValueError, match="sampler is"):
                DecodeOptions(sampler=value)
        for name in ("steps", "guidance_scale", "guidance_hides", "temperature", "block_length", "threshold"):
            try:
                made = DecodeOptions(**{name: value}).apply(base)
            except ValueError:
                continue
            assert isinstance(made, SamplerConfig)
    with pytest.raises(ValueError, match="threshold names"):
        DecodeOptions(threshold={"sound": 1, 3: 2}).apply(base)


@pytest.mark.parametrize("rule", ["threshold", "factor", "hierarchical", "credit", "first_hitting"])
def test_steps_of_a_call_hold_for_both_modalities(model, rule: str) -> None:
    settings = ModalityDecoding(rule=rule, temperature=0.0)
    base = SamplerConfig(settings, replace(settings, schedule="cosine"), order="text_first", stop_at_eos=False)
    batch = rows()[0]  # 6 words and 9 codes
    assert Sampler(model, VOCABULARY, DecodeOptions(steps=4).apply(base))(batch, torch.tensor([1])).nfe == 8


class Answers:
    """A backbone that returns what it is told to."""

    def __init__(self, hidden, head=None) -> None:
        self.answer, self.last = hidden, head

    def hidden(self, ids, modality, positions, attention_mask, time=None):
        return self.answer(ids)

    def head(self, hidden, start=0, stop=None):
        return hidden[..., start:stop] if self.last is None else self.last


FEATURES = {
    "None": lambda ids: None,
    "an array": lambda ids: np.zeros((*ids.shape, 19)),
    "a place too few": lambda ids: torch.zeros(len(ids), ids.shape[1] - 1, 19),
    "no width": lambda ids: torch.zeros(ids.shape),
    "one row": lambda ids: torch.zeros(1, ids.shape[1], 19),
    "integers": lambda ids: torch.zeros(*ids.shape, 19, dtype=torch.long),
    "complex numbers": lambda ids: torch.zeros(*ids.shape, 19, dtype=torch.complex64),
    "truth values": lambda ids: torch.zeros(*ids.shape, 19, dtype=torch.bool),
}


@pytest.mark.parametrize("answer", FEATURES.values(), ids=FEATURES.keys())
def test_a_backbone_that_answers_something_else_is_named(answer) -> None:
    with pytest.raises(ValueError, match=r"the model's hidden returned .*; expected floats \[3, 17, 'D'\]"):
        Sampler(Answers(answer), VOCABULARY, SamplerConfig())(**request())
    for head in (5, torch.zeros(3, 4)):
        with pytest.raises(ValueError, match="the model's head returned"):
            Sampler(Answers(lambda ids: torch.zeros(*ids.shape, 19), head), VOCABULARY, SamplerConfig())(**request())
