"""Every cache policy: remasked tokens are fresh work, rows stop at end-of-text, decodes end whatever the logits."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from cache_cases import EOS, POLICIES, VOCABULARY, decode, make_model, rows, rows_alone
from torch import Tensor

from unidiff.decoding import Guidance, ModalityDecoding, NoCache, Sampler, SamplerConfig
from unidiff.decoding.cache import ModalityCache
from unidiff.models.denoiser import CachePlan
from unidiff.tokens import Span, TokenBatch, Vocabulary

REMASKING = {
    "confidence": SamplerConfig(
        text=ModalityDecoding(steps=8, block_length=4, remask="confidence", remask_threshold=0.9, remask_budget=6),
        image=ModalityDecoding(
            rule="credit", threshold=0.3, block_length=5, remask="confidence", remask_threshold=0.9, remask_budget=6
        ),
        guidance=Guidance(2.0),
    ),
    "remdm": SamplerConfig(
        text=ModalityDecoding(steps=8, rule="ancestral", schedule="linear", remask="remdm", remask_cap=0.5),
        image=ModalityDecoding(steps=8, rule="ancestral", remask="remdm", remask_cap=0.5, block_length=5),
        order="level",
    ),
}


class Watched:
    """A policy between sampler and policy: counts remasked candidates, and refuses plans that leave one as it was."""

    def __init__(self, inner, counts: dict[str, int]) -> None:
        self.inner, self.counts, self.seen = inner, counts, None
        self.store, self.max_logits, self.append_only = inner.store, inner.max_logits, inner.append_only
        self.reads_shown = inner.reads_shown
        self.select, self.observe = inner.select, inner.observe

    def start(self, batch, model):
        return Watched(self.inner.start(batch, model), self.counts)

    def plan(self, state, candidates: Tensor) -> CachePlan:
        plan = self.inner.plan(state, candidates)
        done = torch.ones_like(candidates)
        if self.seen is None:
            self.seen = state.ids  # the first pass computes everything
        elif plan.query is not None:
            done = plan.query if plan.fresh is None else plan.query | plan.fresh[:, None]
        shown = candidates if plan.logits is None else candidates & plan.logits
        changed = state.ids != self.seen
        assert not (shown & changed & ~done).any(), "a candidate keeps the features of the token that was taken back"
        self.counts["remasked"] = self.counts.get("remasked", 0) + int((shown & changed).sum())
        self.seen = torch.where(done, state.ids, self.seen)
        return plan


@pytest.mark.parametrize("kind", REMASKING)
@pytest.mark.parametrize("name", POLICIES)
def test_remasked_positions_are_fresh_work(name, kind):
    counts: dict[str, int] = {}
    config, policy = REMASKING[kind], Watched(POLICIES[name](), counts)
    out = decode(make_model(), config, policy, TokenBatch.cat(rows()), [0, 1, 2])
    assert counts["remasked"] > 0 and out.stats.partial_passes > 0
    assert (out.batch.ids != VOCABULARY.mask_id)[out.batch.valid].all()
    rows_alone(make_model(), config, POLICIES[name]())


@pytest.mark.parametrize("name", [*POLICIES, "none"])
def test_rows_stop_at_end_of_text(name):
    """Rows end at different passes, later blocks are not decoded, and each equals the row alone."""
    net = make_model(head_bias=True)
    with torch.no_grad():
        net.output_bias[EOS] += 3.0
    batch = TokenBatch.from_spans([[Span.text([3, 4], True), Span.masked_text(16, VOCABULARY)]] * 5)
    config = SamplerConfig(text=ModalityDecoding(steps=16, schedule="fixed", block_length=4), guidance=Guidance(1.5))
    policy = NoCache() if name == "none" else POLICIES[name]()
    out = decode(net, config, policy, batch, [0, 1, 2, 3, 4])
    passes = []
    for i, row in enumerate(out.batch.ids[:, 2:].tolist()):
        alone = decode(net, config, policy, batch.rows([i]), [i])
        assert alone.batch.ids[0, 2:].tolist() == row
        end = row.index(EOS) if EOS in row else 15
        block = end // 4
        assert row[4 * block + 4 :] == [EOS] * (12 - 4 * block) and 4 * block < alone.steps <= 4 * block + 4
        full = decode(net, replace(config, stop_at_eos=False), policy, batch.rows([i]), [i])
        assert full.steps == 16 and full.batch.ids[0, : 2 + end].tolist() == alone.batch.ids[0, : 2 + end].tolist()
        assert alone.stats.model_tokens < full.stats.model_tokens or alone.steps == 16
        passes.append(alone.steps)
    assert len(set(passes)) > 1 and max(passes) == out.steps


@pytest.mark.parametrize("kind", ["the best token is [MASK]", "only [MASK] has mass", "ties"])
@pytest.mark.parametrize("name", [*POLICIES, "none"])
@pytest.mark.parametrize("inside", [False, True], ids=["mask behind the text", "mask among the text"])
def test_decodes_end_whatever_the_logits(kind, name, inside):
    vocabulary = Vocabulary(12, (0, 12), (12, 12), 5) if inside else Vocabulary(12, (0, 11), (11, 11), 11)
    net = make_model(vocabulary, head_bias=True, rope="1d")
    with torch.no_grad():
        net.output_weight.zero_()
        if kind != "ties":
            net.output_bias[vocabulary.mask_id] = 700.0 if kind == "only [MASK] has mass" else 1e4
    batch = TokenBatch.from_spans([[Span.text([1, 2], True), Span.masked_text(9, vocabulary)]] * 2)
    strengths = (1.0, 0.0, 3.0) if name in ("prefix", "dual", "vicinity", "none") else (1.0,)
    for rule, strength in product(("threshold", "factor", "quota", "hierarchical", "credit"), strengths):
        text = ModalityDecoding(
            steps=5, rule=rule, temperature=0.0, block_length=4, blocks_in_flight=2, confidence="margin"
        )
        policy = NoCache() if name == "none" else POLICIES[name]()
        config = SamplerConfig(text=text, guidance=Guidance(strength))
        out = Sampler(net, vocabulary, config, policy)(batch, torch.tensor([0, 1]))
        assert (out.batch.ids != vocabulary.mask_id).all()
        assert out.steps <= 9 + 3


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_are_refused(name, value):
    net = make_model(head_bias=True)
    with torch.no_grad():
        net.output_bias[4] = value
    for rule in ("threshold", "credit", "quota"):
        config = SamplerConfig(text=ModalityDecoding(rule=rule))
        with pytest.raises(ValueError, match="NaN or infinite"):
            decode(net, config, POLICIES[name](), rows()[0], [0])


def test_alternation_holds_one_modality_and_its_clock():
    """Cycles of 4 passes: the image moves in the first of them alone, by its whole schedule, until the text is done."""
    batch = TokenBatch.from_spans(
        [[Span.text([3], True), Span.masked_text(8, VOCABULARY), Span.masked_image((2, 3), VOCABULARY)]]
    )
    fixed = ModalityDecoding(steps=8, schedule="fixed")
    config = SamplerConfig(text=fixed, image=replace(fixed, steps=6), stop_at_eos=False)
    out = decode(make_model(), config, ModalityCache(interval=4), batch, [0])
    hidden = [int((ids[0, 9:] == VOCABULARY.mask_id).sum()) for ids in out.trajectory]
    assert hidden == [6, 5, 5, 5, 5, 4, 4, 4, 4, 3, 2, 1, 0]
    assert out.stats.model_tokens == 2 * 15 + 2 * 3 * 9 + 2 + 4 * 15  # held tokens just written once more
    text = decode(make_model(), config, ModalityCache(interval=4, held="text"), batch, [0])
    hidden = [int((ids[0, 1:9] == VOCABULARY.mask_id).sum()) for ids in text.trajectory]
    assert hidden == [8, 7, 7, 7, 7, 6, 6, 5, 4, 3, 2, 1, 0]
