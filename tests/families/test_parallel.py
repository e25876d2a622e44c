"""Words and a picture together, as MMaDA-Parallel's models answer: rows, one clock, batches, caches, and each defect on and off."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from decode_layout import request_of
from torch import Tensor

from unidiff.decoding import Sampler, SamplerOutput
from unidiff.decoding.cache import AdaptiveCache, DualCache, IntervalCache, MaxLogitCache, NoCache, SegmentCache
from unidiff.decoding.cache.config import choose_cache
from unidiff.families.layout import DecodeRequest
from unidiff.families.llada import LLADA
from unidiff.families.lumina import MARKS, LuminaLayout
from unidiff.families.mmada import MMADA, SPECIALS, THINK, MMaDALayout, mmada_vocabulary, split_thought
from unidiff.families.parallel import A_DEFECTS, DEFECTS, M_DEFECTS, JointSettings, WholeTable
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Modality, Span, TokenBatch, Vocabulary

NAMES = ("eos", "newline", "answer_pad", "boi", "eoi", "uncondition", "answer", "end_answer")
IDS_A = {name: 30 + i for i, name in enumerate(NAMES)}
VOCABULARY_A = Vocabulary(60, (0, 40), (40, 56), 29, specials=IDS_A)
IDS_M = {name: 20 + i for i, name in enumerate(SPECIALS)}
VOCABULARY_M = mmada_vocabulary(size=60, offset=41, codebook_size=16, mask_id=40, specials=IDS_M)
WORDS = {"a": [1], "red": [2], "fox": [3], "make": [4], "it": [5], "system": [9, 9], "user": [6], "assistant": [7]}
JOINT = JointSettings(8, 4, 1.5, 2.0)
TEXTS = ["make it red", "a red fox make it red"]
CODES = torch.arange(2 * 6).view(2, 2, 3) * 5 % 16
SQUARE = torch.arange(2 * 4).view(2, 2, 2) * 3 % 16


def encode(text: str) -> list[int]:
    return [i for word in text.split() for i in WORDS[word]]


A = LuminaLayout(
    VOCABULARY_A, encode, {name: [20 + i] for i, name in enumerate(MARKS)}, systems=("system",) * 3, joint=JOINT
)
M = MMaDALayout(VOCABULARY_M, encode, side=2, joint=replace(JOINT, text_guidance=0.5))
CONFIGS = {
    "A": (LLADA, {"vocab_size": 60, "mask_token_id": 29}),
    "M": (MMADA, {"new_vocab_size": 60}),
}
GIVEN: dict[str, dict[str, dict[str, Any]]] = {
    "A": {"edit": dict(codes=CODES, grid=(3, 2)), "generate": dict(grid=(2, 3))},
    "M": {"edit": dict(codes=SQUARE), "generate": {}},
}
LAYOUTS = {"A": A, "M": M}
BOTH = pytest.mark.parametrize("variant", LAYOUTS)
_MODELS: dict[tuple[str, str], MaskedTransformer] = {}


def model_of(variant: str, dtype: str = "float64") -> MaskedTransformer:
    if (variant, dtype) not in _MODELS:
        family, more = CONFIGS[variant]
        sizes = {"d_model": 24, "n_heads": 2, "n_kv_heads": 2, "n_layers": 2, "mlp_hidden_size": 40}
        torch.manual_seed(3)
        model = MaskedTransformer(**family.settings({**sizes, **more})).eval()
        for p in model.parameters():
            torch.nn.init.normal_(p, 1.0 if p.ndim == 1 else 0.0, 0.4)
        _MODELS[variant, dtype] = model.to(getattr(torch, dtype))
    return _MODELS[variant, dtype]


def request_for(variant: str, task: str, layout: Any = None, texts: Any = TEXTS, longest: int = 6, **more: Any) -> Any:
    given = {**GIVEN[variant][task], **more}
    given = {n: v[: len(texts)] if isinstance(v, Tensor) else v for n, v in given.items()}
    return request_of(layout or LAYOUTS[variant], task, texts=list(texts), longest=longest, told=True, **given)


class Spy:
    """A denoiser that keeps the ids that it sees."""

    def __init__(self, model: Any) -> None:
        self.model, self.seen = model, list[Tensor]()

    def hidden(self, ids: Tensor, *rest: Any) -> Tensor:
        self.seen.append(ids.clone())
        return self.model.hidden(ids, *rest)

    def head(self, *about: Any) -> Tensor:
        return self.model.head(*about)


class Loud:
    """A denoiser that says one id everywhere, where it may."""

    def __init__(self, model: Any, loud: int) -> None:
        self.model, self.loud, self.hidden = model, loud, model.hidden

    def head(self, features: Tensor, start: int, stop: int) -> Tensor:
        logits = self.model.head(features, start, stop).clone()
        if start <= self.loud < stop:
            logits[..., self.loud - start] += 1000
        return logits


def run(
    variant: str, request: DecodeRequest, layout: Any = None, policy: Any = None, seeds: Any = (1, 2), model: Any = None
) -> SamplerOutput:
    layout, model = layout or LAYOUTS[variant], model or model_of(variant)
    seeds, config = torch.tensor(seeds[: len(request.words)]), request.needs.keep_in(request.config)
    ready = layout.prepared(SimpleNamespace(transformer=model), request, config, seeds)
    sampler = Sampler(model, ready.vocabulary or layout.vocabulary, ready.config, policy, ready.rules)
    return sampler(request.batch, seeds, record=True, unconditional=request.unconditional)


def open_codes(request: DecodeRequest, out: SamplerOutput, mask: int) -> list[int]:
    """How many codes of the first row are masked after each pass, before the first one too."""
    return [int((ids[0, request.picture[0]] == mask).sum()) for ids in out.trajectory]


def open_words(request: DecodeRequest, out: SamplerOutput, mask: int) -> list[int]:
    return [int((ids[0, request.words[0]] == mask).sum()) for ids in out.trajectory]


# ------------------------------------------------------------------------------------------------------------- behaviour


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


# ----------------------------------------------------------------------------------------------------- defects, one by one


def with_defects(variant: str, *names: str, **joint: Any) -> Any:
    layout = LAYOUTS[variant]
    return replace(layout, compat=names, joint=replace(layout.joint, **joint))


def test_every_defect_is_named_once():
    assert set(A_DEFECTS) | set(M_DEFECTS) == set(DEFECTS)


@BOTH
def test_words_are_text_only_and_a_mask_is_never_said(variant):
    """`any_id`: codes and [MASK] are drawn as words, and a drawn [MASK] is neither written nor read."""
    vocabulary = LAYOUTS[variant].vocabulary
    code, mask = vocabulary.image[0] + 2, vocabulary.mask_id
    layout = with_defects(variant, "any_id", text_guidance=0.0)
    plain, other = (request_for(variant, "edit", own, texts=TEXTS[:1]) for own in (None, layout))
    for loud in (code, mask):
        words = run(variant, plain, model=Loud(model_of(variant), loud)).batch.ids[0, plain.words[0]]
        assert not torch.isin(words, torch.tensor([code, mask])).any()
    out = run(variant, other, layout, model=Loud(model_of(variant), code))
    assert set(out.batch.ids[0, other.words[0]].tolist()) == {code}
    out = run(variant, other, layout, model=Loud(model_of(variant), mask))
    assert open_words(other, out, mask) == [6] * (JOINT.steps + 2)  # every quota is used up without a word
    assert other.text_ids(out.batch.ids, vocabulary, ()) == [[]] and open_codes(other, out, mask)[-1] == 0
    assert not other.needs.stop_at_eos and other.needs.forbid == ()


def test_rows_of_guidance_are_made_anew():
    """`overwritten`: the stream without the picture holds all of its codes, and differs in one token."""
    layout = with_defects("A", "overwritten")
    plain, wrong = request_for("A", "edit"), request_for("A", "edit", layout)
    own = wrong.batch.ids
    for row in range(2):
        assert int((wrong.unconditional[1].ids[row] != own[row]).sum()) == 1
        codes = CODES[row].flatten() + 40
        assert torch.isin(codes, wrong.unconditional[1].ids[row]).all()
        assert not torch.isin(codes, plain.unconditional[1].ids[row]).any()
        words = wrong.unconditional[0].ids[row][wrong.batch.valid[row]].tolist()
        assert words[5] == IDS_A["uncondition"] and len(words) == int(wrong.batch.valid[row].sum())
        assert int(plain.unconditional[0].valid[row].sum()) == len(words) - len(encode(TEXTS[row])) + 1


def test_all_streams_see_the_same_words():
    """`late`: those of guidance see the words of the pass already."""
    for names, same in (((), True), (("late",), False)):
        layout = with_defects("A", *names)
        request, spy = request_for("A", "edit", layout, texts=TEXTS[:1]), Spy(model_of("A"))
        out = run("A", request, layout, model=spy)
        words, mask = request.words[0], 29
        guided = [n for n, call in enumerate(spy.seen) if len(call) > 1]
        assert len(guided) == 4 and {len(spy.seen[n]) for n in guided} == {3 if same else 2}
        for n in guided:
            first, *others = spy.seen[n][:, words] if same else (spy.seen[n - 1][0, words], *spy.seen[n][:, words])
            assert all(torch.equal(others[0], other) for other in others)
            assert torch.equal(first, others[0]) == (
                same or int((first == mask).sum()) == int((others[0] == mask).sum())
            )
        assert same or any(not torch.equal(spy.seen[n - 1][0, words], spy.seen[n][0, words]) for n in guided)
        assert not (out.batch.ids == mask).any()


@torch.no_grad()
def test_words_are_guided_away_from_no_prompt():
    """`inverted`: they are guided towards it."""
    for names, sign in (((), 1.0), (("inverted",), -1.0)):
        layout = with_defects("M", *names, steps=1, image_steps=1, text_guidance=2.5)
        request = request_for("M", "edit", layout, texts=TEXTS[:1])
        own, away = (
            model_of("M").head(model_of("M").hidden(b.ids, b.modality, b.positions), *VOCABULARY_M.text)[0]
            for b in (batch.hide_targets(VOCABULARY_M) for batch in (request.batch, *request.unconditional))
        )
        guided = own + sign * 2.5 * (own - away)
        guided[:, [*request.needs.forbid, VOCABULARY_M.mask_id]] = -torch.inf
        request = replace(request, needs=replace(request.needs, stop_at_eos=False))
        out = run("M", request, layout).batch.ids[0]
        assert torch.equal(out[request.words[0]], guided.argmax(-1)[request.words[0]])


def paint(variant: str, layout: Any) -> tuple[DecodeRequest, list[int]]:
    """A picture of which three codes are open."""
    codes = torch.arange(12).view(1, 3, 4)
    holes = torch.zeros_like(codes, dtype=torch.bool)
    holes[0, 0, :3] = True
    given = dict(codes=codes, holes=holes, grid=None)
    request = request_for(variant, "edit", layout, texts=TEXTS[:1], **given)
    return request, open_codes(request, run(variant, request, layout), layout.vocabulary.mask_id)


def test_known_codes_do_not_count_among_those_that_stay_hidden():
    """`all_counted`: of twelve codes of which three are open, one is filled in a pass as long as nine would be hidden."""
    for names, expected in (((), [3, 1, 0]), (("all_counted",), [3, 2, 0])):
        layout = with_defects("A", *names, steps=4, image_steps=2, first_pass=0.5)
        _, left = paint("A", layout)
        assert [n for i, n in enumerate(left) if i == 0 or n != left[i - 1]] == expected


def test_the_last_code_is_decoded():
    """`one_left`: it is random, another one for every seed."""
    plain, layout = request_for("A", "edit", texts=TEXTS[:1]), with_defects("A", "one_left")
    assert open_codes(plain, run("A", plain), 29)[JOINT.steps] == 0
    request, found = request_for("A", "edit", layout, texts=TEXTS[:1]), set()
    for seed in range(20):
        out = run("A", request, layout, seeds=(seed,))
        left = open_codes(request, out, 29)
        assert left[JOINT.steps] == 1 and left[-1] == 0
        place = (out.trajectory[JOINT.steps][0] == 29) & request.picture[0]
        found.add(int(out.batch.ids[0, place]))
    assert len(found) > 5 and min(found) >= 40 and max(found) < 56


def test_codes_are_not_drawn_at_temperature_0():
    """`always_drawn`: they are."""
    for names, count in (((), 1), (("always_drawn",), 6)):
        layout = with_defects("M", *names, temperature=0.0, guidance=0.0)
        request = request_for("M", "generate", layout, texts=TEXTS[:1])
        found = {tuple(run("M", request, layout, seeds=(s,)).batch.ids[0].tolist()) for s in range(6)}
        assert len(found) == count


def test_numbers_are_not_cut_off_by_rounding():
    """`rounded`: of twelve codes five stay and not six where the cosine is a half, and of ten words none where one should."""
    for names, codes, words in (((), 6, 1), (("rounded",), 5, 0)):
        layout = with_defects("A", *names, steps=6, image_steps=6, first_pass=0.0)
        request = request_for("A", "edit", layout, texts=TEXTS[:1], grid=(3, 4))
        assert open_codes(request, run("A", request, layout), 29)[4] == codes
        layout = with_defects("A", *names, steps=10, image_steps=1)
        request = request_for("A", "edit", layout, texts=TEXTS[:1], longest=10)
        request = replace(request, needs=replace(request.needs, stop_at_eos=False))
        assert open_words(request, run("A", request, layout), 29)[9] == words


def test_a_new_picture_begins_as_in_training():
    """`other_mark`: it begins as one of text-to-image."""
    for names, mark in (((), "t2it"), (("other_mark",), "t2i")):
        request = request_for("M", "generate", with_defects("M", *names), texts=TEXTS[:1])
        assert int(request.batch.ids[0][request.batch.valid[0]][0]) == IDS_M[mark]


def test_any_word_is_a_vocabulary_that_can_be_copied():
    import copy

    whole = WholeTable.from_dict(VOCABULARY_A.to_dict())
    assert whole.range_of(Modality.TEXT) == (0, 60) and whole.range_of(Modality.IMAGE) == (40, 56)
    assert copy.deepcopy(whole) == whole and whole.forbidden(Modality.TEXT) == ()


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
