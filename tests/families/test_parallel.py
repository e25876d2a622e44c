"""Words and a picture together, as MMaDA-Parallel's models answer: rows, one clock, batches and caches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from decode_layout import request_of
from parallel_parts import (
    BOTH,
    CODES,
    GIVEN,
    IDS_A,
    IDS_M,
    JOINT,
    LAYOUTS,
    SQUARE,
    TEXTS,
    VOCABULARY_A,
    VOCABULARY_M,
    A,
    M,
    encode,
    model_of,
    open_codes,
    open_words,
    request_for,
    run,
)
from torch import Tensor

from unidiff.decoding.cache import AdaptiveCache, DualCache, IntervalCache, MaxLogitCache, NoCache, SegmentCache
from unidiff.decoding.cache.config import choose_cache
from unidiff.families.lumina import LuminaLayout
from unidiff.families.mmada import THINK, MMaDALayout, mmada_vocabulary, split_thought
from unidiff.families.parallel import JointSettings
from unidiff.tokens import Span, TokenBatch


def test_rows_of_model_a():
    s, request = IDS_A, request_for("A", "edit")
    row = request.batch.ids[0][request.batch.valid[0]].tolist()
    line = lambda codes: [*[40 + int(c) for c in codes], s["newline"]]  # noqa: E731
    picture = [s["boi"], *line(CODES[0, 0]), *line(CODES[0, 1]), s["eoi"]]
    answer = [s["answer"], s["boi"], *[29, 29, s["newline"]] * 3, s["eoi"], *[29] * 6, s["end_answer"]]
    front = [20, 9, 9, 21, 22]
    assert row == [*front, 4, 5, 2, *picture, 23, *answer]
    no_words, no_picture = (b.ids[0][b.valid[0]].tolist() for b in request.unconditional)
    assert no_words == [*front, s["uncondition"], *picture, 23, *answer]
    assert no_picture == [*front, 4, 5, 2, 23, *answer]
    made = request_for("A", "generate")
    assert [len(made.unconditional), made.config.guidance.further] == [1, ()]
    assert made.batch.ids[0][made.batch.valid[0]].tolist()[: len(front) + 4] == [*front, 4, 5, 2, 23]
    assert int(request.words.sum(1)[0]) == 6 and int(request.picture.sum(1)[0]) == 6


def test_rows_of_model_m():
    s, request = IDS_M, request_for("M", "edit")
    row, away = (b.ids[0][b.valid[0]].tolist() for b in (request.batch, *request.unconditional))
    answer = [s["soi"], *[40] * 4, s["eoi"], s["bos"], *[40] * 6]
    codes = (SQUARE[0].flatten() + 41).tolist()
    assert row == [s["interleave"], s["soi"], *codes, s["eoi"], s["bos"], 4, 5, 2, s["eos"], *answer]
    assert away == [s["interleave"], s["soi"], 0, 0, 0, 0, s["eoi"], s["bos"], *[s["eos"]] * 4, *answer]
    made = request_for("M", "generate").batch.ids[0]
    assert made[made != 0][0] == s["t2it"] and int((made == 0).sum()) >= 4


@BOTH
def test_words_and_picture_keep_to_one_clock(variant):
    """Words are written in all passes, codes in passes of their own from a quarter on, and none is left."""
    request, mask = request_for(variant, "edit", texts=TEXTS[:1]), LAYOUTS[variant].vocabulary.mask_id
    request = replace(request, needs=replace(request.needs, stop_at_eos=False))
    out = run(variant, request)
    words, codes = open_words(request, out, mask), open_codes(request, out, mask)
    assert words[0] == 6 and words[-1] == codes[-1] == 0
    assert len(words) == 1 + JOINT.steps
    linear = [6 - (s + 1) * 6 // 8 if variant == "M" else int(6 * (1 - (s + 1) / 8) + 1e-9) for s in range(8)]
    assert words[1:] == (linear if variant == "A" else [5, 4, 3, 2, 1, 0, 0, 0])
    changed = [s for s in range(8) if codes[s] != codes[s + 1]]
    assert set(changed) <= {2, 4, 5, 7} and changed[0] == 2 and changed[-1] == 7
    streams = len(request.unconditional)
    guided = 4 if variant == "A" else 8  # the words of A are never guided
    asked = len([s for s in range(8) if words[s] != words[s + 1] or codes[s] != codes[s + 1]])
    assert out.nfe <= asked + guided * streams


@BOTH
@pytest.mark.parametrize("task", ["edit", "generate"])
@pytest.mark.parametrize(
    "policy",
    [
        None,
        DualCache(),
        IntervalCache(3),
        MaxLogitCache(0.6, 0.2, 4),
        AdaptiveCache(4, 3, 0.4),
        SegmentCache(DualCache(), MaxLogitCache(0.6, 0.2, 4), IntervalCache(4), IntervalCache(5)),
    ],
    ids=lambda p: type(p).__name__,
)
def test_rows_of_a_batch_are_the_rows_alone(variant, task, policy):
    """Prompts of different lengths, with a cache for each segment too."""
    request = request_for(variant, task)
    assert request.batch.valid.sum(1).unique().numel() == 2
    together = run(variant, request, policy=policy)
    for row in range(2):
        given = {n: v[row : row + 1] if isinstance(v, Tensor) else v for n, v in GIVEN[variant][task].items()}
        one = request_for(variant, task, texts=TEXTS[row : row + 1], **given)
        alone = run(variant, one, policy=policy, seeds=(1 + row,))
        for places in ("words", "picture"):
            own, other = getattr(request, places)[row], getattr(one, places)[0]
            assert torch.equal(together.batch.ids[row, own], alone.batch.ids[0, other])


@BOTH
def test_rows_of_a_batch_are_the_rows_alone_with_every_defect(variant):
    layout = replace(LAYOUTS[variant], compat="upstream")
    together = run(variant, both := request_for(variant, "edit", layout), layout)
    for row in range(2):
        given = {n: v[row : row + 1] if isinstance(v, Tensor) else v for n, v in GIVEN[variant]["edit"].items()}
        one = request_for(variant, "edit", layout, texts=TEXTS[row : row + 1], **given)
        alone = run(variant, one, layout, seeds=(1 + row,))
        for places in ("words", "picture"):
            own, other = getattr(both, places)[row], getattr(one, places)[0]
            assert torch.equal(together.batch.ids[row, own], alone.batch.ids[0, other])


@BOTH
@pytest.mark.parametrize("pictured", [True, False])
def test_a_large_row_gets_a_cache_for_each_segment(variant, pictured):
    """Of "auto", for the sizes of the released models."""
    joint = LuminaLayout(VOCABULARY_A, encode).joint if variant == "A" else MMaDALayout(VOCABULARY_M, encode).joint
    spans = [Span.text(torch.ones(40, dtype=torch.long), True), Span.image(torch.full((32, 32), 41), True)]
    hidden = [Span.image(torch.full((32, 32), 29)), Span.masked_text(256, VOCABULARY_A)]
    batch = TokenBatch.from_spans([[*(spans if pictured else spans[:1]), *hidden]])
    choice = choose_cache("auto", None, batch, joint.sampler("linear", "normal", pictured=pictured), model_of(variant))
    assert choice.config is not None and set(choice.config.segments) >= {"text", "image"}, choice.note


@BOTH
@pytest.mark.parametrize(
    "policy",
    [
        DualCache(interval=1),
        IntervalCache(1),
        MaxLogitCache(interval=1),
        AdaptiveCache(1, 1),
        SegmentCache(DualCache(interval=1), MaxLogitCache(interval=1), IntervalCache(1), IntervalCache(1)),
    ],
    ids=lambda p: type(p).__name__,
)
def test_a_cache_refreshed_in_every_pass_is_none(variant, policy):
    request = request_for(variant, "edit")
    plain, cached = run(variant, request), run(variant, request, policy=policy)
    assert all(torch.equal(a, b) for a, b in zip(plain.trajectory, cached.trajectory, strict=True))


@BOTH
def test_a_known_part_of_the_picture_stays(variant):
    codes = GIVEN[variant]["edit"]["codes"]
    holes = torch.zeros_like(codes, dtype=torch.bool)
    holes[:, 0] = True
    request = request_for(variant, "edit", codes=codes, holes=holes, grid=None)
    out = run(variant, request)
    first = LAYOUTS[variant].vocabulary.image[0]
    assert torch.equal(request.picture_ids(out.batch.ids)[:, 1:] - first, codes[:, 1:])


def test_words_end_and_hold_no_codes():
    for variant, layout in LAYOUTS.items():
        request = request_for(variant, "edit")
        out = run(variant, request)
        words = out.batch.ids[request.words]
        assert int(words.max()) < layout.vocabulary.text[1] and not (words == layout.vocabulary.mask_id).any()
        kept = request.needs.keep_in(
            replace(request.config, guidance=replace(request.config.guidance, text_scale=None))
        )
        assert kept.guidance.text_scale == 1 + layout.joint.text_guidance  # whatever scale a caller gives for all
        own = replace(request.config, guidance=replace(request.config.guidance, text_scale=3.0))
        assert request.needs.keep_in(own).guidance.text_scale == 3.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replace(A, compat="down"), "compat is 'down'; expected None, 'upstream', or some of any_id"),
        (lambda: replace(M, compat=("late",)), "compat is 'late'"),
        (lambda: JointSettings(0), "steps"),
        (lambda: request_of(A, "generate", texts=["a"]), "together as a prompt tells; give prompt="),
        (lambda: request_of(M, "generate", texts=["a"]), "together as a prompt tells; give prompt="),
        (lambda: request_for("M", "edit", references=SQUARE), "changes one picture; leave reference out"),
        (
            lambda: request_for("M", "generate", replace(M, vocabulary=mmada_vocabulary(60, 41, 16, 40, {"eos": 1}))),
            "name no 't2it'",
        ),
    ],
)
def test_errors_are_one_clear_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ------------------------------------------------------------------------------------------------------- MMaDA-8B-MixCoT


def test_questions_ask_for_the_reasoning_first():
    words = lambda text: [len(text) % 19]  # noqa: E731
    plain, asked = (MMaDALayout(VOCABULARY_M, words, side=2, thinking=on) for on in (False, True))
    question, s = "what is it?", IDS_M
    header = [s["bos"], s["start_header"], *words("user"), s["end_header"]]
    after = [s["start_header"], *words("assistant"), s["end_header"], *words("\n")]
    assert plain.conversation(question) == [*header, *words(f"\n{question}"), s["eot"], *after]
    assert asked.conversation(question) == [*header, *words(f"\n{THINK}{question}"), s["eot"], *after]
    assert asked.ids(question) == [*header, *words(f"\n{THINK}{question}<eot_id>"), *after]
    talk = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "it"},
        {"role": "user", "content": " red "},
    ]
    ids = asked.conversation(talk)
    assert ids.count(s["eot"]) == 3 and ids[4] == words("\na")[0] and words(f"\n{THINK}red")[0] in ids
    assert asked.conversation([1, 2]) == [1, 2]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("<think> two and two </think> four", ("two and two", "four")),
        ("two </think> four", ("two", "four")),
        ("four", ("", "four")),
    ],
)
def test_the_reasoning_is_told_apart_from_the_answer(text, parts):
    assert split_thought(text) == parts


def test_no_cache_is_the_default():
    request = request_for("A", "edit")
    assert torch.equal(run("A", request).batch.ids, run("A", request, policy=NoCache()).batch.ids)
