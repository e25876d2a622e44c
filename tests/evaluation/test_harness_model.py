"""A model behind a harness: batches, seeds, equality with the pipeline's own calls, chat templates, what it refuses."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from all_pipelines import make_pipelines
from PIL import Image

from unidiff.evaluation.harness.asked import Context, Wish, without_marks
from unidiff.evaluation.harness.model import HarnessModel
from unidiff.evaluation.harness.settings import HarnessSettings
from unidiff.families.layout import TaskInputs

TURNS = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "owls? "},
    {"role": "assistant", "content": "two owls"},
    {"role": "user", "content": "on a hill?"},
]


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    return make_pipelines(tmp_path_factory.mktemp("families"))


def model_of(pipe, **given):
    return HarnessModel(HarnessSettings.of(pretrained="tiny", draws=given.pop("draws", 4), **given), pipe)


def in_order(found):
    return [result for _, result in sorted(found)]


def picture(seed, size=(6, 6)):
    pixels = torch.randint(0, 256, (*size[::-1], 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.numpy())


ASKED = [
    (Context("a red"), " fox"),
    (Context("a red"), " owls on a hill"),
    (Context("two owls on a red hill "), "a fox"),
    (Context(""), "two owls"),
]


@pytest.mark.parametrize("family", ["llada", "dream", "mdlm"])
def test_texts_score_the_same_in_any_batch_and_as_the_pipeline_scores_them(pipelines, family):
    pipe = pipelines[family]
    together = in_order(model_of(pipe, batch_size=4, seed=3).log_likelihoods(ASKED))
    for size in (1, 3, "auto"):
        found = in_order(model_of(pipe, batch_size=size, seed=3).log_likelihoods(ASKED))
        assert [value for value, _ in found] == pytest.approx([value for value, _ in together], abs=1e-4)
    backwards = in_order(model_of(pipe, batch_size=2, seed=3).log_likelihoods(ASKED[::-1]))[::-1]
    assert [value for value, _ in backwards] == pytest.approx([value for value, _ in together], abs=1e-4)
    prompts, texts = ["a red", "a red", "two owls on a red hill", ""], [" fox", " owls on a hill", " a fox", "two owls"]
    seeds = [context.seed(3) for context, _ in ASKED]
    own = pipe.score(texts=texts, prompt=prompts, samples=4, generator=seeds)
    several = [row for row in range(4) if own.count_text[row] > 1]
    assert len(several) >= 3 and seeds[0] == seeds[1] != seeds[2]
    for row in several:
        assert together[row][0] == pytest.approx(float(own.log_prob[row]), abs=1e-4)
    other = in_order(model_of(pipe, seed=4).log_likelihoods(ASKED))
    assert other[1][0] != together[1][0]


@contextmanager
def passes_of(pipe):
    """Numbers of rows of every pass of the network."""
    rows, hidden = [], pipe.transformer.hidden
    pipe.transformer.hidden = lambda ids, *args, **more: (rows.append(len(ids)), hidden(ids, *args, **more))[1]
    try:
        yield rows
    finally:
        del pipe.transformer.hidden


def test_a_single_token_takes_one_pass_and_has_no_interval(pipelines):
    model = model_of(pipelines["llada"], draws=64)
    assert len(pipelines["llada"].texts.encode(" fox")) == 1
    with passes_of(pipelines["llada"]) as passes:
        [(_, (value, greedy))] = model.log_likelihoods([(Context("a red"), " fox")])
    assert value < 0 and greedy is False and passes == [1] and model.half_widths == [0.0]


def test_greedy_continuations_are_told_from_others(pipelines):
    pipe, found = pipelines["llada"], []
    model = model_of(pipe, check_greedy=True, batch_size=4)
    for context in ("a red", "two", "owls", "on a hill", "a", "fox", "hill", "two owls on"):
        ids = pipe.complete(context, 1, temperature=0.0, generator=0).text_ids[0]
        said = pipe.texts.decode(ids)
        if ids and pipe.texts.encode(context + said) == [*pipe.texts.encode(context), *ids]:  # letters of its own
            found.append((Context(context), said))
    assert len(found) > 1 and all(greedy for _, (_, greedy) in model.log_likelihoods(found))
    assert not any(greedy for _, (_, greedy) in model.log_likelihoods(ASKED))


@pytest.mark.parametrize("family", ["llada", "dream", "mdlm"])
def test_texts_are_written_as_the_pipeline_writes_them_up_to_a_stop_string(pipelines, family):
    pipe = pipelines[family]
    contexts = ["a red", "two owls on a hill", "a"]
    asked = [(Context(text), {"max_gen_toks": 9, "until": ["\n"], "do_sample": False}) for text in contexts]
    whole = in_order(model_of(pipe, batch_size=3, seed=5).write(asked))
    assert whole == in_order(model_of(pipe, batch_size=1, seed=5).write(asked))
    seeds = [Context(text).seed(5) for text in contexts]
    own = pipe.complete(contexts, 9, temperature=0.0, generator=seeds)
    texts = [pipe.texts.decode(ids) for ids in own.text_ids]
    assert whole == [text.split("\n")[0] for text in texts]
    stop = next(letter for letter in texts[1] if letter.isprintable())
    cut = in_order(model_of(pipe, batch_size=3, seed=5).write([(c, {**k, "until": stop}) for c, k in asked]))
    assert cut == [text.split(stop)[0] for text in texts]


def test_a_decode_ends_when_every_row_has_its_stop_string(pipelines):
    pipe = pipelines["llada"]
    text = pipe.texts.decode(pipe.complete("a red", 12, temperature=0.0, block_length=2, generator=0).text_ids[0])
    counts = []
    for until in ("never said", text[0]):
        with passes_of(pipe) as passes:
            wish = {"max_gen_toks": 12, "until": [until]}
            [(_, found)] = model_of(pipe, block_length=2).write([(Context("a red"), wish)])
        counts.append(len(passes))
    assert found == "" and 0 < counts[1] < counts[0]


def test_repeats_of_a_request_are_drawn_apart_and_the_command_line_goes_before_the_task(pipelines):
    pipe = pipelines["llada"]
    warm = {"max_gen_toks": 8, "do_sample": True, "temperature": 1.0}
    first, second = in_order(model_of(pipe).write([(Context("two"), warm)] * 2))
    assert first != second
    cold = in_order(model_of(pipe, temperature=0.0, gen_length=4).write([(Context("two"), warm)] * 2))
    assert cold[0] == cold[1]
    settings = HarnessSettings.of(pretrained="x", steps=3, cfg_scale=1.0, cache="dual")
    wish = Wish.of({"max_new_tokens": 5, "temperature": 0.7, "until": "\n\n", "steps": 9}, settings)
    assert wish == (("\n\n",), 5, (("cache", "dual"), ("guidance_scale", 2.0), ("steps", 3), ("temperature", 0.7)))
    assert Wish.of({"do_sample": True}, HarnessSettings.of(pretrained="x")).options == ()


def test_caches_and_long_contexts(pipelines):
    pipe = pipelines["llada"]
    asked = [(Context("a red fox on a hill " * 8), {"max_gen_toks": 6})]
    for given in ({"cache": "dual", "block_length": 2}, {"cache": "prefix", "block_length": 3}):
        assert len(in_order(model_of(pipe, **given).write(asked))) == 1
    short = in_order(model_of(pipe, max_length=16).write(asked))[0]
    ids = pipe.texts.encode(asked[0][0].words)
    own = pipe.chat([ids[-10:]], 6, temperature=0.0, generator=[asked[0][0].seed(0)])
    assert short == pipe.texts.decode(own.text_ids[0])
    with pytest.raises(ValueError, match="20 tokens do not fit into max_length=16"):
        list(model_of(pipe, max_length=16).write([(Context("a"), {"max_gen_toks": 20})]))


def test_long_texts_roll_through_windows_that_score_each_token_once(pipelines):
    pipe = pipelines["llada"]
    texts = ["a red fox on a hill, two owls", "", "two owls"]
    whole = in_order(model_of(pipe, batch_size=4).rolling(texts))
    own = pipe.score(texts=texts[::2], samples=4, generator=[Context(text).seed(0, 0) for text in texts[::2]])
    assert whole == pytest.approx([float(own.log_prob[0]), 0.0, float(own.log_prob[1])], abs=1e-4)
    ids, size = pipe.texts.encode(texts[0]), 7
    assert len(ids) > size and len(ids) % size
    parts = in_order(model_of(pipe, max_length=size, batch_size=1).rolling(texts[:1]))[0]
    expected = 0.0
    for n, start in enumerate(range(0, len(ids), size)):
        end = min(start + size, len(ids))
        row = pipe.layout.known(
            SimpleNamespace(count=1, texts=[ids[start:end]], turns=[ids[max(0, end - size) : start]])
        )
        assert row.batch.shape[1] == min(size, end)
        expected += score_of_rows(pipe, row, Context(texts[0]).seed(0, n))
    assert parts == pytest.approx(expected, abs=1e-4)


def score_of_rows(pipe, request, seed):
    from unidiff.diffusion.likelihood import mask_count_nelbo, model_scorer

    batch = request.batch.replace(given=~request.words)
    score = model_scorer(pipe.transformer, pipe.vocabulary)
    return -float(mask_count_nelbo(score, batch, pipe.vocabulary, torch.tensor([seed]), samples=4, stream=11).total)


@pytest.mark.parametrize("family", ["native", "mmada", "lumina", "muddit"])
def test_answers_about_pictures_are_those_of_the_pipeline(pipelines, family):
    pipe = pipelines[family]
    height, width = pipe.image_size
    shown, questions = [picture(n, (width, height)) for n in range(3)], ["a fox?", "owls?", "a hill?"]
    contexts = [Context(q, (p,)) for q, p in zip(questions, shown, strict=True)]
    asked = [(context, {"max_new_tokens": 4, "temperature": 0}) for context in contexts]
    told = in_order(model_of(pipe, batch_size=3).write(asked))
    assert told == in_order(model_of(pipe, batch_size=1).write(asked))
    own = pipe.answer(shown, questions, 4, temperature=0.0, generator=[context.seed(0) for context in contexts])
    assert told == own.texts
    pairs = [(contexts[0], "ab"), (contexts[0], " b"), (contexts[1], "ab")]
    together = in_order(model_of(pipe, batch_size=3).log_likelihoods(pairs))
    alone = in_order(model_of(pipe, batch_size=1).log_likelihoods(pairs))
    assert [value for value, _ in together] == pytest.approx([value for value, _ in alone], abs=1e-4)
    assert together[0][0] != together[2][0] and all(value < 0 for value, _ in together)


def test_words_about_latents_are_written_and_scored_but_not_without_a_picture(pipelines):
    pipe = pipelines["ddit"]
    fox, shown = " red fox", [picture(n, (8, 8)) for n in range(2)]
    pairs = [(Context(words, (p,)), fox) for words in ("a fox?", "") for p in shown]
    pairs.append((Context("a fox?", (shown[0],)), " two owls on blue"))
    together = in_order(model_of(pipe, batch_size=4).log_likelihoods(pairs))
    alone = in_order(model_of(pipe, batch_size=1).log_likelihoods(pairs))
    assert [value for value, _ in together] == pytest.approx([value for value, _ in alone], abs=1e-4)
    assert len({value for value, _ in together}) == 5 and all(value < 0 for value, _ in together)
    [(_, (one, _))] = model_of(pipe, draws=1).log_likelihoods([(Context("a fox?", (shown[0],)), "a")])
    pixels = torch.tensor(np.asarray(shown[0])).movedim(-1, 0)[None] / 255
    request = pipe.layout.request("answer", TaskInputs(1, ["a fox?"], codes=pipe.images.encode(pixels), longest=1))
    rows, model = request.batch, pipe.layout.denoiser(pipe.transformer)
    hidden = model.hidden(rows.ids, rows.modality, rows.positions, features=rows.features)
    logits = model.head(hidden[request.words])  # of the only word; [MASK] is none
    logits = logits.index_fill(1, torch.tensor(pipe.vocabulary.mask_id), -torch.inf)
    assert one == pytest.approx(float(logits.detach().log_softmax(-1)[0, pipe.texts.encode("a")[0]]), abs=1e-4)
    contexts = [Context("a fox?", (p,)) for p in shown]
    told = in_order(model_of(pipe).write([(c, {"max_new_tokens": 3, "temperature": 0}) for c in contexts]))
    own = pipe.answer(shown, "a fox?", 3, temperature=0.0, generator=[c.seed(0) for c in contexts]).texts
    assert told == [text.strip() for text in own]
    for ask in (
        lambda model: model.log_likelihoods([(Context("a"), " fox")]),
        lambda model: model.rolling(["two owls"]),
    ):
        with pytest.raises(ValueError, match="those of ddit are latents"):
            list(ask(model_of(pipe)))


def test_questions_about_several_pictures(pipelines):
    pipe = pipelines["llada-v"]
    shown, questions = [(picture(0), picture(1, (9, 4))), (picture(2),)], ["a fox?", "owls?"]
    contexts = [Context(q, p) for q, p in zip(questions, shown, strict=True)]
    model = model_of(pipe, batch_size=2)
    told = in_order(model.write([(context, {"max_new_tokens": 4, "temperature": 0}) for context in contexts]))
    seeds = [context.seed(0) for context in contexts]
    assert model.sees and told == pipe.answer(list(map(list, shown)), questions, 4, generator=seeds).texts
    pairs = [
        (contexts[0], "ab"),
        (contexts[1], "ab"),
        (Context("a fox?", shown[0][:1]), "ab"),
        (Context("", shown[1]), "ab"),
    ]
    together = in_order(model.log_likelihoods(pairs))
    alone = in_order(model_of(pipe, batch_size=1).log_likelihoods(pairs))
    assert [value for value, _ in together] == pytest.approx([value for value, _ in alone], abs=1e-4)
    assert len({value for value, _ in together}) == 4


@pytest.mark.parametrize("family", ["native", "unidisc"])
def test_captions_are_scored_beside_pictures_and_alone(pipelines, family):
    pipe = pipelines[family]
    height, width = pipe.image_size
    shown = picture(1, (width, height))
    model = model_of(pipe, task="caption")
    seen, hidden = (
        in_order(model.log_likelihoods([(Context("", pictures), "a red fox")])) for pictures in ((shown,), ())
    )
    assert seen[0][0] != hidden[0][0] < 0
    rolled = in_order(model.rolling(["a red fox"]))[0]
    assert rolled < 0
    first = in_order(model.log_likelihoods([(Context("a red"), " fox")]))[0][0]
    assert 0 > first > hidden[0][0]
    told = in_order(model.write([(Context("Say what you see.", (shown,)), {"max_new_tokens": 4})]))
    own = pipe.caption(shown, 4, temperature=0.0, generator=[Context("Say what you see.", (shown,)).seed(0)])
    assert told == own.texts
    with pytest.raises(ValueError, match="writes about pictures, and this task has none"):
        list(model.write([(Context("a"), {})]))


def test_conversations_are_written_in_the_template_and_read_back(pipelines):
    for family in ("llada", "dream"):
        pipe = pipelines[family]
        model = model_of(pipe)
        text = model.chat_text(TURNS)
        assert pipe.layout.spelled_ids(text) == pipe.layout.ids(TURNS)
        begun = model.chat_text(TURNS[:3], answer=False)
        assert begun.endswith("two owls") and text.startswith(begun)
        asked = [(Context(text), {"max_gen_toks": 5})]
        own = pipe.chat([TURNS], 5, temperature=0.0, generator=[Context(text).seed(0)])
        assert in_order(model.write(asked)) == [pipe.texts.decode(own.text_ids[0])]
        scored = in_order(model.log_likelihoods([(Context(text), "two owls")]))[0][0]
        ids = pipe.texts.encode("two owls")
        row = pipe.layout.known(SimpleNamespace(count=1, texts=[ids], turns=[pipe.layout.ids(TURNS)]))
        assert scored == pytest.approx(score_of_rows(pipe, row, Context(text).seed(0)), abs=1e-4)
    with pytest.raises(ValueError, match="mdlm has no chat template here; leave --apply_chat_template out"):
        model_of(pipelines["mdlm"]).chat_text(TURNS)
    with pytest.raises(ValueError, match="answers single questions"):
        model_of(pipelines["native"]).chat_text(TURNS)
    assert model_of(pipelines["native"]).chat_text(TURNS[1:2]) == "owls? "


def test_mmada_answers_without_pictures_too(pipelines):
    model = model_of(pipelines["mmada"])
    assert len(in_order(model.write([(Context("owls?"), {"max_gen_toks": 4})]))) == 1
    assert in_order(model.log_likelihoods([(Context("owls?"), "two owls")]))[0][0] < 0
    with pytest.raises(ValueError, match="lumina needs a picture in every request"):
        list(model_of(pipelines["lumina"]).log_likelihoods([(Context("owls?"), "two")]))


def test_the_batch_shrinks_until_it_fits(pipelines):
    pipe, most = pipelines["llada"], []

    def hidden(ids, *rest, own=pipe.transformer.hidden, **more):
        most.append(len(ids))
        if len(ids) > 1:
            raise torch.OutOfMemoryError("too many rows")
        return own(ids, *rest, **more)

    expected = in_order(model_of(pipe).log_likelihoods(ASKED))
    pipe.transformer.hidden = hidden
    try:
        assert in_order(model_of(pipe, batch_size="auto", max_batch_size=4).log_likelihoods(ASKED)) == expected
        with pytest.raises(torch.OutOfMemoryError):
            in_order(model_of(pipe, batch_size=4).log_likelihoods(ASKED))
    finally:
        del pipe.transformer.hidden
    assert max(most) > 1


def test_what_is_said_about_a_model_holds_its_settings_and_how_sure_it_is(pipelines):
    model = model_of(pipelines["llada"], seed=7, cache="dual", cfg=0.5)
    list(model.log_likelihoods(ASKED))
    about = model.about()
    assert about["family"] == "llada" and about["seed"] == 7 and about["draws"] == 4 and about["mean_half_width"] > 0
    assert about["cache"] == "dual" and about["guidance_scale"] == 1.5


def test_words_have_no_marks_of_pictures():
    assert without_marks("<image>\nwhat is <image 1> this?") == "what is this?"
    seeds = {Context("a").seed(0), Context("b").seed(0), Context("a").seed(1), Context("a").seed(0, 1)}
    seeds |= {Context("a", (picture(0),)).seed(0), Context("a", (picture(1),)).seed(0)}
    assert len(seeds) == 6 and all(0 <= seed < 1 << 62 for seed in seeds)


@pytest.mark.parametrize(
    "given, sentence",
    [
        ({}, "lacks pretrained="),
        ({"pretrained": "x", "drwas": 3}, "has no 'drwas'; did you mean 'draws'"),
        ({"pretrained": "x", "stepz": 3}, "did you mean 'steps'"),
        ({"pretrained": "x", "trust_remote_code": True}, "has no 'trust_remote_code'"),
        ({"pretrained": "x", "draws": 0}, "draws is 0"),
        ({"pretrained": "x", "cache": "duall"}, "did you mean 'dual'"),
        ({"pretrained": "x", "batch_size": "many"}, "batch_size is 'many'"),
        ({"pretrained": "x", "task": "draw"}, "task is 'draw'; expected one of auto, answer, caption"),
        ({"pretrained": "x", "gen_length": 3, "max_new_tokens": 3}, "mean the same"),
        ({"pretrained": "x", "draws": 3, "mc_num": 3}, "gives draws twice, once as mc_num"),
    ],
)
def test_wrong_arguments_are_one_sentence(given, sentence):
    with pytest.raises(ValueError, match=sentence) as raised:
        HarnessSettings.of(**given)
    assert "\n" not in str(raised.value)


def test_what_a_model_is_not_asked(pipelines):
    pipe, shown = pipelines["native"], picture(0)
    with pytest.raises(ValueError, match="has 2 pictures"):
        list(model_of(pipe).write([(Context("what?", (shown, shown)), {})]))
    with pytest.raises(ValueError, match="no words to score"):
        list(model_of(pipelines["llada"]).log_likelihoods([(Context("a"), "")]))
    with pytest.raises(ValueError, match="until is 3"):
        Wish.of({"until": 3}, HarnessSettings.of(pretrained="x"))
    with pytest.raises(ValueError, match="check_greedy is for texts and answers"):
        list(model_of(pipe, check_greedy=True).log_likelihoods([(Context("a"), " fox")]))
    bare = pipelines["llada"]
    template = replace(bare.layout.template, marks={})
    lone = type(bare)(**{**bare.components, "layout": replace(bare.layout, template=template)})
    with pytest.raises(ValueError, match="llada has no chat template here"):
        model_of(lone).chat_text(TURNS)
