"""Fewer bits per weight, and weights that are not on the device: answers, sizes, caches, and memory measured.

    python tests/families/test_small_memory.py FOLDER plain|int8|int4|disk [GIGABYTES]

prints what a synthetic bfloat16 LLaDA takes at rest and at most in a pass over 64 tokens.
"""

from __future__ import annotations

import copy
import ctypes
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from unidiff.families.checkpoint.small_memory import block_layers, offload, quantise
from unidiff.families.checkpoint.verify import answer
from unidiff.families.family import FAMILIES
from unidiff.families.llada import LLADA
from unidiff.tokens import Vocabulary

VOCABULARY = Vocabulary(600, (0, 600), (600, 600), 599)


@pytest.fixture(scope="module")
def model():
    """Wide enough for groups of 32, with grouped keys."""
    config = {"d_model": 128, "n_heads": 4, "n_kv_heads": 2, "n_layers": 2, "mlp_hidden_size": 192, "vocab_size": 600}
    torch.manual_seed(0)
    made = LLADA.make({**config, "mask_token_id": 599}).bfloat16().eval()
    for value in made.parameters():
        if value.ndim > 1:
            torch.nn.init.normal_(value, std=0.06)
    assert LLADA.settings({**config, "mask_token_id": 599})["num_kv_heads"] == 2
    return made


def stored_bytes(module: torch.nn.Module) -> int:
    """Of what a weight really keeps, in torchao's tensors too."""
    total = 0
    for value in module.parameters():
        inner = getattr(value.data, "__tensor_flatten__", None)
        names = inner()[0] if inner is not None and type(value.data) is not torch.Tensor else None
        total += value.nbytes if names is None else sum(getattr(value.data, name).nbytes for name in names)
    return total


@pytest.mark.parametrize(("kind", "share", "error"), [("int8", 0.53, 0.05), ("int4", 0.42, 0.25)])
def test_few_bits_change_answers_little(model, kind, share, error):
    pytest.importorskip("torchao", reason="the extra `quantise` (torchao) is not installed")
    small = quantise(copy.deepcopy(model), kind)
    layers = [sum(stored_bytes(m) for m in block_layers(x).values()) for x in (small, model)]
    assert layers[0] < share * layers[1]
    first, second = answer(model, VOCABULARY), answer(small, VOCABULARY)
    assert 0 < float((first - second).norm() / first.norm()) < error
    h = torch.randn(1, 3, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    for a, b in zip(
        model.blocks[0].attention(h, values=False), small.blocks[0].attention(h, values=False), strict=True
    ):
        assert float((a - b).norm() / a.norm()) < 0.05  # rows of packed weights, which caches read


WIDE: dict[str, Any] = {  # of tiny configs, as groups of 32 need it
    **dict.fromkeys(("d_model", "hidden_size", "mlp_hidden_size", "intermediate_size", "dense_intermediate_size"), 64),
    **dict.fromkeys(("expert_intermediate_size", "shared_expert_intermediate_size", "moe_intermediate_size"), 32),
    **dict.fromkeys(("head_dim", "attention_head_dim", "cond_dim"), 32),
    "axes_dims_rope": [8, 12, 12],
}


def widened(config: Mapping[str, Any]) -> dict[str, Any]:
    """A tiny config with wide layers; that of a tower of pictures stays."""
    wide = {name: value if name == "vision_config" else WIDE.get(name, value) for name, value in config.items()}
    return wide | ({"model": widened(config["model"])} if "model" in config else {})


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("family", [name for name, entry in FAMILIES.items() if entry.layout])
def test_every_family_takes_few_bits(family, kind):
    pytest.importorskip("torchao", reason="the extra `quantise` (torchao) is not installed")
    entry = FAMILIES[family]
    torch.manual_seed(0)
    one = entry.make(widened(entry.tiny.config)).bfloat16().eval()
    for value in one.parameters():
        if value.ndim > 1:
            torch.nn.init.normal_(value, std=0.1)
    vocabulary = entry.tiny.vocabulary or entry.vocabulary(entry.tiny.config)
    first, second = answer(one, vocabulary), answer(quantise(copy.deepcopy(one), kind), vocabulary)
    assert 0 < float((first - second).norm() / first.norm()) < (0.1 if kind == "int8" else 0.35)


def test_kinds_and_widths_that_do_not_exist(model):
    with pytest.raises(ValueError, match=r"kind is 'int3'; expected one of \['int8', 'int4'\]"):
        quantise(model, "int3")
    pytest.importorskip("torchao", reason="the extra `quantise` (torchao) is not installed")
    with pytest.raises(ValueError, match="is 192 wide, which groups of 128 do not divide"):
        quantise(copy.deepcopy(model), "int4", 128)


def test_a_missing_package_is_named(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ImportError, match="need torchao; pip install"):
        quantise(model)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match="needs accelerate; pip install"):
        offload(model, "cpu")


