"""Adapters of a pipeline: what they add, alone and together, on plain weights and on few bits, and when they are read back."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_pipeline import tiny_pipeline

from unidiff.decoding.cache.config import CACHES
from unidiff.pipeline import UniDiffPipeline
from unidiff.train.build import add_adapters, export_adapter
from unidiff.train.config import LoraConfig

pytestmark = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")


def logits(transformer) -> torch.Tensor:
    ids = torch.arange(18).view(2, 9)
    modality = (torch.arange(9) > 4).long().expand(2, 9)
    with torch.no_grad():
        return transformer.head(transformer.hidden(ids, modality, torch.arange(9)[:, None].expand(2, 9, 3)))


def draw(folder: Path, seed: int, dora: bool = False) -> Path:
    """An adapter as training writes it, of weights that do something."""
    model = tiny_pipeline().transformer
    torch.manual_seed(seed)
    add_adapters(model, LoraConfig(rank=3, alpha=6, dropout=0.5, dora=dora))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    export_adapter(model, folder)
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("adapters")
    return draw(place / "a", 1), draw(place / "b", 2)


@pytest.mark.parametrize("dora", [False, True])
def test_merged_and_unmerged_logits_agree_and_unloading_leaves_the_base(tmp_path, dora):
    pipe = tiny_pipeline()
    base = logits(pipe.transformer)
    pipe.load_lora_weights(draw(tmp_path / "a", 1, dora))
    beside = logits(pipe.transformer)
    assert (beside - base).abs().max() > 0.1 and torch.equal(beside, logits(pipe.transformer))  # no dropout
    pipe.fuse_lora()
    torch.testing.assert_close(logits(pipe.transformer), beside, atol=1e-5, rtol=0)
    pipe.unfuse_lora()
    torch.testing.assert_close(logits(pipe.transformer), beside, atol=1e-5, rtol=0)
    pipe.unload_lora_weights()
    torch.testing.assert_close(logits(pipe.transformer), base, atol=1e-5, rtol=0)
    assert [n for n, _ in pipe.transformer.named_parameters()] == [
        n for n, _ in tiny_pipeline().transformer.named_parameters()
    ]


def test_two_halves_are_the_mean_of_the_changes(adapters):
    pipe = tiny_pipeline()
    start = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    changes = []
    for folder in adapters:
        one = tiny_pipeline()
        one.load_lora_weights(folder)
        one.fuse_lora()
        one.unload_lora_weights()
        changes.append({name: value - start[name] for name, value in one.transformer.state_dict().items()})
    for name, folder in zip("ab", adapters, strict=True):
        pipe.load_lora_weights(folder, adapter_name=name)
        assert pipe.get_active_adapters() == [name]
    pipe.set_adapters(["a", "b"], [0.5, 0.5])
    assert pipe.get_list_adapters() == {"transformer": ["a", "b"]}
    both = logits(pipe.transformer)
    mean = tiny_pipeline()
    mean.transformer.load_state_dict({n: start[n] + (changes[0][n] + changes[1][n]) / 2 for n in start})
    torch.testing.assert_close(both, logits(mean.transformer), atol=1e-5, rtol=0)
    pipe.set_adapters("a", 0.0)
    torch.testing.assert_close(logits(pipe.transformer), logits(tiny_pipeline().transformer), atol=1e-5, rtol=0)
    pipe.delete_adapters("a")
    assert pipe.get_list_adapters() == {"transformer": ["b"]}


def test_a_reload_in_another_process_is_bit_identical(adapters, tmp_path):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path / "base")
    pipe.load_lora_weights(adapters[0])
    code = (
        "import sys, torch; sys.path[:0] = sys.argv[1:2]; torch.set_num_threads(1)\n"
        "from test_adapters import logits; from unidiff import UniDiffPipeline\n"
        "pipe = UniDiffPipeline.from_pretrained(sys.argv[2]); pipe.load_lora_weights(sys.argv[3])\n"
        "torch.save({'logits': logits(pipe.transformer), 'ids': pipe('a dog', generator=3).ids}, sys.argv[4])\n"
    )
    paths = [Path(__file__).parent, tmp_path / "base", adapters[0], tmp_path / "out.pt"]
    environment = {"PYTHONPATH": ":".join([str(Path(__file__).parents[1]), *sys.path])}
    subprocess.run([sys.executable, "-c", code, *map(str, paths)], check=True, env=environment, timeout=300)
    there, threads = torch.load(tmp_path / "out.pt"), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(there["logits"], logits(pipe.transformer))
        assert torch.equal(there["ids"], pipe("a dog", generator=3).ids)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("cache", [None, *CACHES])
def test_every_cache_sees_the_adapter(adapters, cache):
    """Layer by layer, rows of the packed projection are computed apart: the adapter is a part of those too."""
    network = {"attention": "block_causal", "block_length": 4} if cache in ("block-causal", "sprint") else {}
    base, beside, merged = (tiny_pipeline(**network) for _ in range(3))
    for pipe in (beside, merged):
        pipe.load_lora_weights(adapters[0])
    merged.fuse_lora()
    merged.unload_lora_weights()
    asked = [p.generate(generator=1, cache=cache) for p in (beside, merged)]
    assert torch.equal(asked[0].ids, asked[1].ids)
    assert not torch.equal(asked[0].ids, base.generate(generator=1, cache=cache).ids)
    if cache == "block-causal":  # the exact cache: the adapter's changes are in what is kept, too
        plain = beside.generate(generator=1, cache="none")
        assert asked[0].stats.key_tokens < plain.stats.key_tokens
        assert torch.equal(asked[0].ids, plain.ids)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "nowhere",
            "adapter folder 'nowhere' does not exist; name a folder or a hub model 'owner/name' with adapter_config.json",
        ),
        ("", "adapter folder '' does not exist"),
        ("emoji", "adapter folder 'emoji' does not exist"),  # which is the name of a model
        ("a file", "is a file, not an adapter folder; name the folder that holds it"),
        ("empty", "holds no adapter_config.json; name a folder with an adapter that peft wrote"),
    ],
)
def test_an_adapter_that_is_not_there(tmp_path, monkeypatch, name, said):
    monkeypatch.chdir(tmp_path)
    Path("a file").write_text("x")
    Path("empty").mkdir()
    with pytest.raises(FileNotFoundError, match=re.escape(said)):
        tiny_pipeline().load_lora_weights(name)
    with pytest.raises(TypeError, match="load_lora_weights got unknown arguments"):
        tiny_pipeline().load_lora_weights("nowhere", revison="main")


def test_peft_itself_reads_the_folder(adapters):
    from peft import PeftModel

    pipe = tiny_pipeline()
    pipe.load_lora_weights(adapters[0])
    theirs = PeftModel.from_pretrained(tiny_pipeline().transformer, str(adapters[0])).eval().base_model.model
    assert torch.equal(logits(theirs), logits(pipe.transformer))
    config = json.loads((adapters[0] / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None and (config["r"], config["lora_alpha"]) == (3, 6)


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_an_adapter_on_weights_of_few_bits(adapters):
    from unidiff.families.checkpoint.small_memory import quantise

    pipe, plain = tiny_pipeline(), tiny_pipeline()
    quantise(pipe.transformer, "int8")
    before = logits(pipe.transformer)
    for one in (pipe, plain):
        one.load_lora_weights(adapters[0], adapter_name="a")
    after = logits(pipe.transformer)
    change = logits(plain.transformer) - logits(tiny_pipeline().transformer)
    assert ((after - before) - change).abs().max() < 0.1 * change.abs().max()
    with pytest.raises(ValueError, match="cannot be folded into weights of few bits"):
        pipe.fuse_lora()
    assert pipe("a dog", generator=0, cache="adaptive").images
    pipe.unload_lora_weights()
    assert torch.equal(logits(pipe.transformer), before)


def edit(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_does_not_fit_is_refused_in_one_sentence(adapters, tmp_path):
    from safetensors.torch import load_file, save_file

    pipe = tiny_pipeline()
    base = logits(pipe.transformer)

    def weights(change):
        def damage(folder):
            held = load_file(folder / "adapter_model.safetensors")
            change(held, next(name for name in held if "lora_A" in name))
            save_file(held, folder / "adapter_model.safetensors")

        return damage

    for number, (damage, error, words) in enumerate(
        (
            (lambda f: (f / "adapter_config.json").unlink(), FileNotFoundError, "holds no adapter_config.json"),
            (lambda f: (f / "adapter_model.safetensors").unlink(), FileNotFoundError, "holds no adapter_model"),
            (lambda f: edit(f, peft_type="IA3"), ValueError, "describes a IA3"),
            (lambda f: edit(f, r="three"), ValueError, "r is 'three'"),
            (weights(lambda w, n: w.update({n: w[n][:, :3].contiguous()})), ValueError, "is for another model"),
            (weights(lambda w, n: w.update({f"x.{n}": w.pop(n)})), ValueError, "is for another model"),
            (weights(lambda w, n: w[n].fill_(torch.nan)), ValueError, "NaN or infinity"),
        )
    ):
        folder = Path(shutil.copytree(adapters[0], tmp_path / str(number)))
        damage(folder)
        with pytest.raises(error, match=words) as caught:
            pipe.load_lora_weights(folder)
        assert "\n" not in str(caught.value)
    assert torch.equal(logits(pipe.transformer), base)
    pipe.load_lora_weights(adapters[0], adapter_name="a")
    with pytest.raises(ValueError, match="already in use"):
        pipe.load_lora_weights(adapters[1], adapter_name="a")
    with pytest.raises(ValueError, match="has adapters; call fuse_lora"):
        pipe.save_pretrained(tmp_path / "new")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "new")
    again = UniDiffPipeline.from_pretrained(tmp_path / "new").transformer
    assert torch.equal(logits(again), logits(pipe.transformer))


def test_an_export_replaces_an_adapter_and_nothing_else(adapters, tmp_path):
    draw(tmp_path / "a", 1)
    draw(tmp_path / "a", 2)
    (tmp_path / "a" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds more than a LoRA adapter that unidiff wrote; notes.txt would be lost"):
        draw(tmp_path / "a", 3)
