"""Folders and parts as users of diffusers load, place, compile and send them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoModel, DiffusionPipeline
from folder_trees import tree
from safetensors.torch import load_file
from tiny_pipeline import tiny_pipeline

from unidiff.models.transformer import MaskedTransformer
from unidiff.pipeline import UniDiffPipeline
from unidiff.pipelines.card import ModelFacts

WEIGHTS = "diffusion_pytorch_model"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "model"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    return tiny_pipeline()("a dog", generator=3).ids


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_entry_points_of_diffusers(saved, expected, monkeypatch, tmp_path):
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path])
    pipe = quiet(DiffusionPipeline.from_pretrained(saved, trust_remote_code=True))
    assert isinstance(pipe, UniDiffPipeline) and torch.equal(pipe("a dog", generator=3).ids, expected)
    part = AutoModel.from_pretrained(str(saved), subfolder="transformer")
    assert isinstance(part, MaskedTransformer)
    again = DiffusionPipeline.from_pretrained(saved, trust_remote_code=True, transformer=part, dtype=torch.bfloat16)
    assert again.transformer is part
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(saved)


def test_parts_that_are_given_are_taken(saved, expected):
    other = tiny_pipeline(1)
    pipe = UniDiffPipeline.from_pretrained(saved, transformer=other.transformer, image_tokenizer=other.image_tokenizer)
    assert pipe.transformer is other.transformer and pipe.image_tokenizer is other.image_tokenizer
    same = UniDiffPipeline.from_pretrained(saved, text_tokenizer=other.texts, use_safetensors=True)
    assert torch.equal(quiet(same)("a dog", generator=3).ids, expected)
    with pytest.raises(ValueError, match="brings its own image_tokenizer"):
        UniDiffPipeline.from_pretrained(saved, image_tokenizer="somewhere")
    with pytest.raises(ValueError, match="use_safetensors is False"):
        UniDiffPipeline.from_pretrained(saved, use_safetensors=False)


@pytest.mark.parametrize("size", [None, "20KB"])
def test_variants_are_read_by_their_name(expected, tmp_path, size):
    tiny_pipeline().save_pretrained(tmp_path / "m", variant="fp32", max_shard_size=size)
    assert {path.name.split(".")[-1] for path in (tmp_path / "m" / "transformer").iterdir()} <= {"json", "safetensors"}
    assert all(".fp32" in path.name for path in (tmp_path / "m" / "transformer").iterdir() if WEIGHTS in path.name)
    pipe = quiet(UniDiffPipeline.from_pretrained(tmp_path / "m", variant="fp32"))
    assert torch.equal(pipe("a dog", generator=3).ids, expected)
    with pytest.raises(FileNotFoundError, match=WEIGHTS):
        UniDiffPipeline.from_pretrained(tmp_path / "m")
    with pytest.raises(FileNotFoundError, match="fp16"):
        UniDiffPipeline.from_pretrained(tmp_path / "m", variant="fp16")
    pipe.save_pretrained(tmp_path / "m")  # a folder of ours, which holds one variant
    assert not [path for path in (tmp_path / "m").rglob("*fp32*")]
    with pytest.raises(ValueError, match=r"variant is '\.\./x'"):
        pipe.save_pretrained(tmp_path / "n", variant="../x")


def test_dtypes(saved, tmp_path):
    pipe = UniDiffPipeline.from_pretrained(saved, dtype=torch.bfloat16)
    assert pipe.dtype == torch.bfloat16 and pipe.image_tokenizer.dtype == torch.float32
    pipe.save_pretrained(tmp_path / "half")
    assert UniDiffPipeline.from_pretrained(tmp_path / "half").dtype == torch.float32
    for low in (True, False, None):
        again = UniDiffPipeline.from_pretrained(tmp_path / "half", dtype="auto", low_cpu_mem_usage=low)
        assert again.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="mean the same"):
        UniDiffPipeline.from_pretrained(saved, dtype="auto", torch_dtype=torch.float32)


@pytest.mark.parametrize("place", ["cpu", torch.device("cpu"), "auto", {"": "cpu"}, "disk"])
def test_device_maps(saved, expected, tmp_path, place):
    pytest.importorskip("accelerate")
    kept = {"offload_folder": tmp_path} if place == "disk" else {}
    if kept:
        place = {name.partition(".")[0]: "cpu" for name in tiny_pipeline().transformer.state_dict()} | {
            "blocks": "disk"
        }
    pipe = quiet(UniDiffPipeline.from_pretrained(saved, device_map=place, **kept))
    assert bool(kept) == pipe.transformer.blocks[0].feed_forward.up.weight.is_meta
    assert torch.equal(pipe("a dog", generator=3).ids, expected)


def test_maps_over_several_accelerators_are_refused(saved):
    from unidiff.pipelines.folder import check_spread

    model = tiny_pipeline().transformer
    model.hf_device_map = {"embed_tokens": 0, "blocks.0": "cuda:1", "output_weight": "cpu"}
    with pytest.raises(ValueError, match="over cuda:0, cuda:1; give one accelerator"):
        check_spread(model)


def test_offloading_goes_through_its_hooks(saved, expected, monkeypatch):
    """On the CPU alone nothing moves, but every part is brought before it computes, and freed after a call."""
    accelerate = pytest.importorskip("accelerate")
    pipe, brought = tiny_pipeline(), []
    pipe.enable_model_cpu_offload(device="cpu")
    pre = accelerate.hooks.CpuOffload.pre_forward
    monkeypatch.setattr(
        accelerate.hooks.CpuOffload, "pre_forward", lambda *a, **k: brought.append(type(a[1]).__name__) or pre(*a, **k)
    )
    assert torch.equal(pipe("a dog", generator=3).ids, expected)
    assert brought == ["MaskedTransformer", "CellVQModel"]
    assert pipe.caption(tiny_pipeline()("a dog", generator=3).images, generator=1).texts
    pipe = tiny_pipeline()
    with pytest.raises(ValueError, match="needs an accelerator"):
        pipe.enable_sequential_cpu_offload()
    pipe.enable_sequential_cpu_offload(device="cpu")
    assert torch.equal(pipe("a dog", generator=3).ids, expected)
    for kind in ({"offload_type": "block_level", "num_blocks_per_group": 1}, {"offload_type": "leaf_level"}):
        pipe = tiny_pipeline()
        pipe.enable_group_offload(onload_device=torch.device("cpu"), **kind)
        for cache in (None, "adaptive"):
            other = tiny_pipeline()("a dog", generator=3, cache=cache).ids
            assert torch.equal(pipe("a dog", generator=3, cache=cache).ids, other)


def test_layerwise_casting_keeps_weights_in_eight_bits():
    pipe = tiny_pipeline()
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    kinds = {name: value.dtype for name, value in pipe.transformer.named_parameters()}
    assert kinds["blocks.0.attention.qkv.weight"] == kinds["blocks.0.feed_forward.up.weight"] == torch.float8_e4m3fn
    assert kinds["embed_tokens.weight"] == torch.float32
    rounded = tiny_pipeline()
    for name, value in rounded.transformer.named_parameters():
        value.data = value.data.to(kinds[name]).float()
    for cache in (None, "adaptive"):
        asked = [p("a dog", generator=3, cache=cache).ids for p in (pipe, rounded)]
        assert torch.equal(*asked)


def test_regions_are_compiled(expected):
    pipe = tiny_pipeline()
    seen = []
    pipe.transformer.compile_repeated_blocks(backend=lambda graph, inputs: seen.append(graph) or graph.forward)
    assert torch.equal(pipe("a dog", generator=3).ids, expected) and seen


@pytest.mark.parametrize("cache", ["dual", "prefix", "max-logit", "adaptive"])
def test_layers_share_one_compiled_program_beside_a_cache(cache):
    counts = []
    for layers in (3, 9):  # more layers than dynamo compiles programs of one function, by its default
        torch.compiler.reset()
        seen = []
        torch.manual_seed(0)
        pipe = tiny_pipeline(num_layers=layers)
        plain = pipe("a dog", generator=3, cache=cache).ids
        pipe.transformer.compile_repeated_blocks(
            backend=lambda graph, inputs, seen=seen: seen.append(1) or graph.forward
        )
        assert torch.equal(pipe("a dog", generator=3, cache=cache).ids, plain)
        counts.append(len(seen))
    assert 0 < counts[0] == counts[1]


def test_gradients_with_checkpointing_are_the_same():
    batch = tuple(torch.arange(18).view(2, 9) if i == 0 else torch.zeros(2, 9, dtype=torch.long) for i in range(2))
    positions = torch.arange(9)[:, None].expand(2, 9, 3)
    found = []
    for checkpointing in (False, True):
        model = tiny_pipeline().transformer
        if checkpointing:
            model.enable_gradient_checkpointing()
            assert model.is_gradient_checkpointing
        model.head(model.hidden(*batch, positions)).square().mean().backward()
        found.append({name: value.grad for name, value in model.named_parameters()})
    assert all(torch.equal(found[0][name], grad) for name, grad in found[1].items() if grad is not None)
    model.disable_gradient_checkpointing()
    assert not model.is_gradient_checkpointing


class WholePass(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, modality, positions, mask):
        return self.model.head(self.model.hidden(ids, modality, positions, mask))


@pytest.mark.parametrize(
    "config", [{}, {"image_embeddings": 2, "grid_embeddings": 4}, {"rope_grid": 2}, {"attention": "block_causal", "block_length": 3}]
)  # fmt: skip
def test_a_whole_pass_is_exported(config):
    torch.manual_seed(0)
    model = MaskedTransformer(30, hidden_size=16, num_layers=2, num_heads=2, **config).eval()
    modality = (torch.arange(9) > 4).long().expand(2, 9).contiguous()
    positions = torch.arange(9)[:, None].expand(2, 9, 3) % 4
    inputs = torch.arange(18).view(2, 9), modality, positions.contiguous(), torch.ones(2, 1, 9, 9, dtype=torch.bool)
    with torch.no_grad():
        program = torch.export.export(WholePass(model), inputs)
        torch.testing.assert_close(program.module()(*inputs), WholePass(model)(*inputs))
        other = (inputs[0].flip(1), modality.flip(0), *inputs[2:])
        torch.testing.assert_close(program.module()(*other), WholePass(model)(*other))


def test_quantised_while_it_is_read(saved):
    pytest.importorskip("torchao"), pytest.importorskip("accelerate")
    from diffusers import PipelineQuantizationConfig, TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    kind = TorchAoConfig(Int8WeightOnlyConfig())
    for config in (kind, PipelineQuantizationConfig(quant_mapping={"transformer": kind})):
        pipe = quiet(UniDiffPipeline.from_pretrained(saved, quantization_config=config))
        assert type(pipe.transformer.blocks[0].feed_forward.up.weight.data) is not torch.Tensor
        assert pipe("a dog", generator=3).images
        with pytest.raises(ValueError, match="of few bits or of one rank; save the plain model"):
            pipe.save_pretrained(saved)


RANKS = """
import sys, torch
sys.path[:0] = sys.argv[1:2]
torch.set_num_threads(1)
from unidiff import UniDiffPipeline
pipe = UniDiffPipeline.from_pretrained(sys.argv[2], tp_plan="auto")
pipe.set_progress_bar_config(disable=True)
block = pipe.transformer.blocks[0]
assert block.attention.qkv.weight.to_local().shape[0] * 2 == block.attention.qkv.weight.shape[0]
asked = [dict(cache=cache) for cache in (None, "dual", "adaptive")]
ids = [pipe.generate(generator=3, **options).ids for options in asked]
try:
    pipe("a dog")
