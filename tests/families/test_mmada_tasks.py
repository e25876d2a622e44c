"""MMaDA's tasks: the family's own rows and decoders through the one sampler."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from decode_layout import decode, request_of
from reference.mmada_prompts import QUESTION, MMaDAPrompts, mmada_batch

from unidiff.decoding import Sampler
from unidiff.families.layout import TaskInputs
from unidiff.families.llada.rows import llada_sampler
from unidiff.families.mmada import MMADA, SPECIALS, ImageSettings, MMaDALayout, image_config, mmada_vocabulary
from unidiff.models.transformer import MaskedTransformer

TINY = {name: 20 + i for i, name in enumerate(SPECIALS)}
VOCABULARY = mmada_vocabulary(size=60, offset=41, codebook_size=16, mask_id=40, specials=TINY)
FIELDS = {"d_model": 32, "n_heads": 4, "n_kv_heads": 4, "n_layers": 2, "mlp_hidden_size": 48, "new_vocab_size": 60}
WORDS = {"a": 1, "fox": 2, "what": 3, "user": 4, "assistant": 5, "\n": 6, "<eot_id>": 7}


def encode(text: str) -> list[int]:
    parts = text.replace("\n", " \n ").replace("<eot_id>", " <eot_id>").split(" ")
    return [WORDS[part] for part in parts if part]


TEXT = llada_sampler(VOCABULARY, steps=4, block_length=2)
ROWS = MMaDALayout(VOCABULARY, encode, text_length=6, side=2, image=ImageSettings(steps=3, temperature=0.0), text=TEXT)
CODES = torch.tensor([[[0, 1], [2, 3]], [[4, 5], [6, 7]]])


@pytest.fixture(scope="module")
def model() -> MaskedTransformer:
    torch.manual_seed(0)
    model = MaskedTransformer(**MMADA.settings(FIELDS)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def run(model, task, seeds=(5, 6), **inputs):
    return decode(model, ROWS, task, seeds, **inputs)


def test_pictures_are_those_of_the_familys_rows(model):
    words = [[1, 2], [2]]
    prompts = MMaDAPrompts(VOCABULARY, 6)
    hidden = torch.full((2, 4), VOCABULARY.image_mask)
    rows = [prompts.text_to_image(texts, hidden) for texts in (words, [[], []])]
    batch, empty = (mmada_batch(r.ids, VOCABULARY, r.visible) for r in rows)
    sampler = Sampler(model, VOCABULARY, image_config(ROWS.image))
    done = sampler(batch, torch.tensor([5, 6]), unconditional=empty).batch.ids
    expected = (done[batch.targets] - VOCABULARY.image[0]).view(2, 4)
    drawn = run(model, "text_to_image", texts=["a fox", "fox"])
    assert torch.equal(drawn.codes.flatten(1), expected) and drawn.texts == words
    for ours, theirs in ((drawn.request.batch, batch), (drawn.request.unconditional[0], empty)):
        for own, other in zip(ours.ids, theirs.ids, strict=True):  # but for padding, the reference's rows
            assert own[own != 0].tolist() == other[other != VOCABULARY.specials["ipad"]].tolist()


def test_painting_keeps_known_codes(model):
    holes = torch.zeros_like(CODES, dtype=torch.bool)
    holes[:, 0] = True
    painted = run(model, "inpaint", texts=["a fox", "fox"], codes=CODES, holes=holes)
    assert torch.equal(painted.codes[:, 1], CODES[:, 1])


def test_answers_are_those_of_the_familys_decoder(model):
    texts = ["what a fox", "fox"]
    asked = MMaDAPrompts(VOCABULARY, 20).question(CODES.flatten(1) + VOCABULARY.image[0], [*map(ROWS.ids, texts)], 4)
    expected = Sampler(model, VOCABULARY, TEXT)(asked, torch.tensor([5, 6]))
    result = run(model, "answer", codes=CODES, texts=texts, longest=4)
    assert torch.equal(result.request.batch.ids, asked.ids)
    ends = {VOCABULARY.specials["eos"], VOCABULARY.specials["eot"]}
    for ids, own, n in zip(expected.batch.ids, result.texts, asked.valid.sum(1), strict=True):
        answer = ids[int(n) - 4 : int(n)].tolist()
        assert own == answer[: next((k for k, i in enumerate(answer) if i in ends), 4)]
    assert torch.equal(result.codes, CODES)


def test_questions_are_put_into_the_template(model):
    s = VOCABULARY.specials
    ids = ROWS.ids("what")
    assert ids == [s["bos"], s["start_header"], 4, s["end_header"], 6, 3, 7, s["start_header"], 5, s["end_header"], 6]
    written = QUESTION.format("what").replace("<|start_header_id|>", "").replace("<|end_header_id|>", "")
    assert encode(written.replace("<eot_id>", "<eot_id> ")) == [i for i in ids if i < 20]
    chat = run(model, "chat", turns=["what fox", "a"], longest=4)
    ends = {s["eos"], s["eot"]}
    assert all(len(words) <= 4 and not ends & set(words) for words in chat.texts)


def test_a_row_does_not_depend_on_the_batch(model):
    texts = ["what a fox", "fox"]
    for task, given in (
        ("text_to_image", {"texts": texts}),
        ("answer", {"texts": texts, "codes": CODES, "longest": 4}),
        ("chat", {"turns": texts, "longest": 4}),
    ):
        together = run(model, task, **given)
        for row in range(2):
            own = {n: v if isinstance(v, int) else v[row : row + 1] for n, v in given.items()}
            alone = run(model, task, [5 + row], **own)
            assert alone.texts[0] == together.texts[row] and torch.equal(alone.codes[0], together.codes[row])


def test_words_and_picture_together(model):
    holes = torch.zeros_like(CODES, dtype=torch.bool)
    holes[:, :, 1] = True
    result = run(model, "inpaint", texts=["a<mask>fox", "<mask>"], codes=CODES, holes=holes)
    first, second = result.texts
    assert (first[0], first[2], len(first), len(second)) == (1, 2, 3, 1)
    assert VOCABULARY.mask_id not in first + second and not set(TINY.values()) & set(first + second)
    assert torch.equal(result.codes[:, :, 0], CODES[:, :, 0])


def test_a_callers_settings_lose_nothing_that_a_task_needs():
    """Marks of prompts are never written, and answers end at an end of turn."""
    s = VOCABULARY.specials
    for task, given in (("answer", {"texts": ["fox"], "codes": CODES[:1]}), ("chat", {"turns": ["fox"]})):
        kept = request_of(ROWS, task, **given).needs.keep_in(TEXT.from_dict({"ends": [3]}))
        assert set(kept.ends) == {3, s["eot"]} and set(kept.text.forbid) == set(s.values()) - {s["eos"], s["eot"]}


@pytest.mark.parametrize(
    ("task", "given", "message"),
    [
        ("inpaint", dict(texts=["a <mask>"], codes=CODES[:1, :1]), "codes have shape"),
        ("text_to_image", dict(texts=["a " * 5]), "needs 7 tokens and 6 fit; shorten it"),
        ("inpaint", dict(codes=CODES), "needs the caption of the picture"),
    ],
)
def test_errors_are_one_clear_sentence(task, given, message):
    with pytest.raises(ValueError, match=message):
        request_of(ROWS, task, **given)


def test_the_order_of_the_program_comes_back_with_compat(model):
    """Three of four codes in two passes: half of the three are left, and in the program half of all four."""
    codes, kept = torch.arange(4).view(1, 2, 2), {}
    for compat in (None, "upstream", "picture_order"):
        layout = replace(ROWS, compat=compat, image=ImageSettings(steps=2, schedule="linear", guidance=0.0))
        request = layout.request("inpaint", TaskInputs(1, ["a"], codes=codes, holes=codes > 0))
        ready = layout.prepared(SimpleNamespace(transformer=model), request, request.config, torch.tensor([1]))
        sampler = Sampler(model, VOCABULARY, ready.config, rules=dict(ready.rules))
        out = sampler(ready.request.batch, torch.tensor([1]), record=True)
        kept[compat] = [int((ids == VOCABULARY.mask_id).sum()) for ids in out.trajectory]
    assert kept == {None: [3, 1, 0], "upstream": [3, 2, 0], "picture_order": [3, 2, 0]}
    with pytest.raises(ValueError, match="compat is 'order'; expected None, 'upstream', or some of"):
        replace(ROWS, compat="order")
