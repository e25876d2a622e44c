"""Properties of the sampler over random settings: it ends, keeps what is given, never emits [MASK], rows are independent."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from unidiff.decoding import DecodeState, Guidance, ModalityDecoding, Sampler, SamplerConfig
from unidiff.decoding.config import BLOCK_ORDERS, ORDERS, RULES
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Modality, Span, TokenBatch, Vocabulary

TEXT_SIZE, CODES, EOS = 11, 7, 2
VOCABULARY = Vocabulary.unified(TEXT_SIZE, CODES, {"eos": EOS})


class FixedLogits:
    """The same logits `[V]` (or `[L, V]`) everywhere, whatever is visible."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        self.calls = 0

    def hidden(
        self, ids: Tensor, modality: Tensor, positions: Tensor, attention_mask: Tensor | None, time=None
    ) -> Tensor:
        self.calls += 1
        return self.logits.expand(*ids.shape, -1)

    def head(self, hidden: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        return hidden[..., start:stop]


@pytest.fixture(scope="module")
def model() -> MaskedTransformer:
    torch.manual_seed(3)
    net = MaskedTransformer(VOCABULARY.size, hidden_size=16, num_layers=2, num_heads=2).eval().double()
    with torch.no_grad():
        for p in net.parameters():  # the usual start is a model that ignores its context
            p.copy_(torch.randn(p.shape, dtype=p.dtype) * 0.4)
    return net


def modality_settings(modality: str) -> st.SearchStrategy[ModalityDecoding]:
    def build(rule: str, remask: str, schedule: str, confidence: str, **rest) -> ModalityDecoding:
        if rule == "ancestral":
            schedule = "linear" if schedule == "fixed" else schedule
            remask = "remdm" if remask != "none" else "none"
        elif remask == "remdm":
            remask = "confidence"
        if (
            rule in ("threshold", "factor", "hierarchical", "credit", "at_least", "even_share")
            and confidence == "random"
        ):
            confidence = "margin"
        if rest["block_length"] is None or rule in ("first_hitting", "ancestral") or confidence == "random":
            rest["blocks_in_flight"] = 1
        blind = rule in ("ancestral", "first_hitting", "credit") or confidence == "random"
        if blind or remask != "none" or rest["blocks_in_flight"] > 1:
            rest["edit_threshold"] = None
        return ModalityDecoding(rule=rule, remask=remask, schedule=schedule, confidence=confidence, **rest)

    return st.builds(
        build,
        rule=st.sampled_from(list(RULES)),
        remask=st.sampled_from(["none", "confidence", "remdm"]),
        schedule=st.sampled_from(["fixed", "linear", "cosine", "square"]),
        confidence=st.sampled_from(["probability", "margin", "entropy", "random"]),
        steps=st.integers(1, 6),
        temperature=st.sampled_from([0.0, 0.7, 1.0]),
        choice_temperature=st.sampled_from([0.0, 2.0]),
        top_k=st.sampled_from([None, 3]),
        top_p=st.sampled_from([None, 0.8]),
        threshold=st.sampled_from([0.2, 0.9]),
        factor=st.sampled_from([0.5, 1.0]),
        block_length=st.sampled_from([None, 2, 3]),
        block_order=st.sampled_from(BLOCK_ORDERS if modality == "image" else ["sequence", "aligned"]),
        blocks_in_flight=st.integers(1, 3),
        flight_share=st.sampled_from([0.0, 0.6]),
        flight_threshold=st.sampled_from([0.1, 0.5]),
        low_threshold=st.just(0.2),
        remask_threshold=st.just(0.5),
        remask_budget=st.integers(0, 4),
        remask_cap=st.sampled_from([0.0, 0.4, 1.0]),
        edit_threshold=st.sampled_from([None, 0.0, 0.3]),
        edit_passes=st.integers(0, 3),
        least_tokens=st.integers(1, 3),
        forbid=st.sampled_from([(), (0, TEXT_SIZE + 1)]),
    )


configs = st.builds(
    SamplerConfig,
    text=modality_settings("text"),
    image=modality_settings("image"),
    guidance=st.builds(
        Guidance,
        scale=st.sampled_from([0.5, 1.0, 2.5]),
        mode=st.sampled_from(["constant", "ramp", "window"]),
        window=st.just((0.2, 0.7)),
        hide=st.sampled_from(["given", "other", "text", "image"]),
        image_scale=st.sampled_from([None, 1.5]),
    ),
    order=st.sampled_from(ORDERS),
)


@st.composite
def rows(draw: st.DrawFn) -> list[Span]:
    """A known word, a text span, an image span of any small grid, another text span; any part of them given.

    Without the known word all positions of a hidden row are exact ties (attention averages equal values), which
    rounding then breaks: nothing that a batch could promise to keep.
    """
    flags = lambda n: torch.tensor(draw(st.lists(st.booleans(), min_size=n, max_size=n)), dtype=torch.bool)  # noqa: E731
    head, height, width, tail = (draw(st.integers(low, 3)) for low in (0, 0, 1, 1))
    spans = [Span.text([4], True)]
    if head:
        spans.append(Span.text(torch.arange(head) % TEXT_SIZE, flags(head)))
    if height:
        codes = (torch.arange(height * width) % CODES + TEXT_SIZE + 1).view(height, width)
        spans.append(Span.image(codes, flags(height * width).view(height, width)))
    spans.append(Span.text(torch.arange(tail) + 3, flags(tail)))
    return spans


def check_result(batch: TokenBatch, out: TokenBatch, confidence: Tensor, config: SamplerConfig) -> None:
    still = ~batch.targets
    assert torch.equal(out.ids[still], batch.ids[still])
    for modality, decoding in ((Modality.TEXT, config.text), (Modality.IMAGE, config.image)):
        ids = out.ids[batch.targets & (batch.modality == modality)]
        start, stop = VOCABULARY.range_of(modality)
        assert ((ids >= start) & (ids < stop)).all()
        assert not any((ids == i).any() for i in decoding.forbid)
    assert (confidence[still] == 1).all()
    assert ((confidence > 0) & (confidence <= 1)).all()


@given(st.lists(rows(), min_size=1, max_size=3), configs, st.integers(0, 2**40), st.integers(0, 3))
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
def test_any_settings_on_any_rows(
    model: MaskedTransformer, spans: list[list[Span]], config: SamplerConfig, seed: int, padding: int
) -> None:
    batch = TokenBatch.from_spans(spans)
    seeds = seed + torch.arange(len(spans))
    sampler = Sampler(model, VOCABULARY, config)
    passes = []
    out = sampler(batch.pad_to(batch.shape[1] + padding), seeds, callback=lambda step, state: passes.append(step))
    check_result(batch.pad_to(batch.shape[1] + padding), out.batch, out.confidence, config)
    assert passes == list(range(out.steps))
    for b, row in enumerate(spans):  # each row alone, without padding, gives the same tokens
        alone = sampler(TokenBatch.from_spans([row]), seeds[b : b + 1])
        length = alone.batch.shape[1]
        assert torch.equal(alone.batch.ids[0], out.batch.ids[b, :length])
        torch.testing.assert_close(alone.confidence[0], out.confidence[b, :length], atol=1e-6, rtol=0)


def test_seeds_decide_and_calls_share_no_state(model: MaskedTransformer) -> None:
    batch = TokenBatch.from_spans([[Span.masked_text(4, VOCABULARY), Span.masked_image((3, 3), VOCABULARY)]] * 3)
    config = SamplerConfig(text=ModalityDecoding(steps=3), image=ModalityDecoding(steps=4), stop_at_eos=False)
    sampler = Sampler(model, VOCABULARY, config)
    first = sampler(batch, torch.tensor([1, 2, 1])).batch.ids
    assert torch.equal(first[0], first[2]) and not torch.equal(first[0], first[1])
    assert torch.equal(first, sampler(batch, torch.tensor([1, 2, 1])).batch.ids)


def test_float32_rows_agree_with_the_batch_up_to_near_ties() -> None:
    torch.manual_seed(5)
    net = MaskedTransformer(VOCABULARY.size, hidden_size=32, num_layers=2, num_heads=2).eval()
    for p in net.parameters():
        p.data.normal_(std=0.4)
    spans = [[Span.masked_text(5, VOCABULARY), Span.masked_image((n, 4), VOCABULARY)] for n in (4, 2, 3)]
    sampler = Sampler(net, VOCABULARY, SamplerConfig(image=ModalityDecoding(temperature=0.0)))
    together = sampler(TokenBatch.from_spans(spans), torch.arange(3))
    for b, row in enumerate(spans):
        alone = sampler(TokenBatch.from_spans([row]), torch.tensor([b]))
        n = alone.batch.shape[1]
        assert torch.equal(alone.batch.ids[0], together.batch.ids[b, :n])
        torch.testing.assert_close(alone.confidence[0], together.confidence[b, :n], atol=1e-4, rtol=0)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_finished_rows_take_part_in_no_pass(model: MaskedTransformer, scale: float) -> None:
    """Rows of 1 to 4 tokens, one per pass, and their guidance streams: the work of the batch is that of the rows alone."""
    spans = [
        [Span.text([5], True), Span.text([6] * (4 - n), True), Span.masked_text(n, VOCABULARY)] for n in (3, 1, 4, 2)
    ]
    config = SamplerConfig(
        text=ModalityDecoding(steps=9, schedule="linear"), guidance=Guidance(scale), stop_at_eos=False
    )
    sampler = Sampler(model, VOCABULARY, config)
    together = sampler(TokenBatch.from_spans(spans), torch.arange(4))
    alone = [sampler(TokenBatch.from_spans([row]), torch.tensor([b])) for b, row in enumerate(spans)]
    assert torch.equal(together.batch.ids, torch.cat([out.batch.ids for out in alone]))
    torch.testing.assert_close(together.confidence, torch.cat([out.confidence for out in alone]))
    streams = 1 if scale == 1 else 2
    assert together.stats.model_tokens == sum(out.stats.model_tokens for out in alone) == streams * 5 * (3 + 1 + 4 + 2)
    assert together.stats.head_tokens == 4 * 4 + 3 * 3 + 2 * 2 + 1 * 1  # rows by the most that one of them has open
    assert together.nfe == streams * 4


@pytest.mark.parametrize("rule", ["quota", "threshold", "factor", "first_hitting", "ancestral"])
def test_ends_when_the_model_only_wants_the_mask(rule: str) -> None:
    """LLaDA keeps [MASK] inside the text slice; an adversarial model puts all its weight on it, or ties everything."""
    vocabulary = Vocabulary(6, (0, 6), (6, 6), mask_id=4)
    decoding = ModalityDecoding(rule=rule, schedule="linear", threshold=1.1, temperature=0.0, steps=3)
    batch = TokenBatch.from_spans([[Span.text([1], True), Span.masked_text(5, vocabulary)]])
    for logits in (torch.tensor([0.0, 0.0, 0.0, 0.0, 1e4, 0.0]), torch.zeros(6)):
        out = Sampler(FixedLogits(logits), vocabulary, SamplerConfig(text=decoding))(batch, torch.tensor([0]))
        assert (out.batch.ids != vocabulary.mask_id).all() and out.batch.ids[0, 0] == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_unusable_logits_are_refused(bad: float) -> None:
    logits = torch.zeros(VOCABULARY.size)
    logits[5] = bad
    batch = TokenBatch.from_spans([[Span.masked_text(3, VOCABULARY)]])
    with pytest.raises(ValueError, match="NaN or infinite logits"):
        Sampler(FixedLogits(logits), VOCABULARY, SamplerConfig())(batch, torch.tensor([0]))


def test_nothing_to_do_needs_no_pass() -> None:
    model = FixedLogits(torch.zeros(VOCABULARY.size))
    batch = TokenBatch.from_spans([[Span.text([1, 2, 3], True)]])
    out = Sampler(model, VOCABULARY, SamplerConfig())(batch, torch.tensor([0]), record=True)
    assert out.nfe == out.steps == model.calls == 0 and torch.equal(out.batch.ids, batch.ids)
    assert len(out.trajectory) == 1


def test_rules_and_steps_belong_to_their_modality(model: MaskedTransformer) -> None:
    """Text takes one token per pass while the image follows its own quota of four steps."""
    batch = TokenBatch.from_spans([[Span.masked_text(6, VOCABULARY), Span.masked_image((4, 4), VOCABULARY)]])
    config = SamplerConfig(
        text=ModalityDecoding(rule="first_hitting"),
        image=ModalityDecoding(schedule="fixed", steps=4),
        stop_at_eos=False,
    )
    out = Sampler(model, VOCABULARY, config)(batch, torch.tensor([4]), record=True)
    hidden = torch.stack([(ids == VOCABULARY.mask_id)[0] for ids in out.trajectory])
    assert hidden[:, :6].sum(1).tolist() == [6, 5, 4, 3, 2, 1, 0]
    assert hidden[:, 6:].sum(1).tolist() == [16, 12, 8, 4, 0, 0, 0]
    assert out.nfe == 6


@pytest.mark.parametrize(("order", "first"), [("text_first", slice(0, 4)), ("image_first", slice(4, 13))])
def test_one_modality_first(model: MaskedTransformer, order: str, first: slice) -> None:
    batch = TokenBatch.from_spans([[Span.masked_text(4, VOCABULARY), Span.masked_image((3, 3), VOCABULARY)]])
    config = SamplerConfig(
        text=ModalityDecoding(steps=3), image=ModalityDecoding(steps=3), order=order, stop_at_eos=False
    )
    out = Sampler(model, VOCABULARY, config)(batch, torch.tensor([4]), record=True)
    for ids in out.trajectory:
        hidden = (ids == VOCABULARY.mask_id)[0]
        if hidden[first].any():
            second = hidden.clone()
            second[first] = False
            assert second.sum() == 13 - (first.stop - first.start)  # the other modality has not begun
    assert out.steps == 6


def test_text_blocks_are_decoded_left_to_right_around_known_tokens(model: MaskedTransformer) -> None:
    known = torch.tensor([False, False, True, True, False, False, False])
    batch = TokenBatch.from_spans([[Span.text(torch.arange(7), known)]])
    config = SamplerConfig(text=ModalityDecoding(block_length=2, steps=6, schedule="fixed"), stop_at_eos=False)
    out = Sampler(model, VOCABULARY, config)(batch, torch.tensor([4]), record=True)
    blocks = [[0, 1], [4, 5], [6]]  # known tokens use up nothing of a block
    for ids in out.trajectory:
        hidden = (ids == VOCABULARY.mask_id)[0]
        open_blocks = [bool(hidden[b].any()) for b in blocks]
        started = [bool((~hidden[b]).any()) for b in blocks]
        assert not any(later and earlier for earlier, later in zip(open_blocks, started[1:], strict=False))
    assert out.nfe == 5  # two passes for a block of two, one for the last token


def test_text_stops_at_the_first_finished_end_of_text() -> None:
    """Position 2 wants end-of-text; the row stops once 0 and 1 are known, and the rest is filled."""
    logits = torch.full((8, VOCABULARY.size), 0.0)
    logits[0, 5], logits[1, 6], logits[2, EOS] = 6.0, 5.0, 9.0
    logits[3:, 7] = torch.linspace(3, 1, 5)
    batch = TokenBatch.from_spans([[Span.masked_text(8, VOCABULARY)]])
    config = SamplerConfig(text=ModalityDecoding(schedule="fixed", steps=8, temperature=0.0))
    out = Sampler(FixedLogits(logits), VOCABULARY, config)(batch, torch.tensor([0]))
    assert out.batch.ids[0].tolist() == [5, 6, EOS, EOS, EOS, EOS, EOS, EOS]
    assert out.nfe == 3
    assert (out.confidence[0, 3:] == 1).all() and (out.confidence[0, :3] < 1).all()
    whole = Sampler(FixedLogits(logits), VOCABULARY, replace(config, stop_at_eos=False))(batch, torch.tensor([0]))
    assert whole.nfe == 8 and whole.batch.ids[0].tolist() == [5, 6, EOS, 7, 7, 7, 7, 7]


def test_a_given_end_of_text_ends_nothing_and_samples_stop_apart() -> None:
    logits = torch.zeros(VOCABULARY.size)
    logits[7] = 5.0
    given_eos = [Span.text([EOS], True), Span.masked_text(3, VOCABULARY)]
    out = Sampler(FixedLogits(logits), VOCABULARY, SamplerConfig())(
        TokenBatch.from_spans([given_eos]), torch.tensor([0])
    )
    assert out.batch.ids[0].tolist() == [EOS, 7, 7, 7]

    logits = torch.zeros(6, VOCABULARY.size)
    logits[0, EOS], logits[1:, 7] = 9.0, 5.0  # the first sample ends at once; its neighbour in the row must not
    packed = TokenBatch.from_packed([[[Span.masked_text(3, VOCABULARY)], [Span.masked_text(3, VOCABULARY)]]])
    config = SamplerConfig(text=ModalityDecoding(schedule="fixed", steps=6, temperature=0.0))
    out = Sampler(FixedLogits(logits), VOCABULARY, config)(packed, torch.tensor([0]))
    assert out.batch.ids[0].tolist() == [EOS, EOS, EOS, 7, 7, 7]


def test_confidence_remasking_is_bounded_and_spares_known_tokens(model: MaskedTransformer) -> None:
    known = torch.tensor([True, False, False, False, False, False, True, False])
    batch = TokenBatch.from_spans([[Span.text(torch.arange(8) + 3, known)]] * 4)
    for budget in (0, 1, 5):
        decoding = ModalityDecoding(
            schedule="fixed", steps=6, remask="confidence", remask_threshold=1.0, remask_budget=budget
        )
        config = SamplerConfig(text=decoding, stop_at_eos=False)
        out = Sampler(model, VOCABULARY, config)(batch, torch.arange(4), record=True)
        hidden = torch.stack([ids == VOCABULARY.mask_id for ids in out.trajectory])  # [steps + 1, B, L]
        again = (~hidden[:-1] & hidden[1:]).sum((0, 2))
        assert (again <= budget).all()
        assert again.max() == budget or budget > 4  # the model is never sure, so a small budget is used up
        assert not hidden[:, :, known].any() and torch.equal(out.batch.ids[:, known], batch.ids[:, known])


def test_ancestral_makes_no_pass_where_nothing_is_unmasked(model: MaskedTransformer) -> None:
    batch = TokenBatch.from_spans([[Span.masked_text(2, VOCABULARY)]])
    config = SamplerConfig(text=ModalityDecoding(rule="ancestral", schedule="linear", steps=50), stop_at_eos=False)
    out = Sampler(model, VOCABULARY, config)(batch, torch.tensor([3]), record=True)
    changes = sum(not torch.equal(a, b) for a, b in zip(out.trajectory, out.trajectory[1:], strict=False))
    assert out.nfe == changes <= 2


def test_callback_may_stop_early_and_nothing_stays_masked(model: MaskedTransformer) -> None:
    batch = TokenBatch.from_spans([[Span.masked_text(3, VOCABULARY), Span.masked_image((4, 4), VOCABULARY)]])
    config = SamplerConfig(
        image=ModalityDecoding(rule="ancestral", schedule="linear", steps=40, remask="remdm", remask_cap=0.5)
    )
    seen: list[tuple[int, int]] = []

    def stop_at_two(step: int, state: DecodeState) -> bool:
        seen.append((step, int(state.open.sum())))
        return step < 2

    out = Sampler(model, VOCABULARY, config)(batch, torch.tensor([1]), callback=stop_at_two)
    assert [step for step, _ in seen] == [0, 1, 2, 3] and seen[2][1] > 0 and seen[3][1] == 0
    check_result(batch, out.batch, out.confidence, config)


def test_bad_requests_are_refused_in_one_sentence(model: MaskedTransformer) -> None:
    batch = TokenBatch.from_spans([[Span.masked_text(3, VOCABULARY)]])
    sampler = Sampler(model, VOCABULARY, SamplerConfig())
    with pytest.raises(ValueError, match=r"condition has shape \(1, 2\)"):
        sampler(batch, torch.tensor([0]), condition=torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="seeds have shape"):
        sampler(batch, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="forbid names id 99"):
        Sampler(model, VOCABULARY, SamplerConfig(text=ModalityDecoding(forbid=(99,))))
    with pytest.raises(ValueError, match="every image id is forbidden"):
        Sampler(model, VOCABULARY, SamplerConfig(image=ModalityDecoding(forbid=tuple(range(12, 19)))))
    text_only = Vocabulary(12, (0, 11), (12, 12), 11)
    image = TokenBatch.from_spans([[Span.image(torch.zeros(2, 2, dtype=torch.long))]])
    with pytest.raises(ValueError, match="image targets, but the vocabulary has no such ids"):
        Sampler(FixedLogits(torch.zeros(12)), text_only, SamplerConfig())(image, torch.tensor([0]))
