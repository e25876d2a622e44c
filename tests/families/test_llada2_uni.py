"""LLaDA2.0-Uni: which checkpoints are its own, rows and batches, what decodes cost, folders; its numbers are in `test_llada2_uni_golden`."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from published_values import PUBLISHED
from released_pipelines import write_uni
from safetensors.torch import load_file

from unidiff import UniDiffPipeline
from unidiff.decoding import CacheConfig, Guidance, Sampler
from unidiff.decoding.cache import BlockCausalCache, SprintCache
from unidiff.decoding.commit.base import BlockPass
from unidiff.decoding.commit.even_share import EvenShare
from unidiff.decoding.config import ModalityDecoding
from unidiff.families.checkpoint.convert import convert
from unidiff.families.checkpoint.load import load_released
from unidiff.families.checkpoint.small_memory import quantise
from unidiff.families.checkpoint.verify import describe, formula_weights, verify
from unidiff.families.family import recognise
from unidiff.families.layout import TaskInputs
from unidiff.families.llada2 import LLADA2
from unidiff.families.llada2_uni import LLADA2_UNI, RELEASED, LLaDA2UniLayout
from unidiff.families.llada2_uni.rows import MARKS, NUMBER, uni_image_sampler
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Vocabulary

PROMPTS = ["a red fox", "two owls on a hill", "a"]
WHOLE = {"output_type": "codes"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("uni")
    write_uni(place)
    return place


@pytest.fixture
def pipe(folder):
    made = UniDiffPipeline.from_pretrained(folder)
    made.set_progress_bar_config(disable=True)
    return made


def test_codes_behind_the_words_tell_it_from_llada2():
    names = list(formula_weights(LLADA2_UNI))
    bare = {key: value for key, value in RELEASED.items() if key not in ("image_token_offset", "model_type")}
    bare["architectures"] = ["LLaDA2MoeModelLM"]
    for config in (RELEASED, bare, LLADA2_UNI.tiny.config):
        assert recognise(config, names) is LLADA2_UNI
    ids = LLADA2_UNI.vocabulary(bare)
    assert ids == LLADA2_UNI.vocabulary(RELEASED)
    assert (ids.text, ids.image, ids.mask_id) == ((0, 157184), (157184, 173568), 156895)
    assert {"soi": 156901, "eoi": 156902, "boi": 156904, "eos": 156892}.items() <= ids.specials.items()
    assert recognise({**LLADA2.tiny.config, "image_token_offset": 40}, names) is LLADA2  # no id is left for a code
    with pytest.raises(ValueError, match="no image_token_offset"):
        LLADA2_UNI.vocabulary(LLADA2.tiny.config)
    with pytest.raises(ValueError, match="expected no more than that"):
        LLADA2_UNI.vocabulary({**LLADA2_UNI.tiny.config, "image_token_offset": 99})


def test_defaults_are_upstreams():
    stated, image, edits = PUBLISHED["llada2.0-uni"].sampling, uni_image_sampler(), uni_image_sampler(steps=8)
    own = image.image
    assert (own.block_length, own.block_steps, own.threshold) == tuple(
        stated[name] for name in ("block_length", "steps", "threshold")
    )
    assert image.guidance == Guidance(stated["guidance"], chained=True, rescale=stated["rescale"])
    assert edits.image.block_steps == stated["edit_steps"] and own.temperature == 0


def test_a_row_of_a_batch_is_the_row_alone(pipe):
    """Prompts of different lengths, in every task, with the exact cache, without one, and refreshed in every pass."""
    caches = (None, "none", CacheConfig("interval", {"interval": 1}))
    drawn = pipe.text_to_image(PROMPTS, height=4, width=8, generator=0)
    assert drawn.codes.shape == (3, 2, 4) and drawn.cache.policy == "block-causal"
    assert len({str(codes.tolist()) for codes in drawn.codes}) == 3
    pictures = drawn.images
    edited = pipe.edit(pictures, PROMPTS, generator=0, image_guidance_scale=2.5)
    asked = pipe.answer(pictures, PROMPTS, 6, generator=0)
    for row, (prompt, picture) in enumerate(zip(PROMPTS, pictures, strict=True)):
        for cache in caches:
            alone = pipe.text_to_image(prompt, height=4, width=8, generator=0, cache=cache)
            assert torch.equal(alone.codes[0], drawn.codes[row])
        alone = pipe.edit(picture, prompt, generator=0, image_guidance_scale=2.5, cache="none")
        assert torch.equal(alone.codes[0], edited.codes[row])
        assert pipe.answer(picture, prompt, 6, generator=0, cache="none").text_ids == [asked.text_ids[row]]
    assert len(pipe.caption(pictures, 5, generator=0).texts) == 3
    first = pipe.vocabulary.image[0]
    assert all(i < first for ids in asked.text_ids for i in ids)


def test_what_guidance_leads_away_from_may_be_longer_than_the_prompt(pipe):
    """Then the unconditional rows begin before the others, whose padding no cache may skip."""
    away = "two owls on a hill and a red fox on two hills"
    options = {"height": 4, "width": 8, "generator": 0, "guidance_scale": 3.0}
    found = [
        pipe.text_to_image(["a", PROMPTS[1]], negative_prompt=away, cache=cache, **options) for cache in (None, "none")
    ]
    assert torch.equal(*(out.codes for out in found))
    torch.testing.assert_close(*(out.confidences for out in found), atol=1e-5, rtol=0)
    alone, other = (pipe.text_to_image("a", negative_prompt=said, **options) for said in (away, None))
    assert torch.equal(alone.codes[0], found[0].codes[0])
    codes = slice(-8, None)
    assert not torch.allclose(alone.confidences[:, codes], other.confidences[:, codes], atol=1e-3)


def test_edits_pay_for_the_directions_that_they_use(pipe):
    """Two streams a pass with upstream's default, by which the pictures' direction is off; three where it is on."""
    picture = pipe.text_to_image("a red fox", height=4, width=4, generator=0).images
    plain = pipe.edit(picture, "two owls", generator=0, cache="none")
    both = pipe.edit(picture, "two owls", generator=0, cache="none", image_guidance_scale=2.0)
    passes = {name: out.nfe / (out.stats.full_passes) for name, out in {"plain": plain, "both": both}.items()}
    assert passes == {"plain": 2, "both": 3}
    larger = pipe.edit(picture, "two owls", height=4, width=8, generator=0)
    assert larger.codes.shape == (1, 2, 4)
    for wrong, more in (("mask_image", {"mask_image": torch.ones(4, 4)}), ("reference", {"reference": picture})):
        with pytest.raises(ValueError, match=f"leave {wrong} out"):
            pipe.edit(picture, "two owls", **more)


def test_rows_end_with_the_block_of_the_last_code(pipe):
    """Upstream decodes 64 codes more than it uses."""
    request = pipe.layout.request("text_to_image", TaskInputs(2, PROMPTS[:2], grid=(3, 3)))
    for row in range(2):
        rows = request.batch
        places = rows.positions[row, rows.valid[row], 0]
        assert int(places[-1] + 1) % 4 == 0 and 9 <= int(rows.targets[row].sum()) < 9 + 4
    assert request.picture.sum(1).tolist() == [9, 9]


def test_steps_are_those_of_a_block(pipe):
    """At most; codes above the threshold take fewer."""
    options = {"height": 4, "width": 8, "generator": 0, "cache": "none", "threshold": 1.0, "guidance_scale": 1.0}
    length = pipe.text_to_image("a", **options).ids.shape[1]
    for steps in (1, 2):
        out = pipe.text_to_image("a", steps=steps, **options)
        assert out.nfe <= steps * -(-length // 4) and out.nfe >= steps * 2


def test_sizes_and_holes(pipe):
    assert pipe.layout.tasks == ("text_to_image", "caption", "answer", "edit")
    with pytest.raises(ValueError, match="no mark for 9 rows or columns of codes"):
        pipe.text_to_image("a", height=4, width=18)
    with pytest.raises(ValueError, match="holes are not filled there"):
        pipe.answer(torch.zeros(3, 4, 4), "what <mask> is it?")
    assert pipe.layout.fit(300, 600)[1] > pipe.layout.fit(300, 600)[0]


def test_sprint_in_batches(pipe):
    """Rows with Sprint are the rows alone; it computes more than the exact cache and asks for compat."""
    with pytest.raises(ValueError, match="it goes with compat='upstream'"):
        replace(pipe.layout, sprint=SprintCache())
    sprint = pipe.from_pipe(pipe, layout=replace(pipe.layout, compat="upstream", sprint=SprintCache(0.5, 1)))
    options = {"height": 4, "width": 8, "generator": 0, "threshold": 0.99, "steps": 3}
    together = sprint.text_to_image(PROMPTS, **options)
    assert together.cache is None
    for row, prompt in enumerate(PROMPTS):
        alone = sprint.text_to_image(prompt, **options)
        assert torch.equal(alone.codes[0], together.codes[row])
        exact = pipe.text_to_image(prompt, **options)
        assert exact.stats.model_tokens < alone.stats.model_tokens
    answers = sprint.answer(together.images, PROMPTS, 6, generator=0)
    assert [len(ids) <= 6 for ids in answers.text_ids] == [True] * 3
    with pytest.raises(ValueError, match="compat = 'old'"):
        replace(pipe.layout, compat="old")


def test_the_rule_of_sprint_by_hand():
    rule = EvenShare(
        ModalityDecoding(rule="even_share", block_length=8, block_steps=3, threshold=0.5), torch.zeros(1, 8).bool()
    )
    counts = [
        int(rule.count(BlockPass(torch.ones(1, 8).bool(), n, n, torch.tensor([step]), n)))
        for step, left in ((0, 8), (1, 5), (2, 2), (5, 3))
        for n in [torch.tensor([left])]
    ]
    assert counts == [3, 3, 2, 3]
    with pytest.raises(ValueError, match="block_steps is 3, but there are no blocks"):
        ModalityDecoding(rule="even_share", block_steps=3)


def test_tokens_of_a_large_picture():
    """1,024 px are 32 x 32 codes: in blocks of 32 and 8 passes each, guided, behind 192 words. Counted on a network of one tiny
    layer, which has as many positions to compute as a large one."""
    torch.manual_seed(0)
    shape = dict(hidden_size=8, num_layers=1, num_heads=1, rope="1d", modality_embedding=False)
    vocabulary = Vocabulary(24, (0, 8), (8, 24), 7)
    model = MaskedTransformer(vocabulary.size, **shape, attention="block_causal", block_length=32).eval()
    torch.nn.init.normal_(model.output_weight)
    marks = {name: [1] for name in MARKS} | {NUMBER.format(32): [2]}
    layout = LLaDA2UniLayout(vocabulary, lambda text: [3] * 185, marks, [4], [4], [5, 6])  # 192 tokens with the marks
    layout = replace(layout, image=uni_image_sampler(32, 8, 2.0, threshold=1.0, rescale=0.0))
    tokens = {}
    for name, own, policy in (
        ("exact", layout, BlockCausalCache()),
        ("sprint", replace(layout, compat="upstream", sprint=SprintCache(warmup=1)), SprintCache(warmup=1)),
    ):
        request = own.text_to_image(TaskInputs(1, ["a prompt"]))
        assert request.batch.shape == (1, 192 + 1024)
        out = Sampler(model, vocabulary, request.config, policy)(
            request.batch, torch.zeros(1).long(), unconditional=request.unconditional
        )
        assert out.steps == 32 * 8
        tokens[name] = out.stats.model_tokens
    # in every pass: both streams, up to the end of the block
    baseline = 2 * sum(8 * window for window in range(224, 1217, 32))
    print(f"token-forwards: {tokens}, the baseline {baseline}")
    assert baseline > 18.5 * tokens["exact"] and tokens["sprint"] > 3.1 * tokens["exact"]


def test_a_folder_is_described_verified_and_converted_both_ways(folder, tmp_path):
    found = describe(folder)
    assert found.family == "llada2-uni" and "image codes" in found.lines()["vocabulary"]
    checks = {check.name: check.passed for check in verify(folder).checks}
    assert checks["weights"] and checks["known answer"] and checks["a pass of this checkpoint"]
    convert(folder, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back")
    back, weights = load_released(tmp_path / "back").state_dict(), load_file(folder / "model.safetensors")
    assert set(back) == set(weights) and all(torch.equal(back[n], v) for n, v in weights.items())
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["image_token_offset"] == found.vocabulary.image[0]


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_few_bits_change_answers_little(kind):
    pytest.importorskip("torchao", reason="the extra `quantise` (torchao) is not installed")
    config = {**LLADA2_UNI.tiny.config, "hidden_size": 64, "head_dim": 32, "intermediate_size": 64}
    config["moe_intermediate_size"] = 32
    torch.manual_seed(0)
    models = [LLADA2_UNI.make(config).bfloat16().eval() for _ in range(2)]
    for value in models[0].parameters():
        torch.nn.init.normal_(value, std=0.1)
    models[1].load_state_dict(models[0].state_dict())
    quantise(models[1], kind)
    ids = torch.arange(12)[None]
    positions = ids[..., None].expand(1, 12, 3)
    with torch.no_grad():
        first, second = (m.head(m.hidden(ids, torch.zeros_like(ids), positions)).float() for m in models)
    assert 0 < float((first - second).norm() / first.norm()) < (0.1 if kind == "int8" else 0.35)


def test_the_command_line_draws_and_answers(run, tmp_path):
    """Of the usual size, 32 x 32 codes."""
    folder, picture = tmp_path / "uni", tmp_path / "fox.png"
    write_uni(folder, 32)
    status, _, error = run("generate", "a red fox", "--model", folder, "--out", picture, "--steps", 1)
    assert status == 0 and picture.is_file(), error
    for command in (("caption", picture), ("answer", picture, "what is it?")):
        status, _, error = run(*command, "--model", folder, "--max-text-tokens", 4)
        assert status == 0, error
