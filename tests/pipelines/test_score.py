"""`pipe.score`: rows alone and together, targets, what pmi subtracts, models of text alone, bad input."""

import math

import pytest
import torch
from all_pipelines import make_pipelines
from tiny_pipeline import SIZE, tiny_pipeline

from unidiff.diffusion.likelihood import mask_count_nelbo, model_scorer
from unidiff.families.layout import TaskInputs
from unidiff.pipeline import UniDiffPipeline

TEXTS = ["a dog", "two cats", "an owl above a fox"]


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def pictures():
    return torch.rand(3, 3, *SIZE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "of, pmi", [("text", False), ("text", True), ("image", False), ("image", True), ("both", False), ("each", False)]
)
def test_a_row_scores_the_same_alone_and_in_any_batch(pipe, pictures, of, pmi):
    together = pipe.score(pictures, TEXTS, of=of, pmi=pmi, samples=4)
    parts = pipe.score(pictures, TEXTS, of=of, pmi=pmi, samples=4, batch_size=2)
    torch.testing.assert_close(parts.to_tuple(), together.to_tuple())
    for i, text in enumerate(TEXTS):
        alone = pipe.score(pictures[i], text, of=of, pmi=pmi, samples=4)
        torch.testing.assert_close(alone.log_prob[0], together.log_prob[i], rtol=1e-5, atol=1e-5)
        assert alone.low[0] < alone.log_prob[0] < alone.high[0]


def test_the_bound_is_that_of_the_estimator(pipe, pictures):
    request = pipe.layout.known(TaskInputs(1, ["a dog"], codes=pipe.images.encode(pictures[:1]).cpu()))
    batch, vocabulary = request.batch, pipe.vocabulary
    batch = batch.replace(given=~request.picture)
    score = model_scorer(pipe.transformer, vocabulary)
    own = pipe.score(pictures[0], "a dog", of="image", samples=3, generator=[5])
    expected = mask_count_nelbo(score, batch, vocabulary, torch.tensor([5]), samples=3, stream=11)
    torch.testing.assert_close(own.log_prob, -expected.total)
    assert own.count_image.tolist() == [6] and own.count_text.tolist() == [0]
    assert own.bits_per_token[0] == pytest.approx(-float(own.log_prob[0]) / 6 / math.log(2))


