"""LLaDA, Fast-dLLM and dLLM-Cache: what their programs do wrong and the default here does right, one test each.

The index of all defects, with those that other modules test, is `test_defects_index`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from reference.batches import llada_batch
from tiny_families import LLADA_CONFIG, family, lively, llada_rows
from torch import Tensor

from unidiff.decoding import Guidance, ModalityDecoding, NoCache, RefreshPolicy, Sampler, SamplerConfig
from unidiff.decoding.cache import AdaptiveCache, DualCache, MaxLogitCache, PrefixCache, VicinityCache
from unidiff.families.llada import LLADA
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Vocabulary

POLICIES: dict[str, RefreshPolicy] = {
    "none": NoCache(),
    "prefix": PrefixCache(),
    "dual": DualCache(),
    "vicinity": VicinityCache(warmup=1, look_back=1, look_ahead=1),
    "adaptive": AdaptiveCache(4, 3, 0.4),
    "max_logit": MaxLogitCache(0.6, 0.2, 4),
}
EACH = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
GREEDY = ModalityDecoding(steps=12, schedule="fixed", block_length=4, temperature=0.0)


def sampler(text: ModalityDecoding = GREEDY, policy: RefreshPolicy | None = None, **config) -> Sampler:
    tiny = family("llada")
    return Sampler(tiny.model, tiny.vocabulary, SamplerConfig(text=text, stop_at_eos=False, **config), policy)


def seeds(batch) -> Tensor:
    return torch.zeros(len(batch.ids), dtype=torch.long)


@EACH
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_prompts_of_any_length_share_a_batch_and_padding_is_not_seen(policy: RefreshPolicy, scale: float):
    """Upstream: one prompt length per batch, attention masks ignored, guidance breaks with a mask."""
    vocabulary, prompts = family("llada").vocabulary, [2, 6, 4]
    batch, run = llada_rows(prompts, vocabulary), sampler(policy=policy, guidance=Guidance(scale))
    together = run(batch, seeds(batch))
    for row, prompt in enumerate(prompts):
        kept = batch.valid[row]
        assert int(kept.sum()) == prompt + 12
        bare = llada_batch(batch.ids[row : row + 1, kept], batch.given[row : row + 1, kept])  # without any padding
        alone = run(bare, torch.zeros(1, dtype=torch.long))
        assert torch.equal(alone.batch.ids[0], together.batch.ids[row, kept])


def test_guidance_needs_no_attention_mask():
    batch = llada_rows([4, 4], family("llada").vocabulary)
    assert batch.attention_mask() is None
    guided, plain = (sampler(guidance=Guidance(scale))(batch, seeds(batch)) for scale in (3.0, 1.0))
    assert guided.nfe == 2 * plain.nfe and not torch.equal(guided.batch.ids, plain.batch.ids)


class Kept:
    """A network whose head hands out one tensor again and again."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits  # [V]

    def hidden(self, ids, modality, positions, attention_mask, time=None) -> Tensor:
        return torch.zeros(*ids.shape, 1)

    def head(self, hidden: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        return self.logits[start:stop].expand(*hidden.shape[:-1], -1)


def test_suppressing_an_id_changes_no_tensor_of_the_model_and_no_other_id():
    """Upstream writes -inf into the logits it was given, so that two suppressions act on one another."""
    tiny = family("llada")
    eos, eot = tiny.vocabulary.specials["eos"], tiny.vocabulary.specials["eot"]
    logits = torch.zeros(tiny.vocabulary.size)
    logits[eos], logits[eot] = 9.0, 8.0
    model, before = Kept(logits), logits.clone()
    batch = llada_rows([3], tiny.vocabulary)
    for forbid, best in (((), eos), ((eos,), eot)):
        config = SamplerConfig(text=replace(GREEDY, forbid=forbid), stop_at_eos=False)
        out = Sampler(model, tiny.vocabulary, config)(batch, seeds(batch))
        assert (out.batch.ids[batch.targets] == best).all()
        assert torch.equal(model.logits, before)


def test_masks_inside_the_prompt_are_filled_and_take_no_ones_quota():
    """Upstream: they use up the quota of the blocks, and masks remain at the end."""
    tiny = family("llada")
    batch = llada_rows([6], tiny.vocabulary)
    holes = torch.zeros_like(batch.given)
    holes[0, [1, 4]] = True
    batch = batch.replace(given=batch.given & ~holes).hide_targets(tiny.vocabulary)
    text = replace(GREEDY, steps=14, block_length=7)
    out = sampler(text)(batch, seeds(batch), record=True)
    assert not (out.batch.ids == tiny.vocabulary.mask_id).any() and out.steps == 14
    assert torch.equal(out.batch.ids[batch.given], batch.ids[batch.given])
    states = torch.stack(out.trajectory)  # one token per pass, block after block
    assert ((states[1:] != states[:-1]).sum((1, 2)) == 1).all()


def test_no_pass_is_made_when_nothing_is_left_to_write():
    """Upstream: steps beyond the number of tokens run the network for nothing."""
    batch = llada_rows([4], family("llada").vocabulary)
    out = sampler(replace(GREEDY, steps=60))(batch, seeds(batch))
    assert out.nfe == 12 == int(batch.targets.sum())


def test_ids_are_where_the_vocabulary_says():
    """Upstream: mask, end-of-text and end-of-turn ids are written into the program. Here ids may be renamed at will."""
    tiny = family("llada")
    size = tiny.vocabulary.size
    new = torch.randperm(size, generator=torch.Generator().manual_seed(3))  # old id -> new id
    renamed = lively(LLADA.settings(LLADA_CONFIG))
    renamed.load_state_dict(tiny.model.state_dict())
    with torch.no_grad():
        renamed.embed_tokens.weight[new] = tiny.model.embed_tokens.weight
        renamed.output_weight[new] = tiny.model.output_weight
    special = {name: int(new[i]) for name, i in tiny.vocabulary.specials.items()}
    vocabulary = Vocabulary(size, (0, size), (size, size), int(new[tiny.vocabulary.mask_id]), specials=special)
    batch = llada_rows([3, 5], tiny.vocabulary)
    for stop in (False, True):
        config = SamplerConfig(text=GREEDY, guidance=Guidance(2.0), stop_at_eos=stop)
        ours = Sampler(tiny.model, tiny.vocabulary, config)(batch, seeds(batch))
        theirs = Sampler(renamed, vocabulary, config)(batch.replace(ids=new[batch.ids]), seeds(batch))
        assert torch.equal(new[ours.batch.ids], theirs.batch.ids)


@EACH
def test_no_mask_is_left_however_few_the_steps(policy: RefreshPolicy):
    """Upstream: the dual cache ends a block after its share of the steps, whatever it holds."""
    tiny, batch = family("llada"), llada_rows([3, 5], family("llada").vocabulary)
    for rule in ("threshold", "factor", "quota"):
        text = replace(GREEDY, rule=rule, threshold=0.999, factor=0.001, steps=3)
        out = sampler(text, policy)(batch, seeds(batch))
        assert not (out.batch.ids[batch.targets] == tiny.vocabulary.mask_id).any()


@EACH
def test_the_head_sees_candidates_of_the_block_only(policy: RefreshPolicy):
    """Upstream: a softmax over the whole vocabulary, in double precision, at every position, in every pass."""
    if isinstance(policy, MaxLogitCache):
        assert policy.compat is None  # by default it notes the logits that were wanted anyway
    batch = llada_rows([6, 6], family("llada").vocabulary)
    out = sampler(policy=policy)(batch, seeds(batch))
    assert out.stats.head_tokens == sum(2 * left for left in (4, 3, 2, 1)) * 3  # blocks of 4, one token per pass


@EACH
def test_guidance_and_a_stop_at_end_of_text_go_with_every_cache(policy: RefreshPolicy):
    """Upstream: no guidance with a cache, and no row ends before the last block."""
    tiny, config = family("llada"), SamplerConfig(text=GREEDY, guidance=Guidance(2.0), stop_at_eos=False)
    batch = llada_rows([6], tiny.vocabulary)
    whole = Sampler(tiny.model, tiny.vocabulary, config, policy)(batch, seeds(batch))
    first = int(whole.batch.ids[0, 6])  # the answer's first token: let it be the end-of-text
    ending = replace(tiny.vocabulary, specials={**tiny.vocabulary.specials, "eos": first})
    stopped = Sampler(tiny.model, ending, replace(config, stop_at_eos=True), policy)(batch, seeds(batch))
    assert stopped.nfe < whole.nfe == 24  # two streams
    answer = stopped.batch.ids[0, 6:]
    assert int(answer[0]) == first and (answer[4:] == first).all()  # blocks that it did not come to are filled


@EACH
def test_grouped_heads_go_with_every_cache(policy: RefreshPolicy):
    """Upstream: dLLM-Cache breaks where keys and values have fewer heads than queries."""
    model = family("llada").model
    assert isinstance(model, MaskedTransformer) and model.config.num_kv_heads < model.config.num_heads
    batch = llada_rows([5, 3], family("llada").vocabulary)
    out = sampler(policy=policy)(batch, seeds(batch))
    assert not (out.batch.ids[batch.targets] == family("llada").vocabulary.mask_id).any()
    assert out.stats.partial_passes > 0 or isinstance(policy, NoCache)
