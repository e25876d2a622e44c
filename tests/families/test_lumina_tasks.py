"""Lumina-DiMOO's tasks on a tiny random model: the reference's rows, any size, two-way guidance, batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from reference.batches import lumina_pair

from unidiff.decoding import Guidance, ModalityDecoding
from unidiff.decoding.cache import DualCache, MaxLogitCache, NoCache
from unidiff.families.llada import LLADA
from unidiff.families.lumina.grid import lumina_grid
from unidiff.families.lumina.rows import MARKS, LuminaRows, lumina_image_sampler
from unidiff.families.tasks import run_task
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Vocabulary

NAMES = ("eos", "newline", "answer_pad", "boi", "eoi", "uncondition", "answer", "end_answer")
SPECIALS = {name: 30 + i for i, name in enumerate(NAMES)}
VOCABULARY = Vocabulary(60, (0, 40), (40, 56), 29, specials=SPECIALS)
CONFIG = {"d_model": 16, "n_layers": 2, "n_heads": 2, "mlp_hidden_size": 24, "vocab_size": 60, "mask_token_id": 29}
WORDS = {"a": 1, "red": 2, "fox": 3, "bluer": 4, "what": 5}
SYSTEM = [9, 9]


def encode(text: str) -> list[int]:
    return [WORDS[word] for word in text.split()]


ROWS = LuminaRows(
    VOCABULARY,
    encode,
    marks={name: [20 + i] for i, name in enumerate(MARKS)},
    image=lumina_image_sampler(steps=4),
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


def run(model, request, seeds, policy=None):
    return run_task(model, VOCABULARY, request, seeds, policy)


def test_rows_are_the_references(model):
    s = SPECIALS
    request = ROWS.text_to_image(["a red fox"], size=(2, 3), system=SYSTEM)
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
    result = run(model, ROWS.text_to_image(["a fox", "fox"], size=size, system=SYSTEM), [1, 2])
    for (code,) in result.codes:
        assert code.shape == size and 0 <= int(code.min()) <= int(code.max()) < 16


def test_painting_inside_and_around_keeps_the_rest(model):
    codes = codes_of(2, 3, 4)
    inside = torch.zeros(2, 3, 4, dtype=torch.bool)
    inside[:, 1, 1:3] = True
    for holes in (inside, ~inside):
        result = run(model, ROWS.text_to_image(["a fox", "fox"], codes=codes, holes=holes, system=SYSTEM), [1, 2])
        for (painted,), given, hole in zip(result.codes, codes, holes, strict=True):
            assert torch.equal(painted[~hole], given[~hole])


@torch.no_grad()
def test_editing_is_guided_in_two_directions(model):
    """One greedy pass equals c + a (c - no words) + b (c - no picture) from three separate forwards."""
    codes, a, b = codes_of(2, 2, 2), 2.5, 4.0
    greedy = ModalityDecoding(steps=1, temperature=0.0)
    config = replace(lumina_image_sampler(guidance=a, image_guidance=b), image=greedy)
    rows = replace(ROWS, image=config)
    request = rows.edit(codes, ["a bluer fox", "red"], size=(2, 3), system=SYSTEM)
    without_words = rows.text_to_image(["a"], size=(2, 3), system=SYSTEM)  # for its length only
    assert len(request.unconditional) == 2 and request.batch.shape == request.unconditional[1].shape
    assert request.unconditional[1].valid[1].sum() == without_words.batch.valid[0].sum()  # the pictures are gone

    def logits(batch):
        batch = batch.hide_targets(VOCABULARY)
        hidden = model.hidden(batch.ids, batch.modality, batch.positions, batch.attention_mask())
        return model.head(hidden[batch.targets].view(2, 6, -1), *VOCABULARY.image)

    cond, no_words, no_picture = (logits(x) for x in (request.batch, *request.unconditional))
    expected = (cond + a * (cond - no_words) + b * (cond - no_picture)).argmax(-1)
    result = run(model, request, [1, 2])
    assert torch.equal(torch.stack([c[-1].flatten() for c in result.codes]), expected)
    assert all(torch.equal(c[0], given) for c, given in zip(result.codes, codes, strict=True))
    only_words = run(
        model, replace(request, config=replace(request.config, guidance=Guidance(1 + a, further=(1.0,)))), [1, 2]
    )
    assert torch.equal(
        torch.stack([c[-1].flatten() for c in only_words.codes]), (cond + a * (cond - no_words)).argmax(-1)
    )


def test_editing_a_part_with_a_reference_picture(model):
    rows = replace(ROWS, image=lumina_image_sampler(steps=3, guidance=1.0, image_guidance=1.0))
    codes, holes = codes_of(1, 3, 3), torch.zeros(1, 3, 3, dtype=torch.bool)
    holes[0, 0] = True
    result = run(model, rows.edit(codes, ["red"], references=codes_of(1, 2, 2), holes=holes, system=SYSTEM), [4])
    assert [tuple(code.shape) for code in result.codes[0]] == [(3, 3), (2, 2), (3, 3)]
    assert torch.equal(result.codes[0][2][1:], codes[0, 1:])


def test_answers_end_and_hold_text_only(model):
    result = run(model, ROWS.understand(codes_of(2, 2, 3), ["what fox", "what"], 6, system=SYSTEM), [1, 2])
    for words in result.texts:
        assert len(words) <= 6 and all(i < 30 and i != 29 for i in words)
    assert all(torch.equal(code, given) for (code,), given in zip(result.codes, codes_of(2, 2, 3), strict=True))


def test_words_and_picture_together(model):
    codes = codes_of(2, 2, 2)
    holes = torch.zeros_like(codes, dtype=torch.bool)
    holes[:, 0] = True
    result = run(model, ROWS.inpaint([[1, 29, 3], [29]], codes, holes, system=SYSTEM), [1, 2])
    first, second = result.texts
    assert (first[0], first[2], len(first), len(second)) == (1, 3, 3, 1) and 29 not in first + second
    assert all(torch.equal(code[1], given[1]) for (code,), given in zip(result.codes, codes, strict=True))


REQUESTS = {
    "draw": lambda prompts, codes: ROWS.text_to_image(prompts, size=(2, 3), system=SYSTEM),
    "edit": lambda prompts, codes: replace(ROWS, image=lumina_image_sampler(4, 1.5, 2.0)).edit(
        codes, prompts, system=SYSTEM
    ),
    "ask": lambda prompts, codes: ROWS.understand(codes, prompts, 5, system=SYSTEM),
}


@pytest.mark.parametrize("task", REQUESTS)
@pytest.mark.parametrize(
    "policy", [NoCache(), DualCache(interval=1), MaxLogitCache(interval=1)], ids=lambda p: type(p).__name__
)
def test_a_row_does_not_depend_on_the_batch_or_on_a_fresh_cache(model, task, policy):
    prompts, codes = ["a red fox", "what"], codes_of(2, 2, 3)
    together = run(model, REQUESTS[task](prompts, codes), [1, 2], policy)
    for row in range(2):
        one = slice(row, row + 1)
        alone = run(model, REQUESTS[task](prompts[one], codes[one]), [row + 1])
        assert alone.texts[0] == together.texts[row]
        assert torch.equal(alone.codes[0][-1], together.codes[row][-1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: r.text_to_image(["a"]), "give either the size"),
        (lambda r: r.text_to_image(["a"], size=(0, 2), system=SYSTEM), "size is"),
        (lambda r: r.text_to_image(["a"], codes=codes_of(1, 2, 2)), "holes given: False"),
        (lambda r: r.text_to_image([" "], size=(2, 2), system=SYSTEM), "prompt is empty"),
        (lambda r: r.edit(codes_of(2, 2, 2), ["a"]), "1 prompts for 2 pictures"),
        (lambda r: r.edit(codes_of(1, 2, 2), ["a"], system=SYSTEM), "guided in two directions"),
        (lambda r: r.understand(codes_of(2, 2, 2), ["a"]), "1 questions for 2 pictures"),
        (
            lambda r: replace(r, marks=None, encode=None).understand(codes_of(1, 2, 2), [[1]], system=SYSTEM),
            "needs ids",
        ),
    ],
)
def test_errors_are_one_clear_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call(ROWS)
