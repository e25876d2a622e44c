"""LLaDA's configuration, names and vocabulary; the reference loop's own settings."""

from __future__ import annotations

import pytest
import torch
from reference.batches import llada_batch
from reference.llada_decoding import LladaCompat, LladaSettings, generate, select

from unidiff.families.family import named_vocabulary
from unidiff.families.llada import LLADA
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Vocabulary

RELEASED = {
    "activation_type": "silu",
    "alibi": False,
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 4096,
    "embedding_size": 126464,
    "eos_token_id": 126081,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": 126336,
    "max_sequence_length": 4096,
    "mlp_hidden_size": 12288,
    "mlp_ratio": 4,
    "multi_query_attention": None,
    "n_heads": 32,
    "n_kv_heads": 32,
    "n_layers": 32,
    "pad_token_id": 126081,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "vocab_size": 126464,
    "weight_tying": False,
}
TINY = RELEASED | dict(
    d_model=16,
    n_heads=4,
    n_kv_heads=2,
    n_layers=4,
    mlp_hidden_size=24,
    vocab_size=20,
    embedding_size=22,
    mask_token_id=7,
    eos_token_id=3,
    pad_token_id=3,
)


def tiny(**changes) -> tuple[MaskedTransformer, dict]:
    config = TINY | changes
    torch.manual_seed(0)
    model = MaskedTransformer(**LLADA.settings(config)).eval()
    for p in model.parameters():
        p.data.normal_(std=0.3)
    return model, config


def test_released_size_and_vocabulary():
    with torch.device("meta"):
        model = MaskedTransformer(**LLADA.settings(RELEASED))
    assert sum(p.numel() for p in model.parameters()) == 8_015_581_184
    assert LLADA.vocabulary(RELEASED) == named_vocabulary("llada")


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        (dict(), {}),
        (dict(block_group_size=2), dict(block_group_size=2)),
        (dict(fused=True), {}),
        (dict(block_group_size=3, fused=True), dict(block_group_size=3)),
        (dict(), dict(include_bias=True, attention_layer_norm=True)),
        (dict(fused=True), dict(include_bias=True, weight_tying=True, multi_query_attention=True, n_kv_heads=None)),
        (dict(), dict(mlp_hidden_size=None, n_kv_heads=None)),
    ],
)
def test_every_layout_maps_both_ways(layout, changes):
    model, config = tiny(**changes)
    theirs = LLADA.export(model, layout)
    back, vocabulary = LLADA.load({f"module.{name}": value for name, value in theirs.items()}, config)
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in model.state_dict().items())
    assert dict(back.config) == dict(model.config)
    assert (vocabulary.size, vocabulary.mask_id, vocabulary.specials["eos"]) == (22, 7, 3)
    names = set(theirs)
    last = "block_groups.1.1" if layout.get("block_group_size") == 2 else "blocks.3"
    last = "block_groups.1.0" if layout.get("block_group_size") == 3 else last
    fused = layout.get("fused")
    assert f"model.transformer.{last}.{'att_proj' if fused else 'q_proj'}.weight" in names
    assert ("model.transformer.ff_out.weight" in names) != config["weight_tying"]


def test_fused_projection_is_queries_keys_values():
    model, _ = tiny()
    apart, fused = LLADA.export(model), LLADA.export(model, {"fused": True})
    where = "model.transformer.blocks.2."
    joined = torch.cat([apart[f"{where}{name}_proj.weight"] for name in "qkv"])
    assert torch.equal(joined, fused[f"{where}att_proj.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(alibi=True), "alibi = True"),
        (dict(rope=False), "rope = False"),
        (dict(block_type="sequential"), "block_type"),
        (dict(layer_norm_type="default"), "layer_norm_type"),
        (dict(activation_type="swiglu"), "activation_type"),
        (dict(include_qkv_bias=True), "include_qkv_bias"),
        (dict(input_emb_norm=True), "input_emb_norm"),
    ],
)
def test_other_networks_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        LLADA.settings(TINY | change)


def test_wrong_checkpoints_are_refused():
    model, config = tiny()
    weights = LLADA.export(model)
    with pytest.raises(ValueError, match="1 missing"):
        LLADA.load({k: v for k, v in weights.items() if "ln_f" not in k}, config)
    with pytest.raises(ValueError, match="left over"):
        LLADA.load(weights | {"model.transformer.wpe.weight": torch.zeros(1)}, config)
    with pytest.raises(ValueError, match="shape"):
        LLADA.load(weights, config | {"n_kv_heads": 4})
    with pytest.raises(ValueError, match="19 ids"):
        LLADA.load(weights, config, vocabulary=Vocabulary.unified(11, 7))
    with pytest.raises(ValueError, match="mask_token_id"):
        LLADA.load(weights, config | {"mask_token_id": None})


@torch.no_grad()
def test_padding_on_either_side_is_exact():
    model, _ = tiny()
    ids = torch.randint(0, 20, (1, 9), generator=torch.Generator().manual_seed(1))
    alone = model(llada_batch(ids))
    for left in (0, 2, 5):
        padded = torch.nn.functional.pad(ids, (left, 5 - left), value=3)
        seen = torch.zeros(1, 14, dtype=torch.bool)
        seen[:, left : left + 9] = True
        torch.testing.assert_close(model(llada_batch(padded, attended=seen))[:, left : left + 9], alone)


def test_reference_settings_are_checked():
    with pytest.raises(ValueError, match="whole blocks"):
        LladaSettings(gen_length=20, block_length=8)
    with pytest.raises(ValueError, match="expected one of"):
        LladaSettings(cache="both")
    with pytest.raises(ValueError, match="Fast-dLLM"):
        LladaCompat.of("fast", "none")
    model, config = tiny()
    settings = LladaSettings(steps=4, gen_length=4, block_length=4, random_order=True)
    with pytest.raises(ValueError, match="uniforms"):
        generate(model, LLADA.vocabulary(config), torch.tensor([[1, 2]]), settings, LladaCompat())


def test_the_factor_quirk_is_an_option():
    """Confidences .9, .8, .1 at factor 1: 1 - 1/3 < .8, 1 - 1/4 > .1, so two of three pass, and upstream writes all."""
    confidence, live = torch.tensor([[0.9, 0.8, 0.1]]).double(), torch.ones(1, 3, dtype=torch.bool)
    settings, none = LladaSettings(rule="factor", factor=1.0), torch.zeros(1, dtype=torch.long)
    assert select(confidence, live, none, settings, LladaCompat(factor_takes_last=False)).tolist() == [
        [True, True, False]
    ]
    assert select(confidence, live, none, settings, LladaCompat()).all()
