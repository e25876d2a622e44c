"""The fine-tuning recipe as a command: from a pipeline folder to a pipeline folder."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pipeline import tiny_parts

from unidiff.models.transformer import MaskedTransformer
from unidiff.pipeline import UniDiffPipeline
from unidiff.pipelines.card import ModelFacts
from unidiff.tokens import Vocabulary
from unidiff.tokens.image.vq import VQImageTokenizer
from unidiff.train.data.source import TokenTable

pytestmark = pytest.mark.training
ROOT = Path(__file__).resolve().parents[2]
QUICK = ["device=cpu", "precision=fp32", "batch_size=4", "schedule.warmup=0", "optimiser.lr=1e-2", "ema.decay=0.5"]
QUICK += ["data.validation_rows=4", "logging.trackers=[]", "logging.progress=false", "logging.validate_every=0"]
QUICK += ["checkpoint.export_dtype=float32"]
needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="peft (the `finetune` extra) is not installed"
)


def finetune(*arguments: object) -> int:
    spec = importlib.util.spec_from_file_location("finetune_recipe", ROOT / "training" / "finetune.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    return recipe.main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A pipeline folder, and a token table for it whose captions name the picture."""
    folder = tmp_path_factory.mktemp("base")
    transformer, image, text, settings = tiny_parts()
    pipe, facts = (
        UniDiffPipeline(transformer, VQImageTokenizer(image), text, settings),
        ModelFacts(license="mit", artwork="my dogs"),
    )
    pipe.save_pretrained(folder / "pipeline", facts=facts)
    vocabulary, length = settings.vocabulary, settings.text_length
    kind = torch.arange(32) % 2
    captions = torch.full((32, length), vocabulary.specials["eos"])
    captions[:, 0], captions[:, 1] = vocabulary.specials["caption"], 20 + kind
    questions = captions.clone()
    questions[:, 0], questions[:, 2] = vocabulary.specials["question"], vocabulary.specials["answer"]
    questions[:, 1], questions[:, 3] = 30, 20 + kind
    codes = (kind * 7)[:, None, None].expand(32, *settings.grid)
    tensors = {"codes": codes, "captions": captions, "questions": questions[:, None]}
    tensors["answer_start"] = torch.full((32, 1), 3)
    TokenTable(tensors, vocabulary).save(folder / "tokens.safetensors")
    return folder


@pytest.mark.parametrize("extra", [[], pytest.param(["lora.rank=4", "lora.alpha=32"], marks=needs_peft)])
def test_from_pipeline_to_pipeline(base, tmp_path, extra):
    out = tmp_path / "out"
    command = [
        base / "pipeline",
        f"data.train={base / 'tokens.safetensors'}",
        f"output={out}",
        "steps=6",
        *QUICK,
        *extra,
    ]
    assert finetune(*command) == 0
    before, after = (UniDiffPipeline.from_pretrained(f) for f in (base / "pipeline", out / "pipeline"))
    trained = MaskedTransformer.from_pretrained(out / "model")
    old = dict(before.transformer.named_parameters())
    changed = set()
    for name, value in after.transformer.named_parameters():
        assert torch.equal(value, trained.get_parameter(name))
        if not torch.equal(value, old[name]):
            changed.add(name)
    layers = {
        n
        for n in old
        if n.startswith("blocks.") and n.endswith(("qkv.weight", "out.weight", "up.weight", "down.weight"))
    }
    assert changed == layers if extra else layers < changed
    assert (out / "adapter").is_dir() == bool(extra)
    card = (out / "pipeline" / "README.md").read_text()
    assert "Weights: mit. Pictures it was trained on: my dogs; pictures of later training: not stated." in card
    assert "- `steps`: 6" in card and ("- `lora.rank`: 4" in card) == bool(extra) and str(base) not in card
    if extra:  # the adapter on the base is the merged pipeline
        before.load_lora_weights(out / "adapter")
        before.fuse_lora()
        before.unload_lora_weights()
        for name, value in before.transformer.named_parameters():
            torch.testing.assert_close(value, trained.get_parameter(name), atol=1e-6, rtol=0)
    assert after.settings == before.settings and after.text_to_image("a dog", steps=2).images
    assert finetune(*command[:3], "steps=6", *QUICK, *extra) == 0  # a finished run: nothing more to do


def test_instruction_tuning_trains_the_answer_and_nothing_else(base, tmp_path):
    """With answers as the only targets, the wrong question or picture costs nothing: only the answer is learnt."""
    from unidiff.train.config import read_config
    from unidiff.train.data.tasks import TaskMixer

    table = TokenTable.load(base / "tokens.safetensors")
    config = read_config(ROOT / "configs" / "instruction.yaml", [f"output={tmp_path}", *QUICK])
    batch = TaskMixer(table, config.tasks, config.objective, 0).batch(0, 16)
    places = torch.arange(batch.batch.shape[1])
    expected = (places >= 3) & (places < table.text_length)
    assert torch.equal(batch.batch.targets, expected.expand(16, -1))
    command = [base / "pipeline", ROOT / "configs" / "instruction.yaml", f"data.train={base / 'tokens.safetensors'}"]
    command += [f"output={tmp_path}", "steps=40", "lora.rank=0", *QUICK]
    assert finetune(*command) == 0
    answers = []
    for folder in (base / "pipeline", tmp_path / "pipeline"):
        pipe = UniDiffPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        ids, total = table.fetch(torch.arange(16)), 0.0
        with torch.no_grad():
            noisy = batch.batch.hide_targets(table.vocabulary)
            logits = pipe.transformer(noisy)[:, 3, : table.vocabulary.text_size]
            total = torch.nn.functional.cross_entropy(logits, ids.questions[:, 3]).item()
        answers.append(total)
    assert answers[1] < 0.5 * answers[0]


