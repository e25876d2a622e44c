"""Known answers of every family, what a checkpoint is said to be and need, and verification against published values."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from released_parts import write_tiny
from released_pipelines import write_pictures
from safetensors.torch import save_file

from unidiff.families.checkpoint import verify as module
from unidiff.families.checkpoint.convert import convert
from unidiff.families.checkpoint.load import load_released
from unidiff.families.checkpoint.verify import (
    agrees,
    answer,
    closest_release,
    describe,
    formula_weights,
    known_answer,
    pass_bytes,
    verify,
)
from unidiff.families.family import FAMILIES
from unidiff.families.llada import LLADA


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_known_answers(family):
    found = known_answer(FAMILIES[family])
    assert agrees(found, FAMILIES[family].tiny.answer), found


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("llada", {"rope_theta": 1e4}),
        ("llada", {"rms_norm_eps": 1e-2}),
        ("llada", {"n_kv_heads": 1}),
        ("muddit", {"axes_dims_rope": [8, 2, 2]}),
    ],
)
def test_another_arithmetic_gives_another_answer(family, change):
    tiny = FAMILIES[family].tiny
    altered = replace(FAMILIES[family], tiny=replace(tiny, config={**tiny.config, **change}))
    assert not agrees(known_answer(altered), tiny.answer)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_descriptions_read_no_weight(family, tmp_path, monkeypatch):
    state = write_tiny(tmp_path / "a", family)
    vocabulary = FAMILIES[family].tiny.vocabulary
    whole = load_released(tmp_path / "a", vocabulary=vocabulary)
    found = describe(tmp_path / "a", vocabulary=vocabulary)
    assert found.family == family
    assert found.parameters == sum(p.numel() for p in whole.model.parameters())
    assert found.weight_bytes == sum(v.nbytes for v in whole.model.state_dict().values())
    assert found.vocabulary == whole.vocabulary and (found.tokens is None) == (whole.vocabulary is None)
    assert describe(tmp_path / "a", vocabulary=vocabulary, dtype=torch.bfloat16).weight_bytes < 0.6 * found.weight_bytes
    convert(tmp_path / "a", tmp_path / "b", vocabulary=vocabulary)
    assert describe(tmp_path / "b") == found
    lines = found.lines()
    assert lines["family"] == family and lines["dtype"] == "float32" and "MB of weights" in lines["memory"]
    name = next(n for n in state if n not in FAMILIES[family].constants)
    save_file({n: v for n, v in state.items() if n != name}, tmp_path / "a" / "model.safetensors")
    with pytest.raises(ValueError, match="1 missing"):
        describe(tmp_path / "a", vocabulary=vocabulary)


def test_the_image_tokenizer_beside_a_denoiser_is_described_with_it(tmp_path):
    vocabulary = write_pictures(tmp_path, "mmada")
    found = describe(tmp_path, vocabulary=vocabulary)
    own = describe(tmp_path / "image_tokenizer")
    assert (
        found.images == own
        and found.lines()["image tokenizer"] == f"magvit, {own.weight_bytes / 1e6:.1f} MB of weights in float32"
    )
    (tmp_path / "image_tokenizer" / "config.json").write_text("{}")
    assert describe(tmp_path, vocabulary=vocabulary).lines()["image tokenizer"] == "magvit"


def test_memory_of_a_pass_is_of_the_right_size(tmp_path):
    """Against what the allocator hands out: of the tensors that are alive together."""
    config = {**LLADA.tiny.config, "d_model": 64, "n_heads": 4, "n_kv_heads": 4, "mlp_hidden_size": 192}
    config |= {"vocab_size": 2000, "embedding_size": 2000}
    model = LLADA.make(config).eval()
    ids = torch.zeros(1, 512, dtype=torch.long)
    place = torch.zeros(1, 512, 3, dtype=torch.long)
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        model.head(model.hidden(ids, ids, place))
    alive = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    assert 0.5 * peak < pass_bytes(model, 512) < 2 * peak


def test_a_tiny_checkpoint_is_not_the_published_one_but_computes(tmp_path):
    write_tiny(tmp_path, "llada")
    result = verify(tmp_path)
    states = {check.name: check.passed for check in result.checks}
    assert result.release in {r.name for r in LLADA.releases} and not result.passed
    assert states == {
        "weights": True,
        "published settings": False,
        "number of parameters": False,
        "known answer": True,
        "a pass of this checkpoint": True,
    }
    settings = next(check for check in result.checks if check.name == "published settings")
    assert "hidden_size is 16, published 4096" in str(settings) and str(settings).startswith("FAIL")


def test_what_passes_and_what_a_dead_checkpoint_or_machine_looks_like(tmp_path, monkeypatch):
    write_tiny(tmp_path, "muddit")
    monkeypatch.setattr(module, "closest_release", lambda *a: None)
    assert verify(tmp_path).passed
    monkeypatch.setattr(module, "known_answer", lambda family: (0.0, 0.0, 0.0, 0.0))
    assert [c.name for c in verify(tmp_path).checks if not c.passed] == ["known answer"]
    monkeypatch.undo()
    write_tiny(tmp_path, "llada")
    save_file({n: v * 0 for n, v in formula_weights(LLADA).items()}, tmp_path / "model.safetensors")
    monkeypatch.setattr(module, "closest_release", lambda *a: None)
    assert [c.name for c in verify(tmp_path).checks if not c.passed] == ["a pass of this checkpoint"]


def test_answers_do_not_depend_on_the_dtype_much(tmp_path):
    save_file(formula_weights(LLADA), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(LLADA.tiny.config))
    one, two = (load_released(tmp_path, dtype) for dtype in (torch.float32, torch.bfloat16))
    first, second = (answer(r.model, r.vocabulary) for r in (one, two))
    assert first.std() > 0.1 and (first - second).abs().max() < 0.1 * first.abs().max()
    assert closest_release(LLADA, dict(one.model.config), one.vocabulary)[1]
