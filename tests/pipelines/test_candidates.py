"""Best of several decodes, and negative prompts."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
import torch
from tiny_pipeline import tiny_pipeline

from unidiff.decoding import ModalityDecoding, SamplerConfig
from unidiff.families.layout import TaskInputs
from unidiff.models.transformer import MaskedTransformer
from unidiff.pipeline import UniDiffPipeline
from unidiff.pipelines.candidates import RANKERS, agreement
from unidiff.pipelines.decode import candidate_seeds
from unidiff.tokens import Modality, TokenBatch


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def test_the_first_candidate_is_the_decode_without_candidates() -> None:
    seeds = torch.tensor([5, 1 << 40])
    assert candidate_seeds(seeds, 1).tolist() == seeds.tolist()
    three = candidate_seeds(seeds, 3).unflatten(0, (2, 3))
    assert three[:, 0].tolist() == seeds.tolist() and len(set(three.flatten().tolist())) == 6
    assert torch.equal(three[:, :2], candidate_seeds(seeds, 2).unflatten(0, (2, 2)))


def test_the_kept_row_is_the_candidate_that_agrees_best(pipe) -> None:
    prompts, count = ["a dog", "two cats"], 4
    kept = pipe.text_to_image(prompts, generator=[3, 4], num_candidates=count, record_trajectory=True)
    assert len(kept.images) == len(kept.seeds) == len(kept.trajectory.texts[0]) == 2
    for row, prompt in enumerate(prompts):
        seeds = candidate_seeds(torch.tensor([3 + row]), count).tolist()
        all_of_it = pipe.text_to_image([prompt] * count, generator=seeds)
        request = pipe.layout.request("text_to_image", TaskInputs(count, [prompt] * count))
        batch = request.batch.replace(ids=all_of_it.ids)
        scores = agreement(pipe.transformer, pipe.settings.vocabulary, batch, request.judged())
        best = int(scores.argmax())
        assert scores.unique().numel() > 1
        assert int(kept.seeds[row]) == seeds[best]
        assert torch.equal(kept.ids[row], all_of_it.ids[best])
        assert torch.equal(kept.trajectory.ids[-1][row], kept.ids[row])
        assert torch.equal(pipe.text_to_image(prompt, generator=[int(kept.seeds[row])]).ids[0], kept.ids[row])


@pytest.mark.parametrize("of", ["text", "image", "both", "each"])
def test_a_ranker_by_likelihood_keeps_what_score_prefers(pipe, of) -> None:
    prompts, count = ["a dog", "two cats"], 3
    kept = pipe.text_to_image(prompts, generator=[3, 4], num_candidates=count, rank_by=of)
    for row, prompt in enumerate(prompts):
        seeds = candidate_seeds(torch.tensor([3 + row]), count).tolist()
        drawn = pipe.text_to_image([prompt] * count, generator=seeds)
        request = pipe.layout.request("text_to_image", TaskInputs(count, [prompt] * count))
        batch, same = request.batch.replace(ids=drawn.ids), torch.full((count,), 3 + row)
        scores = RANKERS[of](pipe.transformer, pipe.vocabulary, batch, request.judged(), same)
        assert scores.unique().numel() > 1
        assert torch.equal(kept.codes[row], drawn.codes[int(scores.argmax())])
        if of == "image":  # of given words, the score of the picture is that of `pipe.score`
            own = pipe.score(texts=[prompt] * count, codes=drawn.codes, of=of, samples=8, generator=[3 + row] * count)
            assert int(own.log_prob.argmax()) == int(scores.argmax())


def test_candidates_are_ranked_by_a_function(pipe) -> None:
    seen = []

    def last(model, vocabulary, batch, words, seeds):
        seen.append((words.shape, seeds.tolist()))
        return torch.arange(len(words)).float()

    kept = pipe.text_to_image(["a dog", "two cats"], generator=[3, 4], num_candidates=3, rank_by=last)
    assert kept.seeds.tolist() == candidate_seeds(torch.tensor([3, 4]), 3)[2::3].tolist()
    assert seen[0][1] == [3, 3, 3, 4, 4, 4]
    for wrong in (lambda *given: torch.zeros(1), lambda *given: None, lambda *given: torch.full((6,), torch.nan)):
        with pytest.raises(ValueError, match="rank_by gave"):
            pipe.text_to_image(["a dog", "two cats"], generator=[3, 4], num_candidates=3, rank_by=wrong)
    with pytest.raises(ValueError, match="rank_by is 'best'"):
        pipe.text_to_image("a dog", rank_by="best")


def test_a_picture_that_does_not_fit_itself_scores_less(pipe) -> None:
    """With the words given, changing one drawn code to the model's least likely one lowers the score of that row alone."""
    drawn = pipe.text_to_image(["a dog"] * 2, generator=[3, 3])
    request = pipe.layout.request("text_to_image", TaskInputs(2, ["a dog"] * 2))
    batch, words = request.batch.replace(ids=drawn.ids), request.judged()
    vocabulary, last = pipe.settings.vocabulary, drawn.ids.shape[1] - 1
    before = agreement(pipe.transformer, vocabulary, batch, words)
    assert before[0] == before[1]
    scores = []
    for code in range(*vocabulary.image):
        ids = drawn.ids.clone()
        ids[1, last] = code
        after = agreement(pipe.transformer, vocabulary, batch.replace(ids=ids), words)
        assert after[0] == before[0]
        scores.append(float(after[1]))
    assert min(scores) < float(before[1]) - 0.1


