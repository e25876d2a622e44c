"""Every task of the pipeline: exactness of known tokens, batches, seeds, options, and one sentence per mistake."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipeline import GRID, SIZE, TEXT_LENGTH, tiny_pipeline

from unidiff.decoding import Guidance, ModalityDecoding, NoCache, SamplerConfig
from unidiff.families.layout import TaskInputs
from unidiff.tokens import Modality, TokenBatch

HEIGHT, WIDTH = SIZE


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def pictures(pipe):
    """Two different pictures."""
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)) for _ in range(2)]


def hole(*box: int) -> Image.Image:
    """A mask with one white box (left, top, right, bottom)."""
    mask = Image.new("L", (WIDTH, HEIGHT))
    mask.paste(255, box)
    return mask


def encode(pipe, *pictures):
    return pipe.images.encode(pipe.image_inputs.images(list(pictures)))


def test_text_to_image_keeps_the_prompt_and_draws_codes(pipe):
    result = pipe.text_to_image(["a dog", "two cats"], num_images_per_prompt=2, generator=0)
    assert result.texts == ["a dog", "a dog", "two cats", "two cats"]
    assert [image.size for image in result.images] == [(WIDTH, HEIGHT)] * 4
    assert result.codes.shape == (4, *GRID) and result.codes.min() >= 0 and result.codes.max() < 16
    assert result.ids[0, 0] == pipe.texts.special("caption")
    assert (result.confidences[:, :TEXT_LENGTH] == 1).all() and (result.confidences[:, TEXT_LENGTH:] < 1).all()
    assert len(set(map(tuple, result.codes.flatten(1).tolist()))) == 4  # rows have noise of their own
    assert result.nfe > 0 and result.seconds > 0 and result.trajectory is None


def test_each_row_of_a_batch_is_the_row_alone(pipe, pictures):
    prompts = ["a dog", "two cats on a red background", "an owl"]
    batch = pipe.text_to_image(prompts, generator=7)
    for row, prompt in enumerate(prompts):
        alone = pipe.text_to_image(prompt, generator=[int(batch.seeds[row])])
        assert torch.equal(alone.ids[0], batch.ids[row])
    questions = ["what?", "what is in the picture?"]  # of different lengths: padding inside the rows
    options = {"max_text_tokens": 3, "temperature": 1.0, "guidance_scale": 1.5}
    batch = pipe.answer(pictures, questions, generator=7, **options)
    for row in range(2):
        alone = pipe.answer(pictures[row], questions[row], generator=[int(batch.seeds[row])], **options)
        assert alone.text_ids == [batch.text_ids[row]] and alone.texts == [batch.texts[row]]


def test_caption_sees_the_picture_and_stops_at_end_of_text(pipe, pictures):
    result = pipe.caption(pictures, generator=1, temperature=1.0)
    assert [i.tobytes() for i in result.images] == [i.tobytes() for i in pictures]  # as they were given
    assert torch.equal(result.codes, encode(pipe, *pictures).cpu())
    eos = pipe.texts.eos_id
    for row, ids in zip(result.ids, result.text_ids, strict=True):
        body = row[1:TEXT_LENGTH].tolist()
        assert ids == (body[: body.index(eos)] if eos in body else body)
    never = {pipe.texts.special(name) for name in ("caption", "question", "answer")}
    assert not never & set(result.ids[:, 1:TEXT_LENGTH].flatten().tolist())
    short = pipe.caption(pictures, max_text_tokens=2, generator=1)
    assert all(len(ids) <= 2 for ids in short.text_ids)


def test_caption_that_ends_at_once_is_empty(pipe, pictures):
    others = tuple(i for i in range(pipe.texts.size) if i != pipe.texts.eos_id)
    result = pipe.caption(pictures[0], sampler=SamplerConfig(text=ModalityDecoding(forbid=others)))
    assert result.texts == [""] and result.text_ids == [[]]
    assert (result.ids[0, 1:TEXT_LENGTH] == pipe.texts.eos_id).all()


def test_answer_returns_the_answer_alone_and_broadcasts(pipe, pictures):
    result = pipe.answer(pictures[0], ["what?", "two cats?"], generator=2, temperature=1.0)
    assert len(result.texts) == 2
    for ids, row, question in zip(result.text_ids, result.ids, ["what?", "two cats?"], strict=True):
        start = len(pipe.texts.encode(question)) + 2
        assert row[start - 1] == pipe.texts.special("answer")
        assert row[start : start + len(ids)].tolist() == ids
    same = pipe.answer(pictures, "what?", generator=2)
    assert len(same.texts) == 2


def test_inpaint_keeps_every_known_token(pipe, pictures):
    before = encode(pipe, pictures[0])[0]
    mask = hole(9, 0, 10, 1)  # one pixel hides the code of cell (0, 1), and no other
    result = pipe.inpaint(
        pictures[0], mask, "a <mask> on a <mask:2>", generator=3, temperature=1.0, num_images_per_prompt=8
    )
    known = torch.ones(GRID, dtype=torch.bool)
    known[0, 1] = False
    assert (result.codes[:, known] == before[known]).all()
    assert len(set(result.codes[:, 0, 1].tolist())) > 1
    words = [pipe.texts.special("caption"), *pipe.texts.encode("a"), None, *pipe.texts.encode(" on a"), None, None]
    for row in result.ids:
        for place, word in enumerate(words):
            assert word is None or row[place] == word
        assert pipe.texts.eos_id not in row[: len(words)].tolist()  # holes have a fixed number of tokens
        assert (row[len(words) : TEXT_LENGTH] == pipe.texts.eos_id).all()
    assert len(set(result.texts)) > 1 and all(" on a" in text for text in result.texts)


def test_inpaint_alone_in_text_or_in_the_picture(pipe, pictures):
    words_only = pipe.inpaint(pictures[0], None, "a <mask>", generator=0)
    assert torch.equal(words_only.codes, encode(pipe, pictures[0]).cpu())
    picture_only = pipe.inpaint(pictures, hole(0, 0, 24, 8), "a dog", generator=0)
    assert picture_only.texts == ["a dog"] * 2
    assert torch.equal(picture_only.codes[:, 1], encode(pipe, *pictures)[:, 1].cpu())
    unknown_words = pipe.inpaint(pictures[0], hole(0, 0, 8, 8), generator=0, max_text_tokens=3)
    assert len(unknown_words.text_ids[0]) <= 3


def test_paste_back_keeps_the_pixels_outside_the_mask(pipe, pictures):
    result = pipe.inpaint(pictures, hole(8, 0, 16, 8), "a dog", generator=0, paste_back=True, num_images_per_prompt=2)
    for image, original in zip(result.images, [pictures[0]] * 2 + [pictures[1]] * 2, strict=True):
        same = (np.asarray(image) == np.asarray(original)).all(-1)
        outside = np.ones((HEIGHT, WIDTH), bool)
        outside[0:8, 8:16] = False
        assert same[outside].all() and not same[~outside].all()
    plain = pipe.inpaint(pictures, hole(8, 0, 16, 8), "a dog", generator=0)
    assert (np.asarray(plain.images[0]) != np.asarray(pictures[0])).any()  # the tokenizer's own pixels


def test_generate_from_nothing_from_words_and_from_a_picture(pipe, pictures):
    free = pipe.generate(generator=4, num_images_per_prompt=3)
    assert len(set(map(tuple, free.ids.tolist()))) == 3
    some = pipe.generate("two <mask> on", generator=4)
    assert some.texts[0].startswith("two") and some.texts[0].endswith(" on")
    described = pipe.generate(image=pictures[0], generator=4)
    assert torch.equal(described.codes, encode(pipe, pictures[0]).cpu())
    drawn = pipe.generate("a dog", generator=4)
    assert drawn.texts == ["a dog"]


def test_generators_give_repeatable_rows(pipe):
    prompts = ["a dog", "a dog"]
    by_seed = pipe.text_to_image(prompts, generator=5)
    assert torch.equal(by_seed.ids, pipe.text_to_image(prompts, generator=5).ids)
    assert not torch.equal(by_seed.ids[0], by_seed.ids[1])
    assert not torch.equal(by_seed.ids, pipe.text_to_image(prompts, generator=6).ids)
    listed = pipe.text_to_image(prompts, generator=[9, 9])
    assert torch.equal(listed.ids[0], listed.ids[1])
    drawn = [pipe.text_to_image(prompts, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(drawn[0].ids, drawn[1].ids) and not torch.equal(drawn[0].ids[0], drawn[0].ids[1])
    fresh = [pipe.text_to_image("a dog").seeds for _ in range(2)]
    assert not torch.equal(*fresh)
    mixed = pipe.text_to_image("a dog", num_images_per_prompt=2, generator=[torch.Generator().manual_seed(3)])
    assert torch.equal(mixed.seeds, drawn[0].seeds)


@pytest.mark.parametrize("output_type", ["pil", "pt", "np", "codes"])
def test_output_types_agree(pipe, output_type):
    result = pipe.text_to_image(["a dog", "two cats"], generator=0, output_type=output_type)
    expected = pipe.images.decode(result.codes)  # [B, 3, H, W]
    if output_type == "pil":
        images = torch.from_numpy(np.stack([np.asarray(i) for i in result.images])).permute(0, 3, 1, 2) / 255
        assert (images - expected).abs().max() < 0.51 / 255 + 1e-6
    elif output_type == "np":
        assert result.images.shape == (2, HEIGHT, WIDTH, 3)
        assert np.allclose(result.images, expected.permute(0, 2, 3, 1).numpy())
    else:
        assert torch.equal(result.images, expected if output_type == "pt" else result.codes)


def test_steps_and_guidance_count_forward_passes(pipe, pictures):
    assert pipe.text_to_image("a dog", steps=3, guidance_scale=1.0).nfe == 3
    assert pipe.text_to_image("a dog", steps=3, guidance_scale=2.0).nfe == 6
    assert pipe.caption(pictures[0], steps=4).nfe <= 4
    one = SamplerConfig(image=ModalityDecoding(steps=2), guidance=Guidance(3.0))
    assert pipe.text_to_image("a dog", sampler=one).nfe == 4
    assert pipe.text_to_image("a dog", sampler=one, steps=1, guidance_scale=1.0, policy=NoCache()).nfe == 1


def test_guidance_hides_the_condition_but_not_the_task_token(pipe, pictures):
    seen = []
    original = pipe.transformer.hidden

    def spy(ids, *args, **kwargs):
        seen.append(ids.clone())
        return original(ids, *args, **kwargs)

    pipe.transformer.hidden = spy
    try:
        pipe.inpaint(pictures[0], hole(0, 0, 8, 8), "a dog", guidance_scale=2.0, steps=1)
        first = seen.pop(0)
        pipe.inpaint(pictures[0], hole(0, 0, 8, 8), "a dog", guidance_scale=2.0, steps=1, guidance_hides="text")
        second = seen.pop(0)
    finally:
        del pipe.transformer.hidden
    mask = pipe.settings.vocabulary.mask_id
    assert first.shape[0] == second.shape[0] == 2  # with and without the condition
    assert first[1, 0] == pipe.texts.special("caption") and (first[1, 1:] == mask).all()
    assert (second[1, 1:TEXT_LENGTH] == mask).all()
    assert torch.equal(second[1, TEXT_LENGTH:], second[0, TEXT_LENGTH:])


def test_callback_watches_and_interrupts(pipe):
    calls = []

    def watch(p, step, t, tensors):
        calls.append((step, t, int(tensors["open"].sum())))
        assert p is pipe and tensors["ids"].shape == tensors["open"].shape == tensors["confidence"].shape

    pipe.text_to_image("a dog", steps=4, callback_on_step_end=watch)
    assert [c[0] for c in calls] == [0, 1, 2, 3]
    assert [c[1] for c in calls] == sorted((c[1] for c in calls), reverse=True) and calls[-1][1:] == (0.0, 0)

    def stop(p, step, t, tensors):
        p.interrupt = True

    for callback in (stop, lambda *_: False):
        result = pipe.text_to_image("a dog", steps=6, guidance_scale=1.0, callback_on_step_end=callback)
        assert result.nfe == 2 and not (result.ids == pipe.settings.vocabulary.mask_id).any()
    assert pipe.text_to_image("a dog", steps=4, guidance_scale=1.0).nfe == 4  # an interruption does not stick


def test_progress_bar_counts_tokens(pipe, capsys):
    pipe.set_progress_bar_config(disable=False)
    try:
        pipe.text_to_image("a dog", steps=2)
    finally:
        pipe.set_progress_bar_config(disable=True)
    assert "6/6" in capsys.readouterr().err


def test_bfloat16_runs(pictures):
    pipe = tiny_pipeline().to(torch.bfloat16)
    result = pipe.inpaint(pictures[0], hole(0, 0, 8, 8), "a <mask>", generator=0)
    known = torch.ones(GRID, dtype=torch.bool)
    known[0, 0] = False
    assert torch.equal(result.codes[0, known], encode(pipe, pictures[0])[0, known])
    assert pipe.transformer.dtype == pipe.image_tokenizer.dtype == torch.bfloat16


def test_rows_lay_text_first_and_place_the_picture(pipe, pictures):
    batches = [pipe.layout.request("generate", TaskInputs(1, longest=n)).batch for n in (2, TEXT_LENGTH - 1)]
    batch = TokenBatch.cat(batches)
    assert batch.valid.sum(1).tolist() == [3 + 6, TEXT_LENGTH + 6]  # cut text is padding; the picture stays in place
    assert (batch.modality[:, TEXT_LENGTH:] == Modality.IMAGE).all()
    assert batch.positions[0, TEXT_LENGTH:, 1].tolist() == [0, 0, 0, 1, 1, 1]
    assert batch.targets.sum(1).tolist() == [2 + 6, TEXT_LENGTH - 1 + 6]


LONG = "a picture of a dog, a cat, an owl and a fox"
BAD_CALLS = {
    "empty prompt": (lambda p, i: p.text_to_image("  "), "prompt is empty"),
    "no prompts": (lambda p, i: p.text_to_image([]), "list of prompts is empty"),
    "prompt of another type": (lambda p, i: p.text_to_image(3), "prompt is an int"),
    "long prompt": (lambda p, i: p.text_to_image(LONG), "at most 9"),
    "steps 0": (lambda p, i: p.text_to_image("a", steps=0), "steps is 0"),
    "steps not whole": (lambda p, i: p.text_to_image("a", steps=1.5), "steps is 1.5"),
    "negative guidance": (lambda p, i: p.text_to_image("a", guidance_scale=-1.0), "guidance scale is -1"),
    "guidance_hides": (lambda p, i: p.text_to_image("a", guidance_hides="all"), "guidance hide is 'all'"),
    "negative temperature": (lambda p, i: p.text_to_image("a", temperature=-1.0), "temperature is -1"),
    "count 0": (lambda p, i: p.text_to_image("a", num_images_per_prompt=0), "num_images_per_prompt is 0"),
    "output_type": (lambda p, i: p.text_to_image("a", output_type="jpeg"), "output_type is 'jpeg'"),
    "generator": (lambda p, i: p.text_to_image("a", generator="x"), "generator is a str"),
    "generators": (lambda p, i: p.text_to_image("a", generator=[1, 2]), "lists 2 seeds for 1 rows"),
    "seed in list": (lambda p, i: p.text_to_image("a", generator=[1.5]), "lists a float"),
    "large seed": (lambda p, i: p.text_to_image("a", generator=[1 << 70]), "64 bits"),
    "wrong size": (lambda p, i: p.caption(Image.new("RGB", (32, 16))), "32x16 pixels"),
    "no image": (lambda p, i: p.caption([]), "list of images is empty"),
    "not an image": (lambda p, i: p.caption([i, {"dog": 1}]), "image 2 of 2 is a dict"),
    "max_text_tokens 0": (lambda p, i: p.caption(i, max_text_tokens=0), "max_text_tokens is 0"),
    "max_text_tokens": (lambda p, i: p.caption(i, max_text_tokens=10), "from 1 to 9"),
    "empty question": (lambda p, i: p.answer(i, ""), "question is empty"),
    "long question": (lambda p, i: p.answer(i, LONG), "questions of at most 7"),
    "lists disagree": (lambda p, i: p.answer([i, i], ["a", "b", "c"]), "2 images do not go with 3 questions"),
    "mask of another size": (
        lambda p, i: p.inpaint(i, Image.new("L", (8, 8)), "a"),
        "8x8 pixels but the image is 24x16",
    ),
    "mask of another type": (lambda p, i: p.inpaint(i, [[0]], "a"), "mask_image is a list"),
    "masks and images disagree": (
        lambda p, i: p.inpaint([i, i], [Image.new("L", (24, 16))] * 3, "a"),
        "2 images do not go with 3 mask_images",
    ),
    "all known": (lambda p, i: p.inpaint(i, Image.new("L", (24, 16)), "a dog"), "nothing is left to decode"),
    "all known, generate": (lambda p, i: p.generate("a dog", i), "nothing is left to decode"),
    "hole of 0": (lambda p, i: p.generate("a <mask:0>"), "'<mask:0>' is no hole"),
    "hole of words": (lambda p, i: p.generate("a <mask:two>"), "'<mask:two>' is no hole"),
    "unfinished hole": (lambda p, i: p.generate("a <mask"), "unfinished <mask>"),
    "holes too long": (lambda p, i: p.generate("a <mask:9>"), "has 10 tokens"),
    "empty text": (lambda p, i: p.inpaint(i, None, ""), "text is empty"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_one_sentence_for_a_mistake(pipe, pictures, name):
    call, words = BAD_CALLS[name]
    with pytest.raises(ValueError) as caught:
        call(pipe, pictures[0])
    message = str(caught.value)
    assert words in message and "\n" not in message and len(message) < 300


def test_an_unknown_option_is_an_error(pipe):
    with pytest.raises(TypeError, match="guidance"):
        pipe.text_to_image("a", guidance=2.0)