except ValueError as error:
    said = str(error)
torch.save((ids, said), f"{sys.argv[3]}/{torch.distributed.get_rank()}.pt")
torch.distributed.destroy_process_group()
"""


def test_two_processes_share_a_model_and_draw_the_same(saved, tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone"]
    command += [str(tmp_path / "ranks.py"), str(Path(__file__).parents[1]), str(saved), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    alone = [tiny_pipeline().generate(generator=3, cache=cache).ids for cache in (None, "dual", "adaptive")]
    for rank in range(2):
        ids, said = torch.load(tmp_path / f"{rank}.pt")
        assert all(torch.equal(one, other) for one, other in zip(ids, alone, strict=True))
        assert "give generator=" in said


def test_what_cannot_be_spread(monkeypatch):
    from unidiff.models.parallel import spread

    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="start them with torchrun"):
        spread(tiny_pipeline().transformer)


def test_a_card_of_ours_is_renewed_and_a_persons_stays(saved, tmp_path):
    from huggingface_hub import ModelCard

    facts = ModelFacts(
        "ann/foxes", "Foxes on plain backgrounds.", "cc-by-4.0", "photographs by Ann, CC BY 4.0",
        {"steps": 400, "lora.rank": 8}, {"EmojiEval": {"text to image": 0.957, "caption": 0.9}},
    )  # fmt: skip
    pipe = UniDiffPipeline.from_pretrained(saved)
    pipe.save_pretrained(tmp_path / "m", facts=facts)
    card = ModelCard.load(tmp_path / "m" / "README.md")
    assert (card.data.license, card.data.library_name, card.data.model_name) == ("cc-by-4.0", "unidiff", "ann/foxes")
    assert {(r.dataset_name, r.metric_name, r.metric_value) for r in card.data.eval_results} == {
        ("EmojiEval", "text to image", 0.957), ("EmojiEval", "caption", 0.9),
    }  # fmt: skip
    for words in (
        'from_pretrained("ann/foxes")',
        "`lora.rank`: 8",
        "photographs by Ann",
        "`inpaint`",
        "EmojiEval, caption",
    ):
        assert words in card.content
    pipe.save_pretrained(tmp_path / "m")
    assert "ann/foxes" not in (tmp_path / "m" / "README.md").read_text()
    with open(tmp_path / "m" / "README.md", "a") as file:
        file.write("My own words.\n")
    mine = (tmp_path / "m" / "README.md").read_bytes()
    pipe.save_pretrained(tmp_path / "m", facts=facts)
    assert (tmp_path / "m" / "README.md").read_bytes() == mine
    with pytest.raises(ValueError, match=r"ModelFacts\.license"):
        ModelFacts(license=3)


def test_code_of_a_person_stays(saved, tmp_path):
    folder = Path(shutil.copytree(saved, tmp_path / "m"))
    (folder / "pipeline.py").write_text("print('mine')\n")
    before = tree(folder)
    with pytest.raises(ValueError, match=r"pipeline\.py would be lost"):
        tiny_pipeline().save_pretrained(folder)
    assert tree(folder) == before


def test_weights_of_a_variant_alone_are_smaller(tmp_path):
    pipe = tiny_pipeline().to(torch.float16)
    pipe.images.to(torch.float32)
    pipe.save_pretrained(tmp_path / "m", variant="fp16")
    kinds = {
        value.dtype for value in load_file(tmp_path / "m" / "transformer" / f"{WEIGHTS}.fp16.safetensors").values()
    }
    assert kinds == {torch.float16}
    assert json.loads((tmp_path / "m" / "model_index.json").read_text())["_class_name"] == [
        "pipeline",
        "UniDiffPipeline",
    ]
