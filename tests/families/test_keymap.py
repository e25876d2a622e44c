"""The name map: both ways, nothing left over, prefixes and nesting, clear refusals."""

from __future__ import annotations

import pytest
import torch

from unidiff.families.checkpoint.keymap import KeyMap, assemble, strip_prefixes, unwrap
from unidiff.models.transformer import MaskedTransformer
from unidiff.weights.files import build_on_meta

CONFIG = dict(vocab_size=11, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, ffn_size=24, rope="1d")
CONFIG["modality_embedding"] = False
# A LLaMA-like family: separate projections that are one matrix here.
NAMES = {
    "embed_tokens": "wte",
    "blocks.{i}.attention_norm": "layers.{i}.norm_a",
    "blocks.{i}.attention.qkv": "layers.{i}.{q,k,v}",
    "blocks.{i}.attention.out": "layers.{i}.o",
    "blocks.{i}.ffn_norm.weight": "layers.{i}.norm_f",
    "blocks.{i}.feed_forward.up": "layers.{i}.{gate,up}",
    "blocks.{i}.feed_forward.down": "layers.{i}.down",
    "final_norm.weight": "ln_f",
    "output_weight": "lm_head",
}
ROWS = {"blocks.{i}.attention.qkv": (16, 8, 8)}
KEYMAP = KeyMap.of(
    build_on_meta(MaskedTransformer, CONFIG), NAMES, constants={"inv_freq": torch.tensor([1.0, 0.01])}, rows=ROWS
)


def build(state: dict, dtype: torch.dtype | None = None) -> MaskedTransformer:
    return assemble(build_on_meta(MaskedTransformer, CONFIG), KEYMAP, state, dtype)


def theirs() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return KEYMAP.to_theirs(MaskedTransformer(**CONFIG).state_dict())


def test_round_trip_splits_and_joins():
    state = theirs()
    assert state["layers.1.k.weight"].shape == (8, 16) and state["layers.0.gate.weight"].shape == (24, 16)
    model = build(state)
    weights = model.state_dict()
    torch.testing.assert_close(
        weights["blocks.1.attention.qkv.weight"][16:24], state["layers.1.k.weight"], rtol=0, atol=0
    )
    back = KEYMAP.to_theirs(weights)
    assert set(back) == set(state)
    assert all(torch.equal(back[name], state[name]) for name in state)
    assert not model.training and {p.dtype for p in model.parameters()} == {torch.float32}


def test_names_come_layer_by_layer_in_entry_order():
    names = KEYMAP.names()
    assert names[:4] == ["wte.weight", "layers.0.norm_a.weight", "layers.0.q.weight", "layers.0.k.weight"]
    assert names.index("layers.0.down.weight") + 1 == names.index("layers.1.norm_a.weight")
    assert names[-2:] == ["ln_f", "lm_head"] and len(set(names)) == len(names)


def test_prefixes_nesting_and_dtype():
    state = {"model": {f"module._orig_mod.{name}": value for name, value in theirs().items()}, "step": 3}
    model = build(strip_prefixes(unwrap(state)), torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert unwrap({"state_dict": {"a": 1}}) == {"a": 1}
    assert strip_prefixes({"module.module.a": 1, "b.module.": 2}, ["module."]) == {"a": 1, "b.module.": 2}
    with pytest.raises(ValueError, match="'a' twice"):
        strip_prefixes({"module.a": 1, "a": 2}, ["module."])


def test_a_saved_constant_may_be_absent_but_not_different():
    state = theirs()
    del state["inv_freq"]
    build(state)
    with pytest.raises(ValueError, match="'inv_freq' is not the constant"):
        build({**state, "inv_freq": torch.tensor([1.0, 0.5])})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("layers.1.k.weight"), r"1 missing \(layers.1.k.weight\), 0 left over"),
        (lambda s: s.update(bias=torch.zeros(3)), r"0 missing, 1 left over \(bias\)"),
        (lambda s: s.update(lm_head=torch.zeros(12, 16)), r"'lm_head' gives shape \(12, 16\).*\(11, 16\)"),
        (lambda s: s["ln_f"].fill_(float("nan")), r"NaN or infinity \(final_norm.weight\)"),
    ],
)
def test_bad_checkpoints_are_refused(change, message):
    state = theirs()
    change(state)
    with pytest.raises(ValueError, match=message):
        build(state)


def test_a_model_with_other_options_cannot_be_exported():
    with pytest.raises(ValueError, match="output_bias"):
        KeyMap.of(build_on_meta(MaskedTransformer, {**CONFIG, "head_bias": True}), NAMES)
