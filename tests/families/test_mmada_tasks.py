"""MMaDA's tasks for `run_task`: the family's own rows and decoders, called in three lines."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from unidiff.decoding import Sampler
from unidiff.families.mmada import MMADA
from unidiff.families.mmada.prompts import QUESTION, MMaDAPrompts, mmada_batch
from unidiff.families.mmada.rows import MMaDARows
from unidiff.families.mmada.sampling import ImageSettings, answer_config, image_config
from unidiff.families.mmada.weights import SPECIALS, mmada_vocabulary
from unidiff.families.tasks import run_task
from unidiff.models.transformer import MaskedTransformer

TINY = {name: 20 + i for i, name in enumerate(SPECIALS)}
VOCABULARY = mmada_vocabulary(size=60, offset=41, codebook_size=16, mask_id=40, specials=TINY)
FIELDS = {"d_model": 32, "n_heads": 4, "n_kv_heads": 4, "n_layers": 2, "mlp_hidden_size": 48, "new_vocab_size": 60}
WORDS = {"a": 1, "fox": 2, "what": 3, "user": 4, "assistant": 5, "\n": 6, "<eot_id>": 7}


def encode(text: str) -> list[int]:
    parts = text.replace("\n", " \n ").replace("<eot_id>", " <eot_id>").split(" ")
    return [WORDS[part] for part in parts if part]


TEXT = answer_config(VOCABULARY, steps=4, block_length=2)
ROWS = MMaDARows(VOCABULARY, encode, text_length=6, side=2, image=ImageSettings(steps=3, temperature=0.0), text=TEXT)
CODES = torch.tensor([[[0, 1], [2, 3]], [[4, 5], [6, 7]]])


@pytest.fixture(scope="module")
def model() -> MaskedTransformer:
    torch.manual_seed(0)
    model = MaskedTransformer(**MMADA.settings(FIELDS)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def run(model, request, seeds=(5, 6)):
    return run_task(model, VOCABULARY, request, seeds)


def test_pictures_are_those_of_the_familys_rows(model):
    words = [[1, 2], [2]]
    prompts = MMaDAPrompts(VOCABULARY, 6)
    hidden = torch.full((2, 4), VOCABULARY.image_mask)
    rows = [prompts.text_to_image(texts, hidden) for texts in (words, [[], []])]
    batch, empty = (mmada_batch(r.ids, VOCABULARY, r.visible) for r in rows)
    sampler = Sampler(model, VOCABULARY, image_config(ROWS.image))
    done = sampler(batch, torch.tensor([5, 6]), unconditional=empty).batch.ids
    expected = (done[batch.targets] - VOCABULARY.image[0]).view(2, 4)
    drawn = run(model, ROWS.text_to_image(["a fox", "fox"]))
    assert torch.equal(torch.stack([code.flatten() for (code,) in drawn.codes]), expected)
    assert drawn.texts == [[], []]


def test_painting_keeps_known_codes(model):
    holes = torch.zeros_like(CODES, dtype=torch.bool)
    holes[:, 0] = True
    painted = run(model, ROWS.text_to_image(["a fox", "fox"], CODES, holes))
    assert all(torch.equal(code[1], given[1]) for (code,), given in zip(painted.codes, CODES, strict=True))


def test_answers_are_those_of_the_familys_decoder(model):
    texts = [[1, 2, 3], [4]]
    asked = MMaDAPrompts(VOCABULARY, 6).question(CODES.flatten(1) + VOCABULARY.image[0], texts, 4)
    expected = Sampler(model, VOCABULARY, TEXT)(asked, torch.tensor([5, 6]))
    result = run(model, ROWS.understand(CODES, texts, 4))
    assert torch.equal(result.output.batch.ids, expected.batch.ids)
    assert all(torch.equal(code, given) for (code,), given in zip(result.codes, CODES, strict=True))


def test_questions_are_put_into_the_template(model):
    s = VOCABULARY.specials
    ids = ROWS.ids("what")
    assert ids == [s["bos"], s["start_header"], 4, s["end_header"], 6, 3, 7, s["start_header"], 5, s["end_header"], 6]
    written = QUESTION.format("what").replace("<|start_header_id|>", "").replace("<|end_header_id|>", "")
    assert encode(written.replace("<eot_id>", "<eot_id> ")) == [i for i in ids if i < 20]
    chat = run(model, ROWS.chat(["what fox", [1, 2]], 4))
    ends = {s["eos"], s["eot"]}
    assert all(len(words) <= 4 and not ends & set(words) for words in chat.texts)


def test_a_row_does_not_depend_on_the_batch(model):
    requests = {
        "draw": lambda p, c: ROWS.text_to_image(p),
        "ask": lambda p, c: ROWS.understand(c, p, 4),
        "chat": lambda p, c: ROWS.chat(p, 4),
    }
    for build in requests.values():
        together = run(model, build([[1, 2, 3], [2]], CODES))
        for row in range(2):
            one = slice(row, row + 1)
            alone = run(model, build([[1, 2, 3], [2]][one], CODES[one]), [5 + row])
            assert alone.texts[0] == together.texts[row]
            assert all(torch.equal(a, b) for a, b in zip(alone.codes[0], together.codes[row], strict=True))


def test_words_and_picture_together(model):
    holes = torch.zeros_like(CODES, dtype=torch.bool)
    holes[:, :, 1] = True
    mask = VOCABULARY.mask_id
    result = run(model, ROWS.inpaint([[1, mask, 3], [mask]], CODES, holes))
    first, second = result.texts
    assert (first[0], first[2], len(first), len(second)) == (1, 3, 3, 1)
    assert mask not in first + second and not set(TINY.values()) & set(first + second)
    assert all(torch.equal(code[:, 0], given[:, 0]) for (code,), given in zip(result.codes, CODES, strict=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: r.text_to_image(["a"], CODES), "codes and holes belong together"),
        (lambda r: r.text_to_image([" "]), "prompt is empty"),
        (lambda r: r.inpaint([[1]], CODES, torch.ones_like(CODES, dtype=torch.bool)), "codes have shape"),
        (lambda r: replace(r, encode=None).chat(["fox"]), "have no tokenizer"),
    ],
)
def test_errors_are_one_clear_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call(ROWS)