def test_candidates_of_a_row_do_not_depend_on_the_batch(pipe) -> None:
    together = pipe.generate(num_images_per_prompt=3, generator=[1, 2, 3], num_candidates=2)
    alone = pipe.generate(generator=[2], num_candidates=2)
    assert torch.equal(together.ids[1], alone.ids[0])


TEXTS = ["a <mask:2> dog", "two <mask>", "a dog", "<mask:3>", "two cats", "an owl <mask> a fox", "a <mask> on a <mask>"]


def test_candidates_of_mixed_rows_do_not_depend_on_the_batch(pipe) -> None:
    """Rows with and without hidden words, of any length, in one call: each keeps the candidate that it keeps alone."""
    random = Random(0)
    for _ in range(12):
        texts = random.sample(TEXTS, random.randint(2, 4))
        seeds = [random.randrange(1 << 40) for _ in texts]
        options = dict(num_candidates=3, output_type="codes", steps=2)
        together = pipe.generate(texts, generator=seeds, **options)
        for row, (text, seed) in enumerate(zip(texts, seeds, strict=True)):
            alone = pipe.generate(text, generator=[seed], **options)
            assert torch.equal(together.ids[row], alone.ids[0]) and int(together.seeds[row]) == int(alone.seeds[0])


def test_agreement_of_a_row_is_its_own(pipe) -> None:
    """Rows whose words were given or decoded, a row without words, and padding: the score of each is that alone."""
    batch = pipe.layout.request("generate", TaskInputs(len(TEXTS), TEXTS)).batch
    ids = torch.where(batch.targets, batch.ids * 0 + torch.arange(batch.shape[1]) % 8, batch.ids)
    image = batch.modality == Modality.IMAGE
    batch = batch.replace(ids=torch.where(image, pipe.settings.vocabulary.image[0] + ids % 8, ids))
    batch = TokenBatch.cat([batch, batch.rows([0]).replace(valid=image[:1], given=~image[:1])])
    padded, vocabulary = batch.pad_to(batch.shape[1] + 3), pipe.settings.vocabulary
    words = lambda rows: rows.is_modality(Modality.TEXT) & (rows.positions[..., 0] > 0)  # noqa: E731
    scores = agreement(pipe.transformer, vocabulary, padded, words(padded))
    assert float(scores[-1]) == -torch.inf and scores[:-1].isfinite().all()
    for row in range(len(batch.ids)):
        one = batch.rows([row])
        own = agreement(pipe.transformer, vocabulary, one, words(one))
        torch.testing.assert_close(own[0], scores[row])


def test_a_time_conditioned_model_judges_its_candidates(pipe) -> None:
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_layers=1, num_heads=2, ffn_size=32, time_conditioning=True, cond_dim=8)
    timed = MaskedTransformer(pipe.settings.vocabulary.size, **sizes)
    for parameter in timed.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    own = UniDiffPipeline(timed, pipe.images, pipe.texts, pipe.settings)
    own.set_progress_bar_config(disable=True)
    options = dict(num_candidates=2, output_type="codes", steps=3)
    together = own.generate(TEXTS, generator=list(range(len(TEXTS))), **options)
    for row, text in enumerate(TEXTS):
        assert torch.equal(together.ids[row], own.generate(text, generator=[row], **options).ids[0])


def test_the_first_of_equal_candidates_is_kept(pipe) -> None:
    """All candidates are the same tokens: rounding must not choose among their seeds."""
    greedy = SamplerConfig(image=ModalityDecoding(steps=3, temperature=0.0))
    options = dict(num_candidates=4, sampler=greedy, output_type="codes", generator=[5, 6])
    kept = pipe.text_to_image(["a dog", "two cats"], **options)
    assert kept.seeds.tolist() == [5, 6]


