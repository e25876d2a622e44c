"""Lumina-DiMOO's tasks on a tiny random model: the reference's rows, any size, two-way guidance, batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from decode_layout import decode, decode_request, request_of
from reference.batches import lumina_pair

from unidiff.decoding import Guidance, ModalityDecoding, SamplerConfig
from unidiff.decoding.cache import DualCache, MaxLogitCache, NoCache
from unidiff.families.llada import LLADA
from unidiff.families.lumina import MARKS, LuminaLayout, lumina_grid, lumina_image_sampler
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Modality, Vocabulary

NAMES = ("eos", "newline", "answer_pad", "boi", "eoi", "uncondition", "answer", "end_answer")
SPECIALS = {name: 30 + i for i, name in enumerate(NAMES)}
VOCABULARY = Vocabulary(60, (0, 40), (40, 56), 29, specials=SPECIALS)
CONFIG = {"d_model": 16, "n_layers": 2, "n_heads": 2, "mlp_hidden_size": 24, "vocab_size": 60, "mask_token_id": 29}
WORDS = {"a": [1], "red": [2], "fox": [3], "bluer": [4], "what": [5], "system": [9, 9]}


def encode(text: str) -> list[int]:
    return [i for word in text.split() for i in WORDS[word]]


ROWS = LuminaLayout(
    VOCABULARY,
    encode,
    marks={name: [20 + i] for i, name in enumerate(MARKS)},
    image=lumina_image_sampler(steps=4),
    edits=lumina_image_sampler(4, 1.5, 2.0),
    systems=("system",) * 3,
)


@pytest.fixture(scope="module")
def model() -> MaskedTransformer:
    torch.manual_seed(1)
    model = MaskedTransformer(**LLADA.settings(CONFIG)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return model


def codes_of(rows: int, height: int, width: int) -> torch.Tensor:
    return torch.arange(rows * height * width).view(rows, height, width) % 16


def run(model, task, seeds=(1, 2), policy=None, rows=ROWS, **inputs):
    return decode(model, rows, task, seeds, policy, **inputs)


def test_rows_are_the_references(model):
    s = SPECIALS
    request = request_of(ROWS, "text_to_image", texts=["a red fox"], grid=(2, 3))
    lines = [*[29] * 3, s["newline"]] * 2
    prompt = [20, 9, 9, 21, 22, 1, 2, 3, 23]
    ids = torch.tensor([[*prompt, s["answer"], s["boi"], *lines, s["eoi"], s["end_answer"]]])
    prefix = torch.tensor([[20, 9, 9, 21, 22, s["uncondition"], 23]])
    for ours, theirs in zip(
        (request.batch, *request.unconditional), lumina_pair(ids, prefix, 11, VOCABULARY), strict=True
    ):
        for name in ("valid", "given", "sample_ids", "modality"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        assert torch.equal(ours.ids[ours.valid], theirs.ids[theirs.valid])
        assert torch.equal(ours.positions[..., 0], theirs.positions[..., 0])


@pytest.mark.parametrize(
    ("picture", "pixels", "grid"),
    [
        ((512, 512), 512, (32, 32)),
        ((3000, 3000), 1024, (64, 64)),
        ((768, 1024), 512, (28, 36)),
        ((10, 900), 512, (16, 64)),
    ],
)
def test_the_crop_keeps_the_shape_of_a_picture(picture, pixels, grid):
    rows, columns = lumina_grid(*picture, pixels)
    assert (rows, columns) == grid and lumina_grid(*picture[::-1], pixels) == grid[::-1]
    assert rows % 2 == columns % 2 == 0 and rows * columns * 256 <= pixels**2
    with pytest.raises(ValueError, match="multiple of 32"):
        lumina_grid(*picture, pixels + 1)


@pytest.mark.parametrize("size", [(2, 3), (4, 1)])
def test_pictures_of_any_size(model, size):
    codes = run(model, "text_to_image", texts=["a fox", "fox"], grid=size).codes
    assert codes.shape == (2, *size) and 0 <= int(codes.min()) <= int(codes.max()) < 16


def test_painting_inside_and_around_keeps_the_rest(model):
    codes = codes_of(2, 3, 4)
    inside = torch.zeros(2, 3, 4, dtype=torch.bool)
    inside[:, 1, 1:3] = True
    for holes in (inside, ~inside):
        result = run(model, "inpaint", texts=["a fox", "fox"], codes=codes, holes=holes)
        assert torch.equal(result.codes[~holes], codes[~holes])


@torch.no_grad()
def test_editing_is_guided_in_two_directions(model):
    """One greedy pass equals c + a (c - no words) + b (c - no picture) from three separate forwards."""
    codes, a, b = codes_of(2, 2, 2), 2.5, 4.0
    greedy = ModalityDecoding(steps=1, temperature=0.0)
    rows = replace(ROWS, edits=replace(lumina_image_sampler(guidance=a, image_guidance=b), image=greedy))
    request = request_of(rows, "edit", codes=codes, texts=["a bluer fox", "red"], grid=(2, 3))
    without_words = request_of(rows, "text_to_image", texts=["a"], grid=(2, 3))  # for its length only
    assert len(request.unconditional) == 2 and request.batch.shape == request.unconditional[1].shape
    assert request.unconditional[1].valid[1].sum() == without_words.batch.valid[0].sum()  # the pictures are gone

    def logits(batch):
        batch = batch.hide_targets(VOCABULARY)
        hidden = model.hidden(batch.ids, batch.modality, batch.positions, batch.attention_mask())
        return model.head(hidden[batch.targets].view(2, 6, -1), *VOCABULARY.image)

    cond, no_words, no_picture = (logits(x) for x in (request.batch, *request.unconditional))
    expected = (cond + a * (cond - no_words) + b * (cond - no_picture)).argmax(-1)
    assert torch.equal(decode_request(model, rows, request).codes.flatten(1), expected)
    one_way = replace(request.config, guidance=Guidance(1 + a, further=(1.0,)))
    only_words = decode_request(model, rows, request, config=one_way)
    assert torch.equal(only_words.codes.flatten(1), (cond + a * (cond - no_words)).argmax(-1))


def test_editing_a_part_with_a_reference_picture(model):
    rows = replace(ROWS, edits=lumina_image_sampler(steps=3, guidance=1.0, image_guidance=1.0))
    codes, holes = codes_of(1, 3, 3), torch.zeros(1, 3, 3, dtype=torch.bool)
    holes[0, 0] = True
    given = dict(codes=codes, texts=["red"], references=codes_of(1, 2, 2), holes=holes)
    result = run(model, "edit", [4], rows=rows, **given)
    pictures = result.request.batch.modality == Modality.IMAGE
    assert int(pictures.sum()) == 9 + 4 + 9 and result.codes.shape == (1, 3, 3)
    assert torch.equal(result.codes[0, 1:], codes[0, 1:])


def test_answers_end_and_hold_text_only(model):
    result = run(model, "answer", codes=codes_of(2, 2, 3), texts=["what fox", "what"], longest=6)
    for words in result.texts:
        assert len(words) <= 6 and all(i < 30 and i != 29 for i in words)
    assert torch.equal(result.codes, codes_of(2, 2, 3))


def test_words_and_picture_together(model):
    codes = codes_of(2, 2, 2)
    holes = torch.zeros_like(codes, dtype=torch.bool)
    holes[:, 0] = True
    result = run(model, "inpaint", texts=["a<mask>fox", "<mask>"], codes=codes, holes=holes)
    first, second = result.texts
    assert (first[0], first[2], len(first), len(second)) == (1, 3, 3, 1) and 29 not in first + second
    assert torch.equal(result.codes[:, 1], codes[:, 1])


def test_a_negative_prompt_takes_the_place_of_no_words(model):
    given = dict(texts=["a fox", "red"], grid=(2, 2))
    plain, away = (run(model, "text_to_image", negative=n, **given) for n in (["", ""], ["a red fox", ""]))
    assert torch.equal(plain.codes, run(model, "text_to_image", **given).codes)
    assert torch.equal(plain.codes[1], away.codes[1])
    assert not torch.equal(plain.output.confidence, away.output.confidence)


def test_a_callers_settings_lose_nothing_that_a_task_needs():
    kept = request_of(ROWS, "answer", codes=codes_of(1, 2, 2), texts=["a"]).needs.keep_in(SamplerConfig(ends=(3,)))
    ends = {SPECIALS["end_answer"], SPECIALS["answer_pad"]}
    assert set(kept.ends) == {3, *ends} and set(kept.text.forbid) == set(SPECIALS.values()) - ends - {SPECIALS["eos"]}
    holes = request_of(ROWS, "inpaint", codes=codes_of(1, 2, 2), texts=["<mask>"]).needs.keep_in(SamplerConfig())
    assert {*ends, SPECIALS["eos"]} <= set(holes.text.forbid) and not holes.stop_at_eos


TASKS = {
    "text_to_image": lambda texts, codes: dict(texts=texts, grid=(2, 3)),
    "edit": lambda texts, codes: dict(texts=texts, codes=codes),
    "answer": lambda texts, codes: dict(texts=texts, codes=codes, longest=5),
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    "policy", [NoCache(), DualCache(interval=1), MaxLogitCache(interval=1)], ids=lambda p: type(p).__name__
)
def test_a_row_does_not_depend_on_the_batch_or_on_a_fresh_cache(model, task, policy):
    texts, codes = ["a red fox", "what"], codes_of(2, 2, 3)
    together = run(model, task, policy=policy, **TASKS[task](texts, codes))
    for row in range(2):
        one = slice(row, row + 1)
        alone = run(model, task, [row + 1], **TASKS[task](texts[one], codes[one]))
        assert alone.texts[0] == together.texts[row] and torch.equal(alone.codes[0], together.codes[row])


@pytest.mark.parametrize(
    ("task", "given", "message"),
    [
        (
            "edit",
            dict(texts=["a"], codes=codes_of(1, 2, 2), grid=(3, 3), holes=torch.ones(1, 2, 2, dtype=torch.bool)),
            "give either the size",
        ),
        ("inpaint", dict(codes=codes_of(1, 2, 2)), "needs the caption of the picture"),
        ("chat", dict(turns=["a"]), "lumina cannot do 'chat'; it does text_to_image, caption, answer, inpaint, edit"),
    ],
)
def test_errors_are_one_clear_sentence(task, given, message):
    with pytest.raises(ValueError, match=message):
        request_of(ROWS, task, **given)
