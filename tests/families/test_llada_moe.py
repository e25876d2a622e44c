"""LLaDA-MoE's configs and chat template; its numbers are in `test_llada_moe_golden`."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from reference.batches import llada_batch
from reference.llada_decoding import LladaCompat, LladaSettings, generate
from safetensors.torch import save_file
from tiny_families import family
from torch import Tensor

from unidiff.decoding import ModalityDecoding, Sampler
from unidiff.families.checkpoint.convert import convert
from unidiff.families.checkpoint.load import load_released
from unidiff.families.checkpoint.verify import describe, formula_weights, verify
from unidiff.families.family import FAMILIES, recognise
from unidiff.families.llada.rows import as_upstream, llada_sampler
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


class Hesitant:
    """The tiny model, to which [MASK] appeals more; changes nothing of it."""

    def __init__(self, by: float) -> None:
        self.inner, self.by = family("llada_moe").model, by

    def __getattr__(self, name: str):
        return getattr(self.inner, name)

    def hidden(self, *args) -> Tensor:
        return self.inner.hidden(*args)

    def head(self, hidden: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        logits = self.inner.head(hidden, start, stop)
        logits[..., TINY["mask_token_id"] - start] += self.by
        return logits


@pytest.mark.parametrize("steps", [6, 9, 12])
def test_with_compat_mask_is_written_as_the_program_writes_it(steps):
    """It uses up quota; what a block has left competes with the tokens of the blocks to come, and may be left at the end."""
    model, vocabulary, left = Hesitant(4.0), family("llada_moe").vocabulary, set()
    for seed in range(3):
        prompt = torch.randint(0, 29, (1, 5), generator=torch.Generator().manual_seed(seed))
        asked = LladaSettings(steps=steps, gen_length=12, block_length=4)
        theirs = generate(model, vocabulary, prompt, asked, LladaCompat.of("LLaDA", "none")).ids
        config = replace(as_upstream(llada_sampler(vocabulary, steps, 4)), stop_at_eos=False)
        given = torch.arange(17) < 5
        batch = llada_batch(torch.nn.functional.pad(prompt, (0, 12)), given[None])
        ours = Sampler(model, vocabulary, config)(batch, torch.zeros(1).long(), record=True).trajectory
        changed = [
            [s for n, s in enumerate(states) if not n or not torch.equal(s, states[n - 1])] for states in (ours, theirs)
        ]
        assert len(changed[0]) == len(changed[1])
        assert all(torch.equal(a, b) for a, b in zip(*changed, strict=True))
        left.add(int((ours[-1] == vocabulary.mask_id).sum()))
    assert max(left) > 0
    plain = Sampler(model, vocabulary, llada_sampler(vocabulary, steps, 4))(batch, torch.zeros(1).long())
    assert not bool((plain.batch.ids == vocabulary.mask_id).any())


def test_what_mask_does_not_go_with():
    for settings, words in (
        ({"rule": "threshold"}, "writes_mask goes with rule='at_least'"),
        ({"schedule": "cosine"}, "writes_mask goes with rule='at_least'"),
        ({"schedule": "fixed", "remask": "confidence"}, "does not go with remask"),
    ):
        with pytest.raises(ValueError, match=words):
            ModalityDecoding(writes_mask=True, **settings)


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
