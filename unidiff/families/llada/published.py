"""The published models of LLaDA, and a tiny one."""

from __future__ import annotations

from unidiff.families.family import Release

CONFIG = {
    "activation_type": "silu",
    "block_type": "llama",
    "d_model": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": 32,
    "mlp_hidden_size": 12288,
    "vocab_size": 126464,
    "embedding_size": 126464,
    "mask_token_id": 126336,
    "eos_token_id": 126081,
    "pad_token_id": 126081,
    "rope": True,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "layer_norm_type": "rms",
    "max_sequence_length": 4096,
    "weight_tying": False,
    "include_bias": False,
    "include_qkv_bias": False,
}
EIGHT_BILLION = (8_000_000_000, 5e-2)  # the number that the models' names state
RELEASES = tuple(Release(name, CONFIG, *EIGHT_BILLION) for name in ("llada-8b-base", "llada-8b-instruct", "llada-1.5"))
TINY_CONFIG = {
    "d_model": 16,
    "n_heads": 2,
    "n_kv_heads": 2,
    "n_layers": 2,
    "mlp_hidden_size": 24,
    "vocab_size": 40,
    "embedding_size": 40,
    "mask_token_id": 30,
    "eos_token_id": 29,
    "rope_theta": 5e5,
}
