"""`steps` is a promise: passes counted by real decodes, for any row, block length and schedule, alone and in a batch."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from random import Random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from unidiff.decoding import ModalityDecoding, Sampler, SamplerConfig, SamplerOutput
from unidiff.decoding.config import BLOCK_ORDERS
from unidiff.diffusion.schedules import SCHEDULES
from unidiff.tokens import Modality, Span, TokenBatch, Vocabulary

VOCABULARY = Vocabulary.unified(7, 5)
QUICK = settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


class Table:
    """Logits by id and place, with some of the context; costs nothing."""

    def __init__(self) -> None:
        self.table = torch.randn(64, VOCABULARY.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        self.times: list[list[float]] = []

    def hidden(
        self,
        ids: Tensor,
        modality: Tensor,
        positions: Tensor,
        attention_mask: Tensor | None,
        time: Tensor | None = None,
    ) -> Tensor:
        assert time is not None
        self.times.append(time.tolist())
        context = torch.where(ids == VOCABULARY.mask_id, 0, ids + 1).cumsum(1)
        return self.table[(context + positions[..., 0]) % 64]

    def head(self, hidden: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        return hidden[..., start:stop]


def row(words: int, grid: tuple[int, int]) -> list[Span]:
    spans = [Span.text([1], True)]
    if words:
        spans.append(Span.masked_text(words, VOCABULARY))
    if min(grid):
        spans.append(Span.masked_image(grid, VOCABULARY))
    return spans


def promised(decoding: ModalityDecoding, targets: int) -> int:
    """Passes of a row with so many targets."""
    if not targets:
        return 0
    blocks = -(-targets // min(decoding.block_length or targets, targets))
    most = targets if decoding.rule == "quota" else max(targets, decoding.steps)
    return min(max(decoding.steps, blocks), most)


def made(out: SamplerOutput, modality: Modality) -> list[int]:
    """Passes in which something of a modality was written, per row."""
    wanted = out.batch.targets & (out.batch.modality == modality)
    states = torch.stack([ids == VOCABULARY.mask_id for ids in out.trajectory])  # [passes + 1, B, L]
    return (states[:-1] & ~states[1:] & wanted).any(2).sum(0).tolist()


def decode(rows: list[list[Span]], config: SamplerConfig, seed: int = 0, **options: object) -> SamplerOutput:
    batch = TokenBatch.from_spans(rows)
    return Sampler(Table(), VOCABULARY, config, **options)(batch, torch.arange(len(rows)) + seed, record=True)


quotas = st.builds(
    ModalityDecoding,
    steps=st.integers(1, 40),
    schedule=st.sampled_from(["fixed", *SCHEDULES]),
    confidence=st.sampled_from(["probability", "margin", "entropy", "random"]),
    temperature=st.sampled_from([0.0, 1.0]),
    choice_temperature=st.sampled_from([0.0, 1.0]),
    block_length=st.one_of(st.none(), st.integers(1, 20), st.just(2**62)),
)
shapes = st.tuples(st.integers(0, 26), st.tuples(st.integers(0, 5), st.integers(1, 5)))


def check_steps(
    rows: list[tuple[int, tuple[int, int]]], text: ModalityDecoding, image: ModalityDecoding, order: str, seed: int
) -> None:
    """Every row makes the passes it was promised, and the same tokens as alone."""
    config = SamplerConfig(text, image, order=order)
    out = decode([row(*shape) for shape in rows], config, seed)
    for modality, decoding in ((Modality.TEXT, text), (Modality.IMAGE, image)):
        targets = [words if modality == Modality.TEXT else grid[0] * grid[1] for words, grid in rows]
        assert made(out, modality) == [promised(decoding, n) for n in targets]
    for b, shape in enumerate(rows if len(rows) > 1 else ()):
        alone = decode([row(*shape)], config, seed + b).batch.ids[0]
        assert torch.equal(alone, out.batch.ids[b, : len(alone)])


ORDERS = ["together", "text_first", "image_first", "level"]


@given(
    st.lists(shapes, min_size=1, max_size=3).filter(lambda rows: any(w or g[0] for w, g in rows)),
    quotas,
    quotas,
    st.sampled_from(BLOCK_ORDERS),
    st.sampled_from(ORDERS),
    st.integers(0, 2**31),
)
@QUICK
def test_a_quota_makes_exactly_its_steps(
    rows: list[tuple[int, tuple[int, int]]],
    text: ModalityDecoding,
    image: ModalityDecoding,
    block_order: str,
    order: str,
    seed: int,
) -> None:
    check_steps(rows, text, replace(image, block_order=block_order), order, seed)


@pytest.mark.slow
def test_a_quota_makes_exactly_its_steps_in_400_cases() -> None:
    """Seed 15: larger pictures, texts and numbers of steps than above."""
    draw = Random(15)

    def quota() -> ModalityDecoding:
        return ModalityDecoding(
            steps=draw.randint(1, draw.choice([8, 120])),
            schedule=draw.choice(["fixed", *SCHEDULES]),
            confidence=draw.choice(["probability", "margin", "entropy", "random"]),
            temperature=draw.choice([0.0, 0.7]),
            choice_temperature=draw.choice([0.0, 2.0]),
            block_length=draw.choice([None, draw.randint(1, 70)]),
        )

    for case in range(400):
        rows = [(draw.randint(0, 70), (draw.randint(0, 8), draw.randint(1, 8))) for _ in range(draw.randint(1, 3))]
        if any(words or grid[0] for words, grid in rows):
            check_steps(
                rows, quota(), replace(quota(), block_order=draw.choice(BLOCK_ORDERS)), draw.choice(ORDERS), case
            )


@given(quotas, st.integers(1, 40), st.integers(0, 2**31))
@QUICK
def test_blocks_take_passes_by_their_sizes(decoding: ModalityDecoding, words: int, seed: int) -> None:
    """Every block at least one pass, no more than its tokens, and within one of its share."""
    decoding = replace(decoding, confidence="probability")
    out = decode([row(words, (0, 1))], SamplerConfig(decoding, stop_at_eos=False), seed)
    states = torch.stack([ids[0, 1:] == VOCABULARY.mask_id for ids in out.trajectory])
    length = min(decoding.block_length or words, words)
    passes = Counter(int((before & ~after).nonzero()[0]) // length for before, after in pairwise(states))
    total = promised(decoding, words)
    for block in range(-(-words // length)):
        size = min(length, words - block * length)
        assert 1 <= passes[block] <= size and abs(passes[block] - total * size / words) < 1


@pytest.mark.parametrize(
    ("words", "steps", "length"), [(33, 33, 32), (40, 40, 32), (50, 50, 32), (100, 100, 32), (33, 17, 32)]
)
def test_a_text_of_one_token_per_pass(words: int, steps: int, length: int) -> None:
    text = ModalityDecoding(steps=steps, schedule="fixed", block_length=length, temperature=0.0)
    assert decode([row(words, (0, 1))], SamplerConfig(text)).nfe == steps


@pytest.mark.parametrize(("steps", "length"), [(63, 63), (64, 10), (64, 64), (7, 63), (20, 9), (1, 64)])
def test_a_picture_of_64_codes(steps: int, length: int) -> None:
    image = ModalityDecoding(steps=steps, block_length=length)
    assert decode([row(0, (8, 8))], SamplerConfig(image=image)).nfe == steps


def test_fewer_steps_than_blocks_make_one_pass_per_block() -> None:
    assert decode([row(10, (0, 1))], SamplerConfig(ModalityDecoding(steps=2, block_length=3))).nfe == 4


@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=3),
    st.integers(1, 40),
    st.one_of(st.none(), st.integers(1, 12)),
    st.sampled_from(["linear", "cosine"]),
    st.booleans(),
    st.integers(0, 2**31),
)
@QUICK
def test_a_grid_of_times_has_steps_points(
    words: list[int], steps: int, length: int | None, schedule: str, remask: bool, seed: int
) -> None:
    """`ancestral` makes at most `steps` passes, or one per block; the model sees the planned times, each row its own."""
    text = ModalityDecoding(steps=steps, rule="ancestral", schedule=schedule, block_length=length)
    if remask:
        text = replace(text, remask="remdm", remask_cap=0.5)
    model = Table()
    batch = TokenBatch.from_spans([row(n, (0, 1)) for n in words])
    out = Sampler(model, VOCABULARY, SamplerConfig(text, stop_at_eos=False))(
        batch, torch.arange(len(words)) + seed, record=True
    )
    plans = [promised(text, n) for n in words]
    assert all(passes <= max(steps, -(-n // (length or n))) for passes, n in zip(made(out, Modality.TEXT), words))
    assert out.steps <= max(max(steps, -(-n // (length or n))) for n in words)
    if len(words) == 1:
        total = max(steps, plans[0])
        nearest = [(t, min(range(total), key=lambda k: abs(1 - k / total - t))) for (t,) in model.times]
        assert all(t == pytest.approx(1 - k / total, abs=1e-6) for t, k in nearest)


@given(st.integers(2, 24), st.integers(1, 24), st.one_of(st.none(), st.integers(1, 9)))
@QUICK
def test_the_time_of_a_quota_falls_evenly(words: int, steps: int, length: int | None) -> None:
    model = Table()
    text = ModalityDecoding(steps=steps, block_length=length, temperature=0.0)
    Sampler(model, VOCABULARY, SamplerConfig(text))(TokenBatch.from_spans([row(words, (0, 1))]), torch.tensor([0]))
    total = promised(text, words)
    assert [t for (t,) in model.times] == pytest.approx([1 - k / total for k in range(total)], abs=1e-6)


@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=3),
    quotas,
    st.integers(0, 6),
    st.integers(1, 3),
    st.integers(0, 2**31),
)
@QUICK
def test_remasking_adds_at_most_a_pass_per_token_and_flight_adds_none(
    words: list[int], decoding: ModalityDecoding, budget: int, flight: int, seed: int
) -> None:
    """Also where tokens of earlier blocks are masked again: the block that was interrupted goes on where it was."""
    text = replace(decoding, remask="confidence", remask_threshold=0.9, remask_budget=budget)
    if text.block_length is not None and text.confidence != "random":
        text = replace(text, blocks_in_flight=flight, flight_threshold=0.3)
    out = decode([row(n, (0, 1)) for n in words], SamplerConfig(text, stop_at_eos=False), seed)
    most = [promised(text, n) + budget for n in words]
    assert all(passes <= bound for passes, bound in zip(made(out, Modality.TEXT), most, strict=True))
    assert out.steps <= max(most)
    for b, n in enumerate(words):
        alone = decode([row(n, (0, 1))], SamplerConfig(text, stop_at_eos=False), seed + b).batch.ids[0]
        assert torch.equal(alone, out.batch.ids[b, : len(alone)])
