"""`from_pretrained` refuses damaged or foreign checkpoints with one clear sentence."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers.utils import is_accelerate_available
from safetensors.torch import load_file, save_file

from unidiff.models.transformer import MaskedTransformer

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    MaskedTransformer(vocab_size=12, hidden_size=16, num_layers=1, num_heads=2).save_pretrained(tmp_path)
    return tmp_path


def change_weights(folder, change) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def change_config(folder, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def refuse(folder, *fragments: str, error=ValueError) -> None:
    """Loading raises one sentence with these fragments, with accelerate's low-memory loading and without."""
    for low_memory in {is_accelerate_available(), False}:
        with pytest.raises(error) as info:
            MaskedTransformer.from_pretrained(folder, low_cpu_mem_usage=low_memory)
        message = str(info.value)
        assert len(message.splitlines()) == 1, message
        for fragment in fragments:
            assert fragment in message, message


def test_good_weights_load_in_any_float_type_without_touching_random_state(folder):
    state = torch.get_rng_state()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = MaskedTransformer.from_pretrained(folder, torch_dtype=dtype)
        assert {p.dtype for p in model.parameters()} == {dtype} and not model.training
    assert torch.equal(state, torch.get_rng_state())
    model, info = MaskedTransformer.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and isinstance(model, MaskedTransformer)


def test_missing_weight(folder):
    change_weights(folder, lambda w: w.pop("blocks.0.attention.qkv.weight"))
    refuse(folder, "1 missing (blocks.0.attention.qkv.weight)")


@pytest.mark.parametrize("low_memory", [True, False])
def test_nothing_is_printed_besides_the_sentence(folder, low_memory, capfd, caplog):
    change_weights(folder, lambda w: (w.pop("final_norm.weight"), w.update(extra=torch.zeros(2))))
    with pytest.raises(ValueError, match="1 missing"):
        MaskedTransformer.from_pretrained(folder, low_cpu_mem_usage=low_memory)
    assert capfd.readouterr() == ("", "") and not caplog.records


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bool, torch.int8, torch.int64])
def test_a_weight_that_is_no_floating_point_number(folder, dtype):
    change_weights(folder, lambda w: w.update({"final_norm.weight": torch.ones(16).to(dtype)}))
    refuse(folder, "final_norm.weight of", WEIGHTS, f"is stored as {str(dtype).removeprefix('torch.')}")


def test_unexpected_weight(folder):
    change_weights(folder, lambda w: w.update(extra=torch.zeros(2)))
    refuse(folder, "1 unexpected (extra)")


def test_misshaped_weight(folder):
    change_weights(folder, lambda w: w.update({"final_norm.weight": torch.ones(17)}))
    refuse(folder, "misshaped", "final_norm.weight")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_or_infinite_weight(folder, value):
    change_weights(folder, lambda w: w["final_norm.weight"].fill_(value))
    refuse(folder, "hold NaN or infinity (final_norm.weight)")


def test_unreadable_weight_file(folder):
    raw = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(raw[: len(raw) // 2])
    refuse(folder, str(folder))


def test_unknown_config_key(folder):
    change_config(folder, windows=4)
    refuse(folder, "unknown keys ['windows']")


def test_bad_config_value(folder):
    change_config(folder, norm="batch")
    refuse(folder, "norm is 'batch'")


@pytest.mark.parametrize(
    "name", ["hidden_size", "num_layers", "num_heads", "vocab_size", "norm_eps", "norm", "dropout"]
)
@pytest.mark.parametrize("value", [None, True, "8", [8], {}, -8, 1e300, 10**12, 10**30, float("nan")])
def test_a_config_value_of_another_type_or_out_of_bounds(folder, name, value):
    change_config(folder, **{name: value})
    refuse(folder, "config.json", f" {name} ")


@pytest.mark.parametrize("name", [["MaskedTransformer"], {}, 3, None, True])
def test_a_class_that_is_no_name(folder, name):
    change_config(folder, _class_name=name)
    refuse(folder, "_class_name" if name is not None else "config.json")


def test_another_family(folder):
    change_config(folder, _class_name="VQModel")
    refuse(folder, "VQModel", "not a MaskedTransformer")


def test_absent_folder_and_absent_weights(folder):
    refuse(folder / "nowhere", "nowhere", error=FileNotFoundError)
    (folder / WEIGHTS).unlink()
    refuse(folder, str(folder), error=FileNotFoundError)
