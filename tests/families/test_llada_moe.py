"""LLaDA-MoE's configs and chat template; its numbers are in `test_llada_moe_golden`."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from unidiff.families.checkpoint.convert import convert
from unidiff.families.checkpoint.load import load_released
from unidiff.families.checkpoint.verify import describe, formula_weights, verify
from unidiff.families.family import FAMILIES, recognise
from unidiff.families.llada_moe import CONFIG, LING_CHAT, LLADA_MOE, llada_moe_settings

TINY = LLADA_MOE.tiny.config


def test_what_a_config_leaves_out():
    """Upstream's defaults of -1 break; a missing share of the head is all of it."""
    for share in ({}, {"partial_rotary_factor": -1}, {"partial_rotary_factor": None}):
        config = {k: v for k, v in TINY.items() if k != "partial_rotary_factor"} | share
        assert llada_moe_settings(config)["rope_share"] == 1
    assert llada_moe_settings(TINY)["rope_share"] == 0.5
    assert llada_moe_settings({**TINY, "moe_layer_freq": None})["dense_layers"] == ()
    assert llada_moe_settings({**TINY, "num_key_value_heads": None})["num_kv_heads"] == 2
    assert LLADA_MOE.vocabulary(CONFIG).mask_id == 156895


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"moe_router_score_function": "sigmoid"}, "moe_router_score_function = 'sigmoid'; only 'softmax'"),
        ({"routed_scaling_factor": 2.5}, "routed_scaling_factor = 2.5; only 1"),
        ({"router_num_group": 4}, "router_num_group = 4"),
        ({"moe_layer_freq": [1, 1]}, "moe_layer_freq of 2 layers and 3 layers"),
        ({"moe_layer_freq": [0, 2, 1]}, "moe_layer_freq"),
        ({"clip_qkv": 8.0}, "clip_qkv"),
        ({"num_experts_per_tok": 7}, "may choose from 6 experts"),
        ({"mask_token_id": None}, "no mask_token_id"),
    ],
)
def test_other_configurations_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        config = {**TINY, **change}
        LLADA_MOE.make(config)
        LLADA_MOE.vocabulary(config)


def test_the_same_model_type_as_llada_is_told_apart():
    names = list(formula_weights(LLADA_MOE))
    assert TINY["model_type"] == FAMILIES["llada"].tiny.config["model_type"] == "llada"
    assert recognise(TINY, names) is LLADA_MOE and recognise({}, names) is LLADA_MOE
    assert recognise(FAMILIES["llada"].tiny.config, formula_weights(FAMILIES["llada"])).name == "llada"


@pytest.mark.parametrize("layout", ["apart", "stacked", "fused"])
def test_a_folder_is_described_verified_and_converted_both_ways(tmp_path, layout):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "config.json").write_text(json.dumps(TINY))
    model, _ = LLADA_MOE.load(formula_weights(LLADA_MOE), TINY)
    weights = {n: v.contiguous() for n, v in LLADA_MOE.export(model, {"experts": layout}).items()}
    save_file(weights, theirs / "model.safetensors")
    found = describe(theirs)
    assert found.parameters - found.active == 2 * 4 * 3 * 16 * 12
    assert f"{found.active:,} active" in found.lines()["parameters"]
    checks = {check.name: check.passed for check in verify(theirs).checks}
    assert checks["weights"] and checks["known answer"] and checks["a pass of this checkpoint"]
    convert(theirs, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back")
    again = load_released(tmp_path / "back")
    assert again.spelling == {"experts": layout}
    back = again.state_dict()
    assert set(back) == set(weights) and all(torch.equal(back[n], v) for n, v in weights.items())


def test_turns_are_written_in_capitals():
    marks = {"role": 1, "end_role": 2, "role_end": 3}
    vocabulary = LLADA_MOE.vocabulary(TINY)
    words = {"SYSTEM": 11, "HUMAN": 12, "ASSISTANT": 13, "detailed thinking off": 14, "hi": 15}
    known = {spelled: marks[name] for name, spelled in LING_CHAT.spelled.items()}
    texts = SimpleNamespace(tokenizer=SimpleNamespace(get_vocab=lambda: known), encode=lambda text: [words[text]])
    layout = LLADA_MOE.layout(SimpleNamespace(vocabulary=vocabulary), texts)
    assert layout.ids("hi") == [1, 11, 2, 14, 3, 1, 12, 2, 15, 3, 1, 13, 2]
    assert layout.ends == (3,) and set(layout.never) >= {1, 2}
    texts.tokenizer.get_vocab = lambda: {"hi": 15}
    with pytest.raises(ValueError, match="has no marks for turns"):
        LLADA_MOE.layout(SimpleNamespace(vocabulary=vocabulary), texts).chat(SimpleNamespace(turns=["hi"], longest=4))
