"""Dream: Qwen2's names and arithmetic (bidirectional, next-token logits moved back), the sampler, every cache."""

from __future__ import annotations

import json

import pytest
import torch
from reference.batches import llada_batch
from safetensors.torch import save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from unidiff.decoding import Sampler
from unidiff.decoding.cache import AdaptiveCache, DualCache, MaxLogitCache, NoCache, PrefixCache, VicinityCache
from unidiff.families.checkpoint.load import load_released
from unidiff.families.dream import DREAM, RELEASED, dream_sampler
from unidiff.families.family import recognise
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import TokenBatch

MASK, EOS = 29, 28
CONFIG = {
    "model_type": "Dream",
    "architectures": ["DreamModel"],
    "vocab_size": 32,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "intermediate_size": 40,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "mask_token_id": MASK,
    "eos_token_id": EOS,
}
ATOL = 1e-5


@pytest.fixture(scope="module")
def reference() -> Qwen2ForCausalLM:
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    fields = {name: CONFIG[name] for name in (*names, "intermediate_size", "rms_norm_eps", "tie_word_embeddings")}
    model = Qwen2ForCausalLM(Qwen2Config(**fields, rope_parameters={"rope_type": "default", "rope_theta": 1e6})).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3 + (1 if p.ndim == 1 and len(p) == 24 else 0))
    return model


@pytest.fixture(scope="module")
def dream(reference):
    return DREAM.load(reference.state_dict(), CONFIG)


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention of three rows, padded on the left, the right and not at all; 4 masked positions each."""
    ids = torch.randint(0, 28, (3, 9), generator=torch.Generator().manual_seed(1))
    attended = torch.ones_like(ids, dtype=torch.bool)
    attended[0, :3], attended[1, -2:] = False, False
    ids[0, 5:9] = ids[1, 3:7] = ids[2, 5:9] = MASK
    return ids, attended


@torch.no_grad()
def test_logits_are_the_references_moved_one_on(reference, dream):
    model, _ = dream
    ids, attended = rows()
    batch = llada_batch(ids, ids != MASK, attended)
    sees = torch.zeros(3, 1, 9, 9).masked_fill(~(attended[:, None, None] & attended[:, None, :, None]), -1e9)
    theirs = reference(input_ids=ids, attention_mask=sees, position_ids=batch.positions[..., 0]).logits
    moved = torch.cat((theirs[:, :1], theirs[:, :-1]), dim=1)
    first = batch.positions[..., 0] == 0
    moved = torch.where(first[..., None], theirs, moved)
    ours = model(batch)
    torch.testing.assert_close(ours[attended], moved[attended], atol=ATOL, rtol=1e-5)
    assert (ours - theirs)[attended].abs().max() > 0.1  # the shift is not a nuance


def test_names_map_both_ways(reference, dream):
    model, vocabulary = dream
    back, weights = DREAM.export(model), reference.state_dict()
    assert set(back) == set(weights) and all(torch.equal(back[name], value) for name, value in weights.items())
    assert vocabulary.mask_id == MASK and vocabulary.specials["eos"] == EOS
    with pytest.raises(ValueError, match="missing"):
        DREAM.load({n: v for n, v in weights.items() if not n.endswith("q_proj.bias")}, CONFIG)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(hidden_act="gelu"), "hidden_act = 'gelu'"),
        (dict(head_dim=4), "head_dim = 4"),
        (dict(mask_token_id=None), "no mask_token_id"),
    ],
)
def test_other_networks_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        DREAM.load({}, {**CONFIG, **change})


def test_the_released_size():
    with torch.device("meta"):
        model = MaskedTransformer(**DREAM.settings(RELEASED))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(7.62e9, rel=5e-3)


def decode(dream, batch: TokenBatch, seeds, policy=None, **settings):
    model, vocabulary = dream
    config = dream_sampler(**{"steps": 3, "temperature": 0.7, **settings})
    return Sampler(model, vocabulary, config, policy)(batch, torch.tensor(seeds))


def test_padding_changes_nothing(dream):
    ids, attended = rows()
    together = decode(dream, llada_batch(ids, ids != MASK, attended), [5, 6, 7]).batch.ids
    for row, seed in enumerate((5, 6, 7)):
        own = ids[row][attended[row]][None]
        alone = decode(dream, llada_batch(own, own != MASK), [seed]).batch.ids
        assert torch.equal(together[row][attended[row]], alone[0])


@pytest.mark.parametrize(
    "policy",
    [
        PrefixCache(interval=1),
        DualCache(interval=1),
        VicinityCache(interval=1),
        AdaptiveCache(1, 1, 0.5),
        MaxLogitCache(0.5, 0.0, 1),
    ],
    ids=lambda p: type(p).__name__,
)
def test_caches_refreshed_in_every_pass_are_no_cache(dream, policy):
    ids, attended = rows()
    batch = llada_batch(ids, ids != MASK, attended)
    plain = decode(dream, batch, [1, 2, 3], NoCache(), steps=4)
    assert torch.equal(decode(dream, batch, [1, 2, 3], policy, steps=4).batch.ids, plain.batch.ids)


def test_a_cache_holds_features_before_the_shift(dream):
    """Partial passes: every position is filled and known tokens stay."""
    ids, attended = rows()
    batch = llada_batch(ids, ids != MASK, attended)
    out = decode(dream, batch, [1, 2, 3], DualCache(), steps=4)
    assert out.stats.partial_passes > 0
    assert torch.equal(out.batch.ids[batch.given], ids[batch.given]) and not (out.batch.ids == MASK)[attended].any()


def test_a_folder_is_recognised(reference, tmp_path):
    save_file({k: v.contiguous() for k, v in reference.state_dict().items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    found = load_released(tmp_path)
    assert found.family.name == "dream" and found.model.config.shift
    assert all(torch.equal(found.state_dict()[name], value) for name, value in reference.state_dict().items())
    assert recognise({}, reference.state_dict()).name == "dream"