def test_pmi_is_the_difference_that_sight_makes(pipe, pictures):
    for of in ("text", "image"):
        seen = pipe.score(pictures, TEXTS, of=of, samples=4)
        blind = pipe.score(*((None, TEXTS) if of == "text" else (pictures, None)), samples=4)
        pmi = pipe.score(pictures, TEXTS, of=of, pmi=True, samples=4)
        if of == "text":  # the same rows with a hidden picture
            torch.testing.assert_close(pmi.log_prob, seen.log_prob - blind.log_prob, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(pmi.log_prob, seen.log_prob)


def test_each_is_the_sum_of_both_conditionals(pipe, pictures):
    parts = [pipe.score(pictures, TEXTS, of=of, samples=4) for of in ("text", "image")]
    each = pipe.score(pictures, TEXTS, of="each", samples=4)
    torch.testing.assert_close((each.text, each.image), tuple(part.log_prob for part in parts))
    torch.testing.assert_close(each.draws, parts[0].draws + parts[1].draws)
    assert each.count_text.tolist() == parts[0].count_text.tolist() and each.count_image.tolist() == [6] * 3


def test_codes_are_scored_as_they_were_drawn(pipe):
    drawn = pipe.text_to_image(TEXTS, generator=[1, 2, 3], output_type="pt")
    own = pipe.score(texts=TEXTS, codes=drawn.codes, of="image", samples=3)
    request = pipe.layout.known(TaskInputs(3, TEXTS, codes=drawn.codes))
    batch = request.batch.replace(given=~request.picture)
    score = model_scorer(pipe.transformer, pipe.vocabulary)
    expected = mask_count_nelbo(score, batch, pipe.vocabulary, own.seeds, samples=3, stream=11)
    torch.testing.assert_close(own.log_prob, -expected.total)
    with pytest.raises(ValueError, match="give one of them"):
        pipe.score(drawn.images, TEXTS, codes=drawn.codes)


def test_intervals_of_parts_and_differences(pipe, pictures):
    found = pipe.score(pictures, TEXTS, of="both", samples=6)
    torch.testing.assert_close(found.draws.mean(0), found.log_prob)
    torch.testing.assert_close(found.text_draws.mean(0), found.text)
    torch.testing.assert_close(found.bits_per_token_error, found.error / (found.count_text + 6) / math.log(2))
    gap = found.difference([0, 0], [1, 0])
    torch.testing.assert_close(gap.value[0], found.log_prob[0] - found.log_prob[1])
    assert gap.low[0] < gap.value[0] < gap.high[0] and gap.low[1] == gap.high[1] == 0
    assert float(gap.high[0] - gap.value[0]) < float(found.error[0] + found.error[1])
    assert bool((found.text_error > 0).all() & (found.image_error > 0).all())


def test_one_picture_goes_with_many_texts_and_equal_rows_are_hidden_alike(pipe, pictures):
    scores = pipe.score(pictures[0], ["a dog", "two cats", "a dog"], samples=4)
    assert scores.log_prob[0] == scores.log_prob[2] != scores.log_prob[1]
    apart = pipe.score(pictures[0], ["a dog", "two cats", "a dog"], samples=4, generator=[1, 2, 3])
    assert apart.log_prob[0] != apart.log_prob[2]
    assert scores[0] is scores.log_prob and len(scores.to_tuple()) == 10


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    return make_pipelines(tmp_path_factory.mktemp("families"))


@pytest.mark.parametrize("name", ["llada", "llada-moe", "llada2", "llada-v", "dream", "mdlm"])
def test_models_of_text_alone_score_texts_behind_prompts(pipelines, name):
    pipe = pipelines[name]
    both = pipe.score(texts=["two owls", "a hill"], prompt=["a", "a red"], samples=3)
    alone = pipe.score(texts="a hill", prompt="a red", samples=3)
    torch.testing.assert_close(both.log_prob[1], alone.log_prob[0], rtol=1e-4, atol=1e-4)
    assert int(both.count_text[0]) == len(pipe.layout.encode("two owls"))
    seen = pipe.score(texts=["two owls", "a hill"], prompt=["a", "a red"], pmi=True, samples=3)
    again = pipe.score(texts=["two owls", "two owls"], prompt=["a", "a red"], samples=3)
    beside = pipe.score(texts=["two owls", "two owls"], prompt=["a", "a red"], pmi=True, samples=3)
    torch.testing.assert_close(seen.log_prob[0], beside.log_prob[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(seen.log_prob[0], both.log_prob[0])  # less what the text has without the prompt
    assert torch.isfinite(again.log_prob - beside.log_prob).all()
    with pytest.raises(ValueError, match="knows no pictures"):
        pipe.score(torch.zeros(3, 8, 8), "a")


@pytest.mark.parametrize("name", ["unidisc", "mmada", "dynin", "lumina", "muddit"])
def test_families_with_pictures_score_them_beside_words(pipelines, name):
    pipe, pictures = pipelines[name], torch.rand(2, 3, *pipelines[name].image_size)
    both = pipe.score(pictures, ["a hill", "two owls"], of="image", samples=4)
    alone = pipe.score(pictures[1], "two owls", of="image", samples=4)
    torch.testing.assert_close(both.log_prob[1], alone.log_prob[0], rtol=1e-4, atol=1e-4)
    assert both.count_image.unique().tolist() == [both.count_image[0]] and bool((both.log_prob < 0).all())


@pytest.mark.parametrize("name, sentence", [("ddit", "are latents"), ("llada2-uni", "cannot do 'inpaint'")])
def test_families_without_scores_say_so(pipelines, name, sentence):
    picture = torch.rand(3, *pipelines[name].image_size)
    for given in ({"texts": "a hill"}, {"images": picture}, {"images": picture, "texts": "a hill", "of": "text"}):
        with pytest.raises(ValueError, match=sentence):
            pipelines[name].score(**given)


@pytest.mark.parametrize(
    "given, sentence",
    [
        ({}, "nothing to score"),
        ({"texts": "a dog", "of": "image"}, "only texts were given"),
        ({"texts": "a dog", "pmi": True}, "give images and texts"),
        ({"texts": "a dog", "of": "words"}, "of is 'words'"),
        ({"texts": "a dog", "samples": 1}, "samples is 1"),
        ({"texts": "a dog", "prompt": "a"}, "models of text alone"),
        ({"texts": "a <mask> dog"}, "<mask>"),
        ({"texts": "a dog", "codes": torch.zeros(2, 3)}, "codes are torch.float32"),
        ({"texts": "a dog", "codes": [[1]]}, "codes are a list"),
        ({"texts": "a dog", "codes": torch.full((1, 2, 3), 99)}, "must lie in"),
    ],
)
def test_bad_input_is_one_sentence(pipe: UniDiffPipeline, given, sentence):
    with pytest.raises(ValueError, match=sentence):
        pipe.score(**given)
