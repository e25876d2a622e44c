"""MDLM's network against the reference's outputs: key map, EMA order, hidden states, logits, parameterisations."""

from __future__ import annotations

import json
import math

import pytest
import torch
from golden import golden_cases
from reference.batches import mdlm_batch
from reference.objectives import sedd_log_score
from reference.subs import subs_log_probs
from safetensors.torch import load_file

from unidiff.families.family import named_vocabulary
from unidiff.families.mdlm import MDLM
from unidiff.models.transformer import MaskedTransformer

INPUTS = {"x0", "x_t", "sigma", "attention_mask"}


def read(folder, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / f"{name}.safetensors")


def config_of(folder, **changes) -> dict:
    return {**json.loads((folder / "config.json").read_text()), **changes}


def close(actual: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5, msg=lambda m: f"{name}: {m}")


@pytest.mark.golden
@pytest.mark.parametrize("folder", golden_cases("mdlm", having="backbone.safetensors"))
def test_every_weight_maps_both_ways(folder):
    weights, config = read(folder, "weights"), config_of(folder)
    del config["model"]["cond_dim"]  # found from the weights
    bare = {name.removeprefix("backbone."): value for name, value in weights.items()}
    for state in (weights, bare, {"state_dict": weights}, {f"_orig_mod.{k}": v for k, v in weights.items()}):
        model, _ = MDLM.load(state, config)
        back = MDLM.export(model)
        assert set(back) == set(weights)
        for name, value in weights.items():
            close(back[name], value, name)


@pytest.mark.golden
@pytest.mark.parametrize("folder", golden_cases("mdlm", having="backbone.safetensors"))
def test_ema_weights_of_a_lightning_checkpoint_are_used(folder):
    weights, config = read(folder, "weights"), config_of(folder)
    order = config["ema_parameter_order"]
    model, _ = MDLM.load(weights, config)
    assert [f"backbone.{name}" for name in MDLM.keymap(model, {}).names()] == order
    checkpoint = {
        "state_dict": {name: torch.zeros_like(v) if name in order else v for name, v in weights.items()},
        "ema": {"decay": 0.9999, "shadow_params": [weights[name] for name in order]},
    }
    averaged, _ = MDLM.load(checkpoint, config)
    for name, value in model.state_dict().items():
        assert torch.equal(averaged.state_dict()[name], value), name
    checkpoint["ema"]["shadow_params"].pop()
    with pytest.raises(ValueError, match="EMA weights; the config asks for"):
        MDLM.load(checkpoint, config)


@pytest.mark.golden
@pytest.mark.parametrize("folder", golden_cases("mdlm", having="backbone.safetensors"))
def test_hugging_face_field_names_give_the_same_model(folder):
    config = config_of(folder)
    renamed = {hub: config["model"][hydra] for hydra, hub in config["huggingface_names"].items()}
    assert MDLM.settings({**renamed, "vocab_size": config["vocab_size"]}) == MDLM.settings(config)


@pytest.mark.golden
@pytest.mark.parametrize("folder", golden_cases("mdlm", having="backbone.safetensors"))
@torch.no_grad()
def test_forward_and_parameterisations_match_the_reference(folder):
    stored, weights = read(folder, "backbone"), read(folder, "weights")
    fixed, vocabulary = MDLM.load(weights, config_of(folder, time_conditioning=False))
    timed, _ = MDLM.load(weights, config_of(folder, time_conditioning=True))
    batch, sigma, x_t = mdlm_batch(stored["x_t"]), stored["sigma"], stored["x_t"]
    compared = set()

    def check(name: str, actual: torch.Tensor, rows: torch.Tensor | slice = slice(None)) -> None:
        close(actual[rows], stored[name][rows], name)
        compared.add(name)

    blocks: dict[str, torch.Tensor] = {}
    for i, block in enumerate(timed.blocks):
        block.register_forward_hook(lambda _m, _a, output, name=f"hidden_block{i}": blocks.update({name: output}))
    # 1. the network
    logits = timed(batch, sigma)
    for name, value in blocks.items():
        check(name, value)
    check("logits_sigma", logits)
    check("cond", timed.embed_time(sigma))
    raw = fixed(batch, sigma)
    check("logits_sigma0", raw)
    # 2. SUBS: the reference's -1e6 stands for -inf
    for name, model in (("logp_subs", fixed), ("logp_subs_tc", timed)):
        log_probs = subs_log_probs(model, batch, vocabulary, sigma)
        assert torch.equal(log_probs.isneginf(), stored[name] < -1e5)
        check(name, log_probs.clamp_min(-1e6))
    # 3. the other parameterisations of the same logits
    check("logp_d3pm", raw.log_softmax(-1))
    without_mask = raw.clone()
    without_mask[..., vocabulary.mask_id] -= 1e6
    check("logp_d3pm_subsmask", without_mask.log_softmax(-1))
    finite = sigma > 0  # the scores of rows with sigma = 0 are not finite
    check("logscore_sedd_tc", sedd_log_score(logits, x_t, sigma), finite)
    check(
        "score_subs_tc",
        subs_score(subs_log_probs(timed, batch, vocabulary, sigma), x_t, vocabulary.mask_id, sigma),
        finite,
    )
    rest = set(stored) - compared - INPUTS
    assert not rest, f"stored tensors that nothing compares: {sorted(rest)}"


def subs_score(log_probs: torch.Tensor, x_t: torch.Tensor, mask_id: int, sigma: torch.Tensor) -> torch.Tensor:
    """Concrete score p_t(y)/p_t(x_t) of SUBS: from [MASK], p(y)/(e^sigma - 1) and 1 for staying; to [MASK], e^sigma - 1."""
    odds = torch.expm1(sigma)[:, None, None]
    masked = log_probs.exp() / odds
    masked[..., mask_id] = 1.0
    visible = torch.zeros_like(masked).scatter(-1, x_t[..., None], 1.0)
    visible[..., mask_id] = odds[..., 0].expand(x_t.shape)
    return torch.where((x_t == mask_id)[..., None], masked, visible)


def test_released_vocabulary_and_defaults():
    vocabulary = MDLM.vocabulary({})
    assert vocabulary == named_vocabulary("mdlm") and vocabulary.image_size == 0
    kwargs = MDLM.settings({"model": {}})
    assert (kwargs["hidden_size"], kwargs["num_layers"], kwargs["num_heads"], kwargs["cond_dim"]) == (768, 12, 12, 128)
    assert kwargs["constant_time"] == 0.0
    inside = MDLM.vocabulary({"vocab_size": 30522, "mask_index": 103})
    assert inside.text == (0, 30522) and inside.forbidden(0) == (103,)


def test_other_rotary_base_is_refused():
    config = {"hidden_dim": 16, "n_blocks": 1, "n_heads": 2, "cond_dim": 8, "vocab_size": 6}
    state = MDLM.export(MaskedTransformer(**MDLM.settings(config)))
    MDLM.load(state, config)
    state["backbone.rotary_emb.inv_freq"] = torch.tensor([1.0, math.sqrt(0.1), 0.1, 0.01])
    with pytest.raises(ValueError, match="inv_freq"):
        MDLM.load(state, config)