def test_a_model_brings_its_own_number(pipe, tmp_path) -> None:
    settings = replace(pipe.settings, num_candidates={"text_to_image": 3})
    own = UniDiffPipeline(pipe.transformer, pipe.images, pipe.texts, settings)
    own.save_pretrained(tmp_path / "model")
    own = UniDiffPipeline.from_pretrained(tmp_path / "model")
    own.set_progress_bar_config(disable=True)
    prompts, seeds = ["a dog", "two cats"], [3, 4]
    best = pipe.text_to_image(prompts, generator=seeds, num_candidates=3)
    assert torch.equal(own.text_to_image(prompts, generator=seeds).ids, best.ids)
    once = pipe.text_to_image(prompts, generator=seeds)
    assert torch.equal(own.text_to_image(prompts, generator=seeds, num_candidates=1).ids, once.ids)
    assert not torch.equal(once.ids, best.ids)
    assert torch.equal(own.generate(generator=[1]).ids, pipe.generate(generator=[1]).ids)


@pytest.mark.parametrize("numbers", [{"paint": 2}, {"caption": 0}, {"caption": "2"}])
def test_bad_numbers_of_a_model(pipe, numbers) -> None:
    with pytest.raises(ValueError, match=r"num_candidates (name unknown tasks|is )"):
        replace(pipe.settings, num_candidates=numbers)


def test_a_negative_prompt_leads_away(pipe) -> None:
    plain = pipe.text_to_image("a dog", generator=[3], guidance_scale=4.0)
    away = pipe.text_to_image("a dog", negative_prompt="two cats", generator=[3], guidance_scale=4.0)
    assert not torch.equal(plain.codes, away.codes)
    # away from itself: conditional and unconditional streams agree, so the strength of guidance does not matter
    itself = [
        pipe.text_to_image("a dog", negative_prompt="a dog", generator=[3], guidance_scale=scale)
        for scale in (2.0, 6.0)
    ]
    assert torch.equal(itself[0].codes, itself[1].codes)
    several = pipe.text_to_image(["a dog", "an owl"], 2, "two cats", generator=[3, 3, 4, 4], guidance_scale=4.0)
    assert torch.equal(several.ids[0], away.ids[0])


@pytest.mark.parametrize("count", [0, 1.5, True, "2"])
def test_bad_candidate_counts(pipe, count) -> None:
    with pytest.raises(ValueError, match="num_candidates is"):
        pipe.text_to_image("a dog", num_candidates=count)


def test_bad_negative_prompts(pipe) -> None:
    with pytest.raises(ValueError, match="changes nothing at guidance_scale 1"):
        pipe.text_to_image("a dog", negative_prompt="a cat", guidance_scale=1.0)
    with pytest.raises(ValueError, match="do not go with"):
        pipe.text_to_image(["a dog", "an owl", "a fox"], negative_prompt=["a dog", "a cat"])
    for wrong in (3, ["a", None], [], [["a"]]):
        with pytest.raises(ValueError, match="negative_prompt"):
            pipe.text_to_image("a dog", negative_prompt=wrong)


def test_an_empty_negative_prompt_leads_away_from_hidden_words(pipe) -> None:
    asked = {"guidance_scale": 4.0, "generator": [3, 4]}
    plain = pipe.text_to_image(["a dog", "an owl"], **asked)
    for empty in ("", " ", ["", ""]):
        assert torch.equal(pipe.text_to_image(["a dog", "an owl"], negative_prompt=empty, **asked).ids, plain.ids)
    mixed = pipe.text_to_image(["a dog", "an owl"], negative_prompt=["", "two cats"], **asked)
    alone = pipe.text_to_image("an owl", negative_prompt="two cats", guidance_scale=4.0, generator=[4])
    assert torch.equal(mixed.ids[0], plain.ids[0]) and torch.equal(mixed.ids[1], alone.ids[0])
    assert torch.equal(
        pipe.text_to_image("a dog", negative_prompt="", guidance_scale=1.0, generator=[3]).ids,
        pipe.text_to_image("a dog", guidance_scale=1.0, generator=[3]).ids,
    )


@pytest.mark.parametrize("hide", ["given", "other", "text", "image"])
def test_an_empty_negative_prompt_means_the_same_beside_others(pipe, hide) -> None:
    plain = pipe.settings.sampler("text_to_image")
    asked = {"sampler": replace(plain, guidance=replace(plain.guidance, scale=4.0, hide=hide))}
    mixed = pipe.text_to_image(["a dog", "an owl"], negative_prompt=["", "two cats"], generator=[3, 4], **asked)
    alone = pipe.text_to_image("a dog", negative_prompt="", generator=[3], **asked)
    assert torch.equal(mixed.ids[0], alone.ids[0])
    for unwanted in ("", "two cats"):
        with pytest.raises(ValueError, match="give one of them"):
            pipe.text_to_image("a dog", negative_prompt=unwanted, guidance_hides=hide)
