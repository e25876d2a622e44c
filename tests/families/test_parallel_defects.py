"""Defects of MMaDA-Parallel's programs, each on and off."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from parallel_parts import (
    BOTH,
    CODES,
    IDS_A,
    IDS_M,
    JOINT,
    LAYOUTS,
    TEXTS,
    VOCABULARY_A,
    VOCABULARY_M,
    Loud,
    Spy,
    encode,
    model_of,
    open_codes,
    open_words,
    request_for,
    run,
)

from unidiff.families.layout import DecodeRequest
from unidiff.families.parallel import A_DEFECTS, DEFECTS, M_DEFECTS, WholeTable
from unidiff.tokens import Modality


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
