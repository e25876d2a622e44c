"""Keys of upstream configurations: used, harmless, or refused; and heads that are tied although they lie in the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from released_parts import tiny_weights, write_tiny
from safetensors.torch import load_file, save_file

from unidiff.families.checkpoint.convert import convert, save_released
from unidiff.families.checkpoint.load import load_released
from unidiff.families.checkpoint.verify import answer
from unidiff.families.family import FAMILIES
from unidiff.models.transformer import MaskedTransformer

LLADA_LIKE = ("llada", "mmada", "dynin", "lumina")
# the whole config of a released 8B folder, besides sizes and ids: nothing of it is in the way
LLADA_8B = {
    **{"activation_type": "silu", "alibi": False, "alibi_bias_max": 8.0, "attention_dropout": 0.0},
    **{"attention_layer_norm": False, "attention_layer_norm_with_affine": True, "bias_for_layer_norm": False},
    **{"block_group_size": 1, "block_type": "llama", "embedding_dropout": 0.0, "flash_attention": False},
    **{"include_bias": False, "include_qkv_bias": False, "init_cutoff_factor": None, "init_device": "meta"},
    **{"init_fn": "mitchell", "init_std": 0.02, "input_emb_norm": False, "layer_norm_type": "rms"},
    **{"layer_norm_with_affine": True, "max_sequence_length": 4096, "mlp_ratio": 4, "multi_query_attention": None},
    **{"precision": "amp_bf16", "residual_dropout": 0.0, "rms_norm_eps": 1e-05, "rope": True},
    **{"rope_full_precision": True, "scale_logits": False, "transformers_version": "4.46.3", "use_cache": False},
    **{"weight_tying": False, "torch_dtype": "bfloat16", "auto_map": {"AutoModel": "modeling_llada.LLaDAModelLM"}},
}
DREAM_7B = {
    **{"attention_dropout": 0.0, "full_attn_mask": None, "hidden_act": "silu", "initializer_range": 0.02},
    **{"max_position_embeddings": 131072, "max_window_layers": 28, "rms_norm_eps": 1e-06, "rope_scaling": None},
    **{"rope_theta": 1e6, "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16"},
    **{"transformers_version": "4.46.2", "use_cache": True, "use_mrope": False, "use_sliding_window": False},
    **{"auto_map": {"AutoModel": "modeling_dream.DreamModel"}, "bos_token_id": 5},
}
# keys of a transformers config that say nothing about the network
PLAIN = {
    **{"use_return_dict": True, "output_attentions": False, "output_hidden_states": False, "temperature": 1.0},
    **{"top_k": 50, "num_beams": 1, "repetition_penalty": 1.0, "id2label": {"0": "LABEL_0"}, "problem_type": None},
    **{"chunk_size_feed_forward": 0, "tie_encoder_decoder": False, "is_decoder": False, "torchscript": False},
    **{"is_encoder_decoder": False, "add_cross_attention": False, "cross_attention_hidden_size": None},
    **{"pruned_heads": {}, "quantization_config": None, "gradient_checkpointing": True, "finetuning_task": "x"},
}
# options that other transformers have; each with a value that would change what is computed
OPTIONS = {
    **{"rope_scaling": {"type": "linear", "factor": 2.0}, "sliding_window": 128, "attn_logit_softcapping": 50.0},
    **{"final_logit_softcapping": 30.0, "logit_softcap": 5, "residual_multiplier": 0.22, "scale_emb": 12},
    **{"embedding_multiplier": 2.5, "logit_scale": 0.1, "partial_rotary_factor": 0.5, "num_experts": 8},
    **{"use_qk_norm": True, "qk_layernorm": True, "parallel_attn": True, "mlp_bias": True, "use_alibi": True},
    **{"quantization_config": {"bits": 4}, "position_embedding_type": "learned", "is_decoder": True, "causal": True},
    **{"rope_parameters": {"rope_type": "yarn", "factor": 4.0}, "mup_scale": 3, "layer_types": ["sliding_attention"]},
    **{"query_pre_attn_scalar_scale": 144, "clip_qkv": 8.0, "attention_multiplier": 0.01},
}


def computes(folder: Path, family: str) -> torch.Tensor:
    found = load_released(folder, vocabulary=FAMILIES[family].tiny.vocabulary)
    return answer(found.model, found.vocabulary)


@pytest.mark.parametrize("family", [*LLADA_LIKE, "dream", "mdlm"])
@pytest.mark.parametrize("option", OPTIONS)
def test_options_that_change_the_computation_are_refused_unless_they_are_off(family: str, option: str, tmp_path: Path):
    if (family, option) == ("dream", "sliding_window"):
        option, value = "use_sliding_window", True  # Qwen2's window counts with this one only
    elif (family, option) == ("dream", "layer_types"):
        pytest.skip("harmless without use_sliding_window")
    else:
        value = OPTIONS[option]
    write_tiny(tmp_path, family, **{option: value})
    with pytest.raises(ValueError, match=rf"config\.json as {family}: config has {option} = ") as caught:
        load_released(tmp_path, vocabulary=FAMILIES[family].tiny.vocabulary)
    assert "\n" not in str(caught.value)
    good = computes(_written(tmp_path / "good", family), family)
    neutral = (None, "default") if isinstance(value, str) else (None, False) if isinstance(value, bool) else (None,)
    for off in neutral:
        write_tiny(tmp_path, family, **{option: off})
        assert torch.equal(computes(tmp_path, family), good)


def _written(folder: Path, family: str) -> Path:
    write_tiny(folder, family)
    return folder


@pytest.mark.parametrize("family", [*LLADA_LIKE, "dream"])
def test_whole_released_configs_load_and_change_nothing(family: str, tmp_path: Path):
    good = computes(_written(tmp_path / "good", family), family)
    more = DREAM_7B if family == "dream" else LLADA_8B
    write_tiny(tmp_path, family, **{**more, **PLAIN, "rms_norm_eps": 1e-6 if family == "dream" else 1e-5})
    assert torch.equal(computes(tmp_path, family), good)


@pytest.mark.parametrize("family", ["dream", "llada"])
def test_plain_rotary_positions_in_the_newer_spelling(family: str, tmp_path: Path):
    theta = FAMILIES[family].tiny.config.get("rope_theta", 1e6)
    good = computes(_written(tmp_path / "good", family), family)
    for rope in ({"rope_type": "default", "rope_theta": theta}, {"type": "default"}):
        write_tiny(tmp_path, family, rope_parameters=rope)
        assert torch.equal(computes(tmp_path, family), good)
    for rope in (
        "linear",
        {"rope_type": "default", "rope_theta": "x"},
        {"rope_type": "default", "factor": 2},
        [],
        True,
    ):
        write_tiny(tmp_path, family, rope_parameters=rope)
        with pytest.raises(ValueError, match="rope"):
            load_released(tmp_path, vocabulary=FAMILIES[family].tiny.vocabulary)


@pytest.mark.parametrize("family", ["unidisc", "mdlm"])
@pytest.mark.parametrize(
    ("where", "option", "value"),
    [
        ("model", "tie_word_embeddings", True),
        ("model", "logit_softcap", 30.0),
        ("model", "alibi", True),
        ("model", "num_experts", 4),
        ("", "parameterization", "d3pm"),
        ("", "backbone", "ar"),
        ("", "diffusion", "uniform"),
    ],
)
def test_options_of_experiments(family: str, where: str, option: str, value: object, tmp_path: Path):
    write_tiny(tmp_path, family)
    config = json.loads((tmp_path / "config.json").read_text())
    (config[where] if where else config)[option] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"config\.json as {family}: config has {option} = "):
        load_released(tmp_path)


@pytest.mark.parametrize("family", ["unidisc", "mdlm"])
def test_other_sections_and_keys_of_experiments_are_not_looked_at(family: str, tmp_path: Path):
    good = computes(_written(tmp_path / "good", family), family)
    write_tiny(tmp_path, family)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"trainer": {"devices": "8", "precision": "bf16"}, "seed": 1, "optim": {"lr": 3e-4}, "wandb": None}
    config["model"] |= {"name": "small", "type": "ddit", "scale_by_sigma": True, "length": 12, "dropout": 0.3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(computes(tmp_path, family), good)


# --------------------------------------------------------------------------------------------------------- tied heads

TIED = {
    **dict.fromkeys(LLADA_LIKE, ("weight_tying", "model.transformer.ff_out.weight", "model.transformer.wte.weight")),
    "dream": ("tie_word_embeddings", "lm_head.weight", "model.embed_tokens.weight"),
}


@pytest.mark.parametrize("family", TIED)
def test_an_equal_copy_of_a_tied_head_is_accepted_and_written_back(family: str, tmp_path: Path):
    switch, head, table = TIED[family]
    state = {n: v for n, v in tiny_weights(family).items() if n != head}
    for equal in (None, state[table].clone(), state[table] + 1):
        folder = tmp_path / str(equal is not None)
        write_tiny(folder, family, **{switch: True})
        stored = state if equal is None else {**state, head: equal}
        save_file(stored, folder / "model.safetensors")
        if equal is not None and not torch.equal(equal, state[table]):
            with pytest.raises(ValueError, match=rf"model\.safetensors .*{head.removeprefix('model.')}' differs from"):
                load_released(folder, vocabulary=FAMILIES[family].tiny.vocabulary)
            save_file({**state, head: state[table][:-1].clone()}, folder / "model.safetensors")
            with pytest.raises(ValueError, match="1 misshaped"):
                load_released(folder, vocabulary=FAMILIES[family].tiny.vocabulary)
            continue
        found = load_released(folder, vocabulary=FAMILIES[family].tiny.vocabulary)
        assert found.model.output_weight is None
        back = found.state_dict()
        assert set(back) == set(stored) and all(torch.equal(back[n], v) for n, v in stored.items())
        others = tmp_path / f"{folder.name} written"
        (others / "back").mkdir(parents=True)
        save_released(found, others / "back")
        convert(folder, others / "own", vocabulary=FAMILIES[family].tiny.vocabulary)
        convert(others / "own", others / "again")
        for name in ("back", "again"):
            again = load_file(others / name / "model.safetensors")
            assert set(again) == set(stored) and all(torch.equal(again[n], v) for n, v in stored.items())


@pytest.mark.parametrize("low_memory", [True, False])
def test_an_equal_copy_in_our_own_folders(low_memory: bool, tmp_path: Path):
    MaskedTransformer(12, 16, 1, 2, tie_head=True).save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    table = weights["embed_tokens.weight"]
    save_file({**weights, "output_weight": table.clone()}, file, {"format": "pt"})
    model = MaskedTransformer.from_pretrained(tmp_path, low_cpu_mem_usage=low_memory)
    assert model.output_weight is None and torch.equal(model.embed_tokens.weight, table)
    save_file({**weights, "output_weight": table + 1}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"'output_weight' differs from 'embed_tokens\.weight'"):
        MaskedTransformer.from_pretrained(tmp_path)
