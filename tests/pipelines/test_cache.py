"""Caches, blocks and thresholds by name on every task, and the call that finds the task."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from pass_tape import TapeRecorder
from PIL import Image
from tiny_pipeline import SIZE, tiny_pipeline

from unidiff.decoding import CacheConfig, Guidance, ModalityDecoding, NoCache, Sampler, SamplerConfig
from unidiff.decoding.cache import CacheByRow
from unidiff.decoding.cache.config import LEAST_GAIN, OVERHEAD_TOKENS, choose_cache, suited
from unidiff.models.transformer import MaskedTransformer
from unidiff.pipelines.options import DecodeOptions
from unidiff.pipelines.settings import TASKS
from unidiff.pipelines.tasks.choose import choose_task
from unidiff.tokens import Span, TokenBatch, Vocabulary

HEIGHT, WIDTH = SIZE


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def picture():
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def inputs(picture):
    hole = Image.new("L", (WIDTH, HEIGHT))
    hole.paste(255, (0, 0, WIDTH // 2, HEIGHT))
    return {
        "text_to_image": {"prompt": "a dog"},
        "caption": {"image": picture},
        "answer": {"image": picture, "question": "what?"},
        "inpaint": {"image": picture, "mask_image": hole, "text": "a <mask> on a <mask:2>"},
        "generate": {},
    }


CACHES = [
    "prefix",
    "dual",
    CacheConfig("vicinity", {"warmup": 1, "look_back": 1, "look_ahead": 1}),
    "interval",
    CacheConfig("adaptive", {"full_layers": ()}),  # the model has one layer
    "max-logit",
    CacheConfig("dual", {"drift": 0.3}),
    suited("both"),
]


@pytest.mark.parametrize("task", TASKS)
def test_recorded_passes_give_the_same_tokens(pipe, inputs, task):
    options = dict(generator=[3], steps=6, threshold=2.0, output_type="codes")  # one token of a text per pass
    tape = TapeRecorder()
    plain, taped, on_cpu = (getattr(pipe, task)(**inputs[task], **options, graphs=g) for g in (False, tape, True))
    assert torch.equal(plain.ids, taped.ids) and torch.equal(plain.ids, on_cpu.ids)
    assert tape.repeated > 0


@pytest.mark.parametrize("task", TASKS)
def test_every_task_takes_every_cache(pipe, inputs, task):
    options = dict(generator=[3], steps=4, output_type="codes")
    plain = getattr(pipe, task)(**inputs[task], **options)
    assert plain.cache == CacheConfig("none") and plain.cache_note == ""
    assert plain.stats.full_passes > 0 == plain.stats.partial_passes
    for cache in (*CACHES, *(["modality"] if task != "text_to_image" else [])):
        result = getattr(pipe, task)(**inputs[task], **options, cache=cache)
        assert result.cache == CacheConfig.of(cache)
        assert result.stats.partial_passes > 0
        per_pass = [r.stats.model_tokens / r.stats.evaluations for r in (result, plain)]
        assert per_pass[0] < per_pass[1]  # alternating modalities makes more passes
        known = (result.confidences == 1) & (plain.confidences == 1)
        assert known.any() and torch.equal(result.ids[known], plain.ids[known])
    exact = getattr(pipe, task)(**inputs[task], **options, cache=CacheConfig("dual", {"interval": 1}))
    assert torch.equal(exact.ids, plain.ids)
    own = getattr(pipe, task)(**inputs[task], **options, policy=NoCache())
    assert own.cache is None and torch.equal(own.ids, plain.ids)


def test_auto_says_what_it_took(pipe, inputs):
    """Rows of 16 tokens gain nothing; longer ones do, each task by what it decodes."""
    options = dict(generator=[3], output_type="codes", guidance_scale=1.0)
    for task in TASKS:
        short = getattr(pipe, task)(**inputs[task], **options, cache="auto")
        plain = getattr(pipe, task)(**inputs[task], **options)
        assert short.cache == CacheConfig("none") and torch.equal(short.ids, plain.ids)
        assert short.cache_note.startswith("none: texts lose" if task in ("caption", "answer") else "none: at ")
    large = tiny_pipeline(grid=(16, 16))
    options = dict(cache="auto", generator=[3], output_type="codes", temperature=1.0)
    drawn = large.text_to_image("a dog", **options)
    assert drawn.cache == suited("image") and drawn.cache_note.startswith("interval: makes decodes")
    assert drawn.stats.partial_passes > 0
    both = large.generate(**options, guidance_scale=2.0)
    assert both.cache == suited("both") and both.cache_note.startswith("segments: makes decodes")
    assert both.stats.partial_passes > 0


VOCABULARY = Vocabulary.unified(11, 7)


def choose(batch: TokenBatch, config: SamplerConfig, **model):
    net = MaskedTransformer(VOCABULARY.size, hidden_size=16, num_layers=1, num_heads=2, **model)
    return choose_cache("auto", None, batch, config, net)


def test_auto_follows_length_rows_and_passes():
    prompt = Span.text([1] * 256, True)
    batch = TokenBatch.from_spans([[prompt, Span.masked_text(12, VOCABULARY)]])
    quota = SamplerConfig(text=ModalityDecoding(steps=12))
    assert choose(batch, quota).config == suited("text")
    fixed = OVERHEAD_TOKENS
    expected = 12 * (268 + fixed) / (2 * (268 + fixed) + 10 * (12 + fixed))
    assert f"{expected:.2f} times" in choose(batch, quota).note
    once = SamplerConfig(text=ModalityDecoding(steps=1))
    assert choose(batch, once).config == CacheConfig("none") and f"less than {LEAST_GAIN}" in choose(batch, once).note
    short = TokenBatch.from_spans([[Span.text([1] * 64, True), Span.masked_text(12, VOCABULARY)]])
    assert choose(short, quota).config == CacheConfig("none")
    found = choose(TokenBatch.cat([short] * 16), quota)  # whatever the number of rows
    assert (found.config, found.note) == (choose(short, quota).config, choose(short, quota).note)


def test_auto_chooses_row_by_row():
    """A long row gets the cache that it gets alone, a short one none, in one decode."""
    long = TokenBatch.from_spans([[Span.text([1] * 256, True), Span.masked_text(12, VOCABULARY)]])
    short = TokenBatch.from_spans([[Span.text([1] * 20, True), Span.masked_text(12, VOCABULARY)]])
    drawn = TokenBatch.from_spans([[Span.text([1] * 16, True), Span.masked_image((16, 16), VOCABULARY)]])
    config = SamplerConfig(text=ModalityDecoding(steps=12), image=ModalityDecoding(steps=64), guidance=Guidance(2.0))
    net = MaskedTransformer(VOCABULARY.size, hidden_size=16, num_layers=1, num_heads=2).double()
    torch.nn.init.normal_(net.blocks[0].attention.out.weight)
    parts, seeds = [short, long, drawn, long], torch.tensor([3, 4, 5, 6])
    batch = TokenBatch.cat(parts)
    mixed = choose_cache("auto", None, batch, config, net)
    assert isinstance(mixed.policy, CacheByRow) and mixed.config == suited("text")
    assert [n in mixed.note for n in ("1 of 4 rows none", "2 of 4 rows dual", "1 of 4 rows interval")] == [True] * 3
    together = Sampler(net, VOCABULARY, config, mixed.policy)(batch, seeds)
    for number, part in enumerate(parts):
        own = choose_cache("auto", None, part, config, net)
        assert own.config == [CacheConfig("none"), suited("text"), suited("image"), suited("text")][number]
        alone = Sampler(net, VOCABULARY, config, own.policy)(part, seeds[number : number + 1])
        assert torch.equal(together.batch.ids[number, : part.shape[1]], alone.batch.ids[0])


def test_auto_keeps_no_picture_while_it_is_described():
    picture = Span.image(torch.full((16, 16), 13), True)
    seen = TokenBatch.from_spans([[picture, Span.masked_text(12, VOCABULARY)]])
    found = choose(seen, SamplerConfig(text=ModalityDecoding(steps=12)))
    assert found.config == CacheConfig("none") and found.note.startswith("none: texts lose too much")


def test_auto_counts_the_passes_that_evaluate_guidance():
    """A guided row is two; between evaluations only one of them is computed."""
    picture = [Span.text([1] * 16, True), Span.masked_image((16, 16), VOCABULARY)]
    batch = TokenBatch.from_spans([picture])
    plain, guided = (SamplerConfig(image=ModalityDecoding(steps=256), guidance=Guidance(s)) for s in (1.0, 2.0))
    assert choose(batch, plain).config == CacheConfig("none")
    work, fixed = 0, OVERHEAD_TOKENS
    for n in range(256):  # the whole row every few passes, and all that is open in between
        streams = 2 if n % 2 == 0 or n < 2 else 1
        work += streams * (272 if n % suited("image").options["interval"] == 0 else 257 - n) + fixed
    gain = 256 * (2 * 272 + fixed) / work
    assert choose(batch, guided).config == suited("image") and f"{gain:.2f} times" in choose(batch, guided).note


def test_auto_knows_what_models_can_do():
    batch = TokenBatch.from_spans([[Span.text([1] * 300, True), Span.masked_text(12, VOCABULARY)]])
    config = SamplerConfig()
    causal = dict(attention="block_causal", block_length=4)
    assert choose(batch, config, **causal).config == CacheConfig("block-causal")
    timed = choose(batch, config, **causal, time_conditioning=True)
    assert timed.config == CacheConfig("none") and "change with the time" in timed.note
    other = choose_cache("auto", None, batch, config, object())
    assert other.config == CacheConfig("none") and "object computes whole rows only" in other.note


def test_block_length_and_threshold_reach_the_sampler(pipe, inputs):
    """4 codes in blocks of 2 with 1 pass each; a threshold of 0 takes everything at once."""
    for task, passes in (("text_to_image", 3), ("caption", 5)):
        options = dict(generator=[3], guidance_scale=1.0, output_type="codes", max_text_tokens=9)
        options = {k: v for k, v in options.items() if task == "caption" or k != "max_text_tokens"}
        blocks = getattr(pipe, task)(**inputs[task], **options, block_length=2, threshold=-1.0)
        once = getattr(pipe, task)(**inputs[task], **options, threshold=-1.0)
        assert 1 < blocks.nfe <= passes and once.nfe == 1
    mixed = pipe.generate(generator=[3], steps=6, threshold={"text": -1.0, "image": 2.0}, guidance_scale=1.0)
    assert mixed.nfe == 1 + 6  # a caption at once, then one code per pass


def test_overrides_keep_the_rest():
    base = SamplerConfig(text=ModalityDecoding(rule="hierarchical", block_length=8), image=ModalityDecoding(steps=5))
    changed = DecodeOptions(block_length={"image": 4}, threshold={"text": 0.7, "image": 0.3}).apply(base)
    assert (changed.text.rule, changed.text.threshold, changed.text.block_length) == ("hierarchical", 0.7, 8)
    assert (changed.image.rule, changed.image.threshold, changed.image.block_length) == ("threshold", 0.3, 4)
    steps = DecodeOptions(steps=3, threshold={"text": 0.7}).apply(base)
    assert (steps.text.rule, steps.image.rule, steps.image.steps) == ("threshold", "quota", 3)
    ahead = ModalityDecoding(rule="threshold", block_length=2, blocks_in_flight=9, flight_threshold=0.9)
    surer = DecodeOptions(threshold={"text": 0.7}).apply(replace(base, text=ahead)).text
    assert (surer.blocks_in_flight, surer.threshold, surer.flight_threshold) == (9, 0.7, 0.7)
    counted = DecodeOptions(steps=3).apply(replace(base, text=ahead)).text
    assert (counted.rule, counted.steps, counted.block_length, counted.blocks_in_flight) == ("quota", 3, None, 1)
    for drawn in (False, True):  # one number is of what the task decodes
        once = DecodeOptions(threshold=0.5).apply(SamplerConfig(), drawn)
        assert (once.image.rule == "threshold") == drawn and (once.text.threshold == 0.5) == (not drawn)
    entropy = DecodeOptions(threshold=0.5).apply(SamplerConfig(text=ModalityDecoding(confidence="entropy")))
    assert entropy.text.confidence == "probability"


def test_a_call_finds_its_task(pipe, inputs, picture):
    for task in TASKS:
        called = pipe(**inputs[task], generator=[5], steps=2, output_type="codes")
        asked = pipe(**inputs[task], task=task, generator=[5], steps=2, output_type="codes")
        direct = getattr(pipe, task)(**inputs[task], generator=[5], steps=2, output_type="codes")
        assert torch.equal(called.ids, direct.ids) and torch.equal(asked.ids, direct.ids)
    assert choose_task({"image": picture, "text": "a <mask>"}) == "inpaint"
    assert choose_task({"image": picture}, "generate") == "generate"
    assert choose_task({"text": "a <mask>"}) == "generate"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipe: pipe("a dog", question="what?"), "no task takes prompt and question together"),
        (lambda pipe: pipe("a dog", task="caption"), "task 'caption' was given \\['prompt'\\]; it needs \\['image'\\]"),
        (lambda pipe: pipe("a dog", task="draw"), "task is 'draw'; expected one of text_to_image"),
        (
            lambda pipe: pipe("a dog", cache="duel"),
            "cache is 'duel'; expected one of auto, adaptive.*did you mean 'dual'",
        ),
        (lambda pipe: pipe("a dog", cache="dual", policy=NoCache()), "cache and policy both"),
        (lambda pipe: pipe("a dog", cache=NoCache()), "cache is a NoCache"),
        (lambda pipe: pipe("a dog", block_length=0), "block_length is 0"),
        (lambda pipe: pipe("a dog", threshold={"sound": 0.5}), "threshold names \\['sound'\\]"),
    ],
)
def test_mistakes_are_named(pipe, call, message):
    with pytest.raises(ValueError, match=message):
        call(pipe)
