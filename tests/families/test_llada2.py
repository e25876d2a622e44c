"""LLaDA2's configs, settings of decoding, ends of texts, editing, rows and folders; its numbers are in `test_llada2_golden`."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from published_values import PUBLISHED
from released_pipelines import write_chat
from safetensors.torch import save_file
from tiny_families import family
from torch import Tensor

from unidiff import UniDiffPipeline
from unidiff.decoding import ModalityDecoding, Sampler, SamplerConfig, SamplerOutput
from unidiff.decoding.cache import BlockCausalCache
from unidiff.decoding.commit.at_least import AtLeast
from unidiff.decoding.commit.base import BlockPass
from unidiff.families.checkpoint.convert import convert
from unidiff.families.checkpoint.load import load_released
from unidiff.families.checkpoint.small_memory import quantise
from unidiff.families.checkpoint.verify import describe, formula_weights, verify
from unidiff.families.family import recognise
from unidiff.families.llada2 import CONFIG, LLADA2, llada2_sampler, llada2_settings
from unidiff.tokens import Span, TokenBatch

TINY = LLADA2.tiny.config
EOS = TINY["eos_token_id"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"score_function": "softmax"}, "score_function = 'softmax'; only 'sigmoid'"),
        ({"norm_topk_prob": False}, "norm_topk_prob = False; only True"),
        ({"use_qkv_bias": True}, "use_qkv_bias = True"),
        ({"n_group": 3}, "router_groups = 3 must divide"),
        ({"num_experts_per_tok": 5}, "may choose from 4 experts"),
        ({"head_dim": 10}, "a head has 10 features"),
        ({"num_nextn_predict_layers": 1}, "num_nextn_predict_layers"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "only plain rotary positions"),
        ({"mask_token_id": None}, "no mask_token_id"),
    ],
)
def test_other_configurations_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        config = {**TINY, **change}
        LLADA2.make(config)
        LLADA2.vocabulary(config)


def test_what_a_config_leaves_out():
    bare = {
        k: v for k, v in TINY.items() if k not in ("block_length", "partial_rotary_factor", "n_group", "topk_group")
    }
    settings = llada2_settings({**bare, "num_shared_experts": None, "first_k_dense_replace": None})
    assert (settings["block_length"], settings["rope_share"], settings["router_groups"]) == (32, 1.0, 1)
    assert settings["shared_expert_size"] == 0 and settings["dense_layers"] == ()
    assert LLADA2.vocabulary(CONFIG).mask_id == 156895  # in no config
    with pytest.raises(ValueError, match=r"llada2 or llada2-uni, which only a config\.json tells apart"):
        recognise({}, formula_weights(LLADA2))
    assert recognise(TINY, formula_weights(LLADA2)) is LLADA2


def test_the_sampler_has_upstreams_defaults():
    stated, vocabulary = PUBLISHED["llada2.1-mini"].sampling, LLADA2.vocabulary(CONFIG)
    text = llada2_sampler(vocabulary).text
    assert (text.block_length, text.block_steps, text.threshold) == (
        stated["block_length"],
        stated["steps"],
        stated["threshold"],
    )
    assert text.edit_threshold is None and text.block_order == "aligned" and text.temperature == 0
    text = llada2_sampler(vocabulary, edit_threshold=stated["edit_threshold"]).text
    assert (text.edit_passes, text.least_tokens, text.block_steps) == (stated["edit_passes"], stated["least"], None)
    assert SamplerConfig.from_dict(SamplerConfig(text=text).to_dict()).text == text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(rule="at_least", block_steps=4), "block_steps is 4, but there are no blocks"),
        (dict(edit_threshold=0.5, remask="confidence"), "edit_threshold does not go with remask"),
        (dict(edit_threshold=0.5, rule="first_hitting"), "edit_threshold does not go with rule = 'first_hitting'"),
        (dict(edit_threshold=0.5, rule="credit", temperature=0.0), "edit_threshold does not go with rule = 'credit'"),
        (dict(edit_threshold=0.5, rule="threshold", block_length=4, blocks_in_flight=2), "blocks_in_flight = 2"),
        (dict(edit_threshold=1.5), "edit_threshold is 1.5"),
    ],
)
def test_settings_that_do_not_go_together(settings, words):
    with pytest.raises(ValueError, match=words):
        ModalityDecoding(**settings)


def test_quotas_by_hand():
    rule = AtLeast(ModalityDecoding(rule="at_least", block_length=8, block_steps=3, threshold=0.5), torch.zeros(1, 8))
    counts = []
    for step, left in ((0, 8), (1, 5), (2, 2), (2, 1), (0, 0)):
        one = torch.tensor([left])
        counts.append(int(rule.count(BlockPass(torch.ones(1, 8).bool(), one, one, torch.tensor([step]), one))))
    assert counts == [3, 3, 2, 1, 0]
    confidence, real = torch.tensor([[0.5, 0.9, 0.6, 0.7]]).double(), torch.ones(1, 4, dtype=torch.bool)

    def pick(count: int) -> list[bool]:
        return rule.pick(confidence, confidence, real, torch.tensor([count]), torch.arange(4)[None])[0].tolist()

    assert pick(2) == pick(3) == [False, True, True, True]  # three are strictly above
    assert pick(4) == [True] * 4  # a quota of four is not reached: the surest four
    assert pick(0) == [False] * 4


def rows(prompts: list[list[int]], tokens: int = 12) -> TokenBatch:
    vocabulary = LLADA2.vocabulary(TINY)
    made = [[Span.text(p, True), Span.masked_text(tokens + -len(p) % 4, vocabulary)] for p in prompts]
    return TokenBatch.from_spans(made, left=True)


def decode(batch: TokenBatch, config: SamplerConfig) -> SamplerOutput:
    tiny = family("llada2")
    seeds = torch.zeros(len(batch.ids), dtype=torch.long)
    return Sampler(tiny.model, tiny.vocabulary, config, BlockCausalCache())(batch, seeds, record=True)


class Favoured:
    """The tiny model, to which end-of-text appeals more; changes nothing of it."""

    def __init__(self, by: float) -> None:
        self.inner, self.by = family("llada2").model, by

    def __getattr__(self, name: str):
        return getattr(self.inner, name)

    def head(self, hidden: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        logits = self.inner.head(hidden, start, stop)
        logits[..., EOS - start] += self.by
        return logits

    def hidden(self, *args) -> Tensor:
        return self.inner.hidden(*args)


def ended(by: float, **settings) -> SamplerOutput:
    vocabulary = family("llada2").vocabulary
    config = llada2_sampler(vocabulary, 4, steps=4, threshold=0.9, **settings)
    batch = rows([[1, 2, 3, 4, 5], [6, 7, 8]], 40)
    return Sampler(Favoured(by), vocabulary, config)(batch, torch.zeros(2, dtype=torch.long), record=True)


def test_an_early_end_ends_the_row():
    """At once, or when its block is complete; upstream goes on with later blocks, or leaves masks."""
    found = {}
    for early in (True, False):
        out = found[early] = ended(2.5, stop_early=early)
        targets = out.batch.targets
        for row, ids in enumerate(out.batch.ids):
            answer = ids[targets[row]]
            first = int((answer == EOS).nonzero()[0])
            assert bool((answer[first:] == EOS).all()) or not early  # what was decoded behind it in the block stays
        assert out.steps < 20
    assert found[True].steps < found[False].steps
    decoded = {}
    for early, out in found.items():  # end-of-text that was only filled in is certain
        blocks, inside = out.batch.positions[..., 0] // 4, out.batch.targets & (out.confidence < 1)
        ends = [int(((ids == EOS) & targets[row]).nonzero()[0]) for row, ids in enumerate(out.batch.ids)]
        own = [(blocks[row] == blocks[row, end]) & targets[row] for row, end in enumerate(ends)]
        decoded[early] = [bool(inside[row][block].all()) for row, block in enumerate(own)]
    assert all(decoded[False]) and not all(decoded[True])


def test_an_end_inside_the_prompt_ends_nothing():
    vocabulary = family("llada2").vocabulary
    config = llada2_sampler(vocabulary, 4, steps=2, threshold=1.0)
    config = replace(config, text=replace(config.text, forbid=(*config.text.forbid, EOS)))
    out = decode(rows([[1, EOS, 3, EOS, 5]]), config)
    assert not bool((out.batch.ids[out.batch.targets] == EOS).any()) and out.steps == 8


def test_editing_ends_and_masks_nothing():
    """At a threshold of 0 every pass may change every token of the block; its number is bounded, and no token becomes [MASK]."""
    mask = TINY["mask_token_id"]
    for passes in (0, 1, 3):
        config = llada2_sampler(family("llada2").vocabulary, 4, threshold=0.99, edit_threshold=0.0, edit_passes=passes)
        out = decode(rows([[1, 2, 3], [4, 5, 6, 7, 8, 9]]), replace(config, stop_at_eos=False))
        targets = out.batch.targets
        assert not bool((out.batch.ids == mask).any())
        assert all(not bool(((a != mask) & (b == mask)).any()) for a, b in pairwise(out.trajectory))
        blocks, edited = out.batch.positions[..., 0] // 4, False
        for before, after in pairwise(out.trajectory):
            changed = before != after
            assert not bool((changed & ~targets).any())
            for row in range(2):  # of the block that is decoded alone
                assert len(blocks[row][changed[row]].unique()) <= 1
            edited |= bool((changed & (before != mask)).any())
        assert edited
        assert out.steps <= int(targets.sum(1).max()) + passes * 4
    quiet = decode(rows([[1, 2, 3]]), llada2_sampler(family("llada2").vocabulary, 4, edit_threshold=1.0, edit_passes=5))
    assert quiet.steps <= 13 + 4 + 1  # one more pass per block, in which nothing changed


def test_a_folder_is_described_verified_quantised_and_converted_both_ways(tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "config.json").write_text(json.dumps(TINY))
    model, _ = LLADA2.load(formula_weights(LLADA2), TINY)
    weights = {n: v.contiguous() for n, v in LLADA2.export(model, {"experts": "stacked"}).items()}
    save_file(weights, theirs / "model.safetensors")
    found = describe(theirs)
    assert found.parameters - found.active == 2 * 6 * 3 * 16 * 8 and found.settings["block_length"] == 4
    assert all(
        check.passed for check in verify(theirs).checks if "published" not in check.name and "number" not in check.name
    )
    convert(theirs, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back")
    back = load_released(tmp_path / "back").state_dict()
    assert set(back) == set(weights) and all(torch.equal(back[n], v) for n, v in weights.items())


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_few_bits_change_answers_little(kind):
    pytest.importorskip("torchao", reason="the extra `quantise` (torchao) is not installed")
    config = {**TINY, "hidden_size": 64, "head_dim": 32, "intermediate_size": 64, "moe_intermediate_size": 32}
    torch.manual_seed(0)
    models = [LLADA2.make(config).bfloat16().eval() for _ in range(2)]
    for value in models[0].parameters():
        torch.nn.init.normal_(value, std=0.1)
    models[1].load_state_dict(models[0].state_dict())
    quantise(models[1], kind)
    batch = rows([[1, 2, 3, 4]])
    with torch.no_grad():
        first, second = (m(batch).float() for m in models)
    assert 0 < float((first - second).norm() / first.norm()) < (0.1 if kind == "int8" else 0.35)


def test_a_pipeline_answers_in_batches_with_the_exact_cache(tmp_path):
    write_chat(tmp_path, "llada2")
    pipe = UniDiffPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.layout.tasks == ("chat", "complete")
    asked = ["a fox?", "two red owls on a hill?", [{"role": "user", "content": "a hill"}]]
    out = pipe.chat(asked, 6, generator=0)
    assert out.cache.policy == "block-causal" and len(out.text_ids) == 3
    for row, turns in enumerate(asked):
        alone = pipe.chat([turns], 6, generator=[int(out.seeds[row])], cache="none")
        assert alone.text_ids == [out.text_ids[row]] and alone.cache.policy == "none"
    assert all(len(ids) <= 6 for ids in out.text_ids)
    assert int(out.ids.shape[1]) % 4 == 0  # rows go on to the end of a block of attention
    with pytest.raises(ValueError, match=r"llada2 cannot do 'infill'; it does chat, complete"):
        pipe.infill("a <mask> fox")
    assert len(pipe.complete(["a red", "two"], 5, generator=1).texts) == 2
