"""`UniDiffPipeline.from_pretrained` on LLaDA and Dream: chat, texts that go on, texts with holes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from released_pipelines import TURNS, write_chat
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer

from unidiff.decoding.cache import IntervalCache
from unidiff.families.layout import TaskInputs
from unidiff.pipeline import UniDiffPipeline
from unidiff.pipelines.released import load_texts

TALK = [
    {"role": "user", "content": "owls?"},
    {"role": "assistant", "content": "two owls"},
    {"role": "user", "content": "on a hill?"},
]


@pytest.fixture(scope="module", params=["dream", "llada"])  # families of texts alone
def pipe(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write_chat(folder, request.param)
    return UniDiffPipeline.from_pretrained(folder)


def test_a_row_of_a_batch_is_the_row_alone(pipe):
    assert type(pipe) is UniDiffPipeline and pipe.images is None
    told = pipe.chat(["a fox?", TALK, "two red owls on a hill?"], 6, generator=3)
    assert len(told.texts) == 3 and max(map(len, told.text_ids)) <= 6 and told.images is None
    assert told.nfe == 6 and told.codes.shape == (3, 0, 0)  # a pass per token unless steps say otherwise
    assert len({str(ids) for ids in told.text_ids}) == 3
    for row, turns in enumerate(("a fox?", TALK, ["two red owls on a hill?"])):
        alone = pipe.chat(turns, 6, generator=[int(told.seeds[row])])
        assert alone.text_ids == [told.text_ids[row]]
    assert pipe("a fox?", max_text_tokens=6, generator=[int(told.seeds[0])]).text_ids == [told.text_ids[0]]
    more = pipe.complete(["a red", "two owls on a"], 6, generator=3)
    assert more.text_ids[1] == pipe.complete("two owls on a", 6, generator=[int(more.seeds[1])]).text_ids[0]
    assert more.text_ids[0] != told.text_ids[0]


@pytest.mark.parametrize("length", [33, 40, 50, 65])
def test_an_answer_takes_a_pass_per_token_or_the_steps_asked_for(pipe, length):
    """Also where the last block is short: of 33 tokens in blocks of 32 for instance."""
    request = pipe.layout.request("chat", TaskInputs(1, turns=["a fox?"], longest=length))
    never = (*request.needs.ends, pipe.vocabulary.specials["eos"])  # no early end
    whole = replace(request.config, text=replace(request.config.text, forbid=never))
    for steps, passes in (
        (None, length),
        (length // 2, length // 2),
        (2 * length, length),
        (1, -(-length // (whole.text.block_length or length))),
    ):
        config = whole if steps is None else replace(whole, text=replace(whole.text, steps=steps))
        out = pipe.chat(["a fox?"], length, generator=1, sampler=config)
        assert out.nfe == passes


def test_the_marks_of_the_turns_come_from_the_tokenizer(pipe):
    words = pipe.texts
    asked = pipe.chat("a fox?", 4, generator=0)
    prompt = asked.ids[0, :-4].tolist()
    own = {"llada": "<|startoftext|><|start_header_id|>user", "dream": "<|im_start|>system\nYou are a helpful"}
    assert words.decode(prompt, keep_specials=True).startswith(own[pipe.layout.family])
    assert "a fox?" in words.decode(prompt)
    never = {words.special(name) for name in TURNS[pipe.layout.family][1:3]} - {words.special("eos")}
    assert not never & set(asked.ids[0, -4:].tolist()) or pipe.layout.family == "dream"


def test_holes_are_filled_and_the_rest_stays(pipe):
    encode = pipe.texts.encode
    filled = pipe.infill(["a <mask:2> fox", "two<mask> on a<mask:3>"], generator=1)
    first, second = filled.text_ids
    assert first[: len(encode("a"))] == encode("a") and first[len(encode("a")) + 2 :] == encode(" fox")
    assert len(second) == len(encode("two")) + 1 + len(encode(" on a")) + 3
    assert pipe.vocabulary.mask_id not in first + second
    alone = pipe.infill("a <mask:2> fox", generator=[int(filled.seeds[0])])
    assert alone.text_ids == [first]
    with pytest.raises(ValueError, match="known in full"):
        pipe.infill("a fox")


@pytest.mark.parametrize("cache", ["none", "auto", "prefix", "dual", "vicinity", "interval", "adaptive", "max-logit"])
def test_a_row_with_few_holes_is_filled_the_same_beside_one_with_many(pipe, cache):
    """What is planned for a row (passes, and the warm-up of a cache) is its own."""
    texts = ["two owls on a <mask:2> hill <mask>", "<mask:9>", "a<mask>"]
    for more in ({}, {"steps": 2}):
        filled = pipe.infill(texts, cache=cache, generator=[3, 2, 4], **more)
        for row, text in enumerate(texts):
            alone = pipe.infill(text, cache=cache, generator=[[3, 2, 4][row]], **more)
            assert alone.text_ids == [filled.text_ids[row]]


def test_knobs_caches_and_callbacks(pipe):
    asked = {"max_text_tokens": 8, "generator": 2}
    plain = pipe.chat("a red fox?", **asked)
    fresh = pipe.chat("a red fox?", cache="interval", **asked)
    assert fresh.cache.policy == "interval" and fresh.nfe == plain.nfe
    chosen = pipe.chat("a red fox?", cache="auto", **asked)
    assert chosen.cache is not None and chosen.cache_note and not plain.cache_note
    assert pipe.chat("a red fox?", steps=2, **asked).nfe == 2
    quick = pipe.chat("a red fox?", threshold=0.0, block_length=8, **asked)
    assert quick.nfe == 1  # every token is sure enough
    seen = []

    def watch(owner, step, t, tensors):
        seen.append((owner, t, tensors["open"].sum().item()))
        return len(seen) < 3

    pipe.chat("a red fox?", callback_on_step_end=watch, **asked)
    assert seen[0][0] is pipe and [n for _, _, n in seen[:3]] == [7, 6, 5] and len(seen) == 4
    assert [t for _, t, _ in seen] == [7 / 8, 6 / 8, 5 / 8, 0]
    with pytest.raises(ValueError, match="num_candidates is 2, but chat has no pictures to compare words with"):
        pipe.chat("a", num_candidates=2)
    with pytest.raises(TypeError, match=r"^UniDiffPipeline.chat\(\) has no argument 'stpes'; did you mean 'steps'\?$"):
        pipe.chat("a", stpes=3)
    with pytest.raises(ValueError, match="cache and policy both"):
        pipe.chat("a", cache="dual", policy=IntervalCache(2), **asked)
    with pytest.raises(ValueError, match="output_type is 'jpg'"):
        pipe.chat("a", output_type="jpg", **asked)
    with pytest.raises(ValueError, match="only edit is guided"):
        pipe.chat("a", image_guidance_scale=2.0, **asked)


def test_the_way_of_a_text_is_recorded(pipe, tmp_path):
    told = pipe.chat(["a fox?", TALK], 5, generator=3, record_trajectory=True)
    assert told.trajectory.frames is None and len(told.trajectory.texts) == told.nfe + 1
    assert told.trajectory.texts[0] == ["_ _ _ _ _"] * 2 and told.trajectory.texts[-1] == told.texts
    told.save_gif(tmp_path / "way.gif")
    told.save_filmstrip(tmp_path / "way.png", 3)


def test_what_a_text_model_cannot_do(pipe):
    family = pipe.layout.family
    for task, inputs in (
        ("text_to_image", ("a fox",)),
        ("caption", (None,)),
        ("answer", (None, "what?")),
        ("inpaint", (None,)),
        ("edit", (None, "blue")),
        ("generate", ()),
    ):
        with pytest.raises(ValueError, match=f"^{family} cannot do '{task}'; it does chat, complete, infill$"):
            getattr(pipe, task)(*inputs)
    with pytest.raises(ValueError, match=f"{family} knows no pictures"):
        _ = pipe.image_size
    with pytest.raises(ValueError, match="prompt is empty"):
        pipe.complete(" ")


def test_a_base_model_without_marks_goes_on_with_texts(tmp_path):
    write_chat(tmp_path, "llada", marks=False)
    pipe = UniDiffPipeline.from_pretrained(tmp_path)
    assert len(pipe.complete("a red", 4, generator=0).texts) == 1
    with pytest.raises(ValueError, match=r"no marks for turns; .*or use complete"):
        pipe.chat("a fox?")
    with pytest.raises(ValueError, match="llada knows no pictures; leave image_tokenizer out"):
        UniDiffPipeline.from_pretrained(tmp_path, image_tokenizer=tmp_path)


def test_mdlm_goes_on_with_texts_and_fills_holes(tmp_path):
    write_chat(tmp_path, "mdlm")
    pipe = UniDiffPipeline.from_pretrained(tmp_path)
    assert pipe.layout.tasks == ("complete", "infill")
    more = pipe.complete(["a red", "two owls on a"], 6, steps=4, generator=3)
    assert len(more.texts) == 2 and more.nfe <= 4 and max(map(len, more.text_ids)) <= 6
    assert more.text_ids[1] == pipe.complete("two owls on a", 6, steps=4, generator=[int(more.seeds[1])]).text_ids[0]
    filled = pipe.infill(["a <mask:2> fox", "two<mask>"], generator=1)
    assert (
        filled.text_ids[0][-1:] == pipe.texts.encode(" fox")[-1:] and pipe.vocabulary.mask_id not in filled.text_ids[0]
    )
    assert filled.text_ids[1] == pipe.infill("two<mask>", generator=[int(filled.seeds[1])]).text_ids[0]
    with pytest.raises(ValueError, match="mdlm cannot do 'chat'; it does complete, infill"):
        pipe.chat("a fox?")


def test_dreams_tokenizer_runs_without_its_code(tmp_path):
    letters = {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}
    (tmp_path / "vocab.json").write_text(json.dumps(letters))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    added = {str(256 + i): {"content": w, "special": True} for i, w in enumerate(("<|endoftext|>", "<|im_start|>"))}
    settings = {
        "tokenizer_class": "DreamTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "added_tokens_decoder": added,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "tokenization_dream.py").write_text("raise RuntimeError('this code must not run')")
    texts = load_texts(tmp_path)
    assert isinstance(texts.tokenizer, Qwen2Tokenizer)
    assert texts.decode(texts.encode("a fox")) == "a fox" and texts.size == 258
    assert texts.tokenizer.get_vocab()["<|im_start|>"] == 257 and max(texts.encode("<|im_start|>")) < 256