def test_a_full_sequence_model_becomes_block_causal(base, tmp_path):
    command = [base / "pipeline", f"data.train={base / 'tokens.safetensors'}", f"output={tmp_path}", "steps=2", *QUICK]
    assert finetune(*command, "model.attention=block_causal", "model.block_length=4") == 0
    pipe = UniDiffPipeline.from_pretrained(tmp_path / "pipeline")
    assert (pipe.transformer.config.attention, pipe.transformer.config.block_length) == ("block_causal", 4)
    samplers = pipe.settings.samplers.values()  # decoded in the blocks it was trained in
    assert {length for s in samplers for length in (s.text.block_length, s.image.block_length)} == {4}
    assert pipe.text_to_image("a dog", steps=2).images


def test_refusals(base, tmp_path, capsys):
    data = f"data.train={base / 'tokens.safetensors'}"
    assert finetune(tmp_path / "nothing", data) == 2 and "does not exist" in capsys.readouterr().err
    assert finetune(base, data) == 2 and "neither a pipeline nor a transformer" in capsys.readouterr().err
    assert finetune(base / "pipeline", data, "model.hidden_size=32") == 2
    assert "model.hidden_size = 32" in capsys.readouterr().err
    other = Vocabulary.unified(300, 16, {"eos": 0})
    tensors = {"codes": torch.zeros(8, 2, 3, dtype=torch.long), "captions": torch.zeros(8, 10, dtype=torch.long)}
    TokenTable(tensors, other).save(tmp_path / "other.safetensors")
    arguments = [f"data.train={tmp_path / 'other.safetensors'}", f"output={tmp_path / 'o'}", *QUICK]
    assert finetune(base / "pipeline", *arguments) == 2
    assert "encode it with the model's tokenizers" in capsys.readouterr().err


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_base_is_neither_written_into_nor_replaced(base, tmp_path, capsys):
    pipeline = Path(shutil.copytree(base / "pipeline", tmp_path / "run" / "pipeline"))
    before = snapshot(tmp_path)
    data = [f"data.train={base / 'tokens.safetensors'}", "steps=1", *QUICK]
    for output in (pipeline, pipeline / "run", pipeline / "transformer", tmp_path / "run"):
        assert finetune(pipeline, f"output={output}", *data) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and str(tmp_path / "run") in said and said.count("\n") == 1, said
    (tmp_path / "link").symlink_to(pipeline)
    assert finetune(pipeline, f"output={tmp_path / 'link'}", *data) == 2
    assert finetune(pipeline / "transformer", f"output={pipeline / 'transformer'}", *data) == 2
    assert snapshot(tmp_path) == before


def test_a_tuning_of_another_base_does_not_continue_the_first(base, tmp_path, capsys):
    other = Path(shutil.copytree(base / "pipeline", tmp_path / "other"))
    (path,) = (other / "transformer").glob("*.safetensors")
    weights = load_file(path)
    name = next(n for n in weights if n.startswith("blocks."))
    weights[name] += 1e-3
    save_file(weights, path)
    out = f"output={tmp_path / 'out'}"
    data = [f"data.train={base / 'tokens.safetensors'}", "steps=2", *QUICK]
    assert finetune(base / "pipeline", out, *data) == 0
    before = snapshot(tmp_path / "out")
    assert finetune(other, out, *data) == 2
    said = capsys.readouterr().err
    assert "checkpoint.init_from content = " in said and "checkpoint.changed=allow" in said
    assert snapshot(tmp_path / "out") == before
    copy = shutil.copytree(base / "pipeline", tmp_path / "copy")
    assert finetune(copy, out, *data, "steps=3") == 0  # the same weights elsewhere


@needs_peft
def test_adapters_go_on_as_they_began(base, tmp_path, capsys):
    out = [
        base / "pipeline",
        f"output={tmp_path / 'out'}",
        f"data.train={base / 'tokens.safetensors'}",
        "steps=2",
        *QUICK,
    ]
    assert finetune(*out, "lora.rank=4", "lora.alpha=8") == 0
    for change, said in (
        ("lora.alpha=64", "lora.alpha = 8.0, here 64.0"),
        ("lora.rank=8", "lora.rank = 4, here 8"),
        ("lora.targets=[qkv]", 'lora.targets = [], here ["qkv"]'),
        ("lora.dora=true", "lora.dora = false, here true"),
        ("lora.rank=0", "lora.rank = 4, here 0"),
    ):
        assert finetune(*out, "lora.rank=4", "lora.alpha=8", change) == 2
        assert said in capsys.readouterr().err
    assert finetune(*out, "lora.rank=4", "lora.alpha=64", "checkpoint.changed=allow", "steps=3") == 0


def test_tokenizers_that_cannot_be_used_are_said_before_training(base, tmp_path, capsys):
    for part, name in (
        ("image_tokenizer", "diffusion_pytorch_model.safetensors"),
        ("text_tokenizer", "tokenizer.json"),
    ):
        broken = shutil.copytree(base / "pipeline", tmp_path / part)
        if name.endswith(".json"):
            (broken / part / name).write_text("{")
        else:
            weights = load_file(broken / part / name)
            first = min(name for name, value in weights.items() if value.is_floating_point())
            weights[first].view(-1)[0] = float("nan")
            save_file(weights, broken / part / name)
        command = [broken, f"data.train={base / 'tokens.safetensors'}", f"output={tmp_path / 'out'}", "steps=1", *QUICK]
        assert finetune(*command) == 2
        assert part in capsys.readouterr().err and not (tmp_path / "out").exists()