@pytest.mark.parametrize("family", ["llada", "unidisc", "muddit", "dream"])
@pytest.mark.parametrize("disk", [False, True])
def test_offloaded_weights_give_the_same_answers(family, disk, tmp_path):
    pytest.importorskip("accelerate", reason="the extra `offload` (accelerate) is not installed")
    entry = FAMILIES[family]
    torch.manual_seed(0)
    one = entry.make(entry.tiny.config).eval()
    for value in one.parameters():
        torch.nn.init.normal_(value, std=0.3)
    vocabulary = entry.vocabulary(entry.tiny.config)
    away = offload(copy.deepcopy(one), "cpu", tmp_path if disk else None)
    parked = [name for name, value in away.named_parameters() if value.is_meta]
    assert parked and not any(".qkv." in name for name in parked)
    assert sum(p.numel() for p in away.parameters() if p.is_meta) > 0.3 * sum(
        m.weight.numel() for m in block_layers(one).values()
    )
    for _ in range(2):  # weights go back after each pass
        assert torch.equal(answer(away, vocabulary), answer(one, vocabulary))
        assert [name for name, value in away.named_parameters() if value.is_meta] == parked


def test_offloaded_weights_serve_partial_passes(model):
    pytest.importorskip("accelerate", reason="the extra `offload` (accelerate) is not installed")
    h = torch.randn(1, 3, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    away = offload(copy.deepcopy(model), "cpu")
    assert torch.equal(away.blocks[0].attention.value(h), model.blocks[0].attention.value(h))
    assert torch.equal(away.blocks[1].feed_forward(h), model.blocks[1].feed_forward(h))


def test_models_that_cannot_be_offloaded():
    pytest.importorskip("accelerate", reason="the extra `offload` (accelerate) is not installed")
    with pytest.raises(ValueError, match="Linear has no blocks with linear layers"):
        offload(torch.nn.Linear(2, 2), "cpu")
    with torch.device("meta"):
        empty = LLADA.make(LLADA.tiny.config)
    with pytest.raises(ValueError, match=r"_?weight is not on the CPU"):
        offload(empty, "cpu")


def main() -> None:
    from test_loading_memory import peak_of, resident, synthetic_config, write_synthetic

    from unidiff.families.checkpoint.load import load_released

    folder, kind = Path(sys.argv[1]), sys.argv[2]
    size = float(sys.argv[3]) if len(sys.argv) > 3 else 2.0
    weights = write_synthetic(folder / "full", "safetensors", int(size * 10**9))
    vocabulary = LLADA.vocabulary(synthetic_config(int(size * 10**9)))
    start = resident("VmRSS")

    def load():
        made = load_released(folder / "full").model
        if kind in ("int8", "int4"):
            return quantise(made, kind)
        return offload(made, "cpu", folder / "parked") if kind == "disk" else made

    made, loading = peak_of(load)
    ctypes.CDLL(None).malloc_trim(0)
    rest = resident("VmRSS") - start
    _, _pass = peak_of(lambda: answer(made, vocabulary))
    print(f"{kind}: weights {weights}, at rest {rest}, peak of loading {loading}, peak of a pass above rest {_pass}")


if __name__ == "__main__":
    main()
