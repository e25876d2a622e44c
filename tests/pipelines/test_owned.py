"""A folder is replaced only where unidiff wrote everything in it: nothing of anybody else is ever lost."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import VQModel
from folder_trees import tree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny_pipeline import tiny_parts, tiny_pipeline

from unidiff.models.trained_on import TrainedOn
from unidiff.models.transformer import MaskedTransformer
from unidiff.pipeline import UniDiffPipeline
from unidiff.pipelines.owned import check_replaceable, check_target, others_in_model, others_in_pipeline
from unidiff.tokens.image.vq import VQImageTokenizer
from unidiff.tokens.text import TextTokenizer

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def pipe() -> UniDiffPipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "model"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def put(path: Path, text: str = "mine") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def link_away(path: Path) -> None:
    """The same content, behind a link that somebody made."""
    away = path.parent.parent / f"away-{path.name}"
    shutil.move(path, away)
    path.symlink_to(away)


THEIRS = {
    "notes": (lambda f: put(f / "notes.txt"), "notes.txt"),
    "a readme behind a link": (lambda f: link_away(f / "README.md"), "README.md"),
    "a folder in place of the readme": (
        lambda f: (f / "README.md").unlink() or (f / "README.md").mkdir(),
        "README.md/",
    ),
    "code that is not ours": (lambda f: put(f / "pipeline.py"), "pipeline.py"),
    "a hidden file": (lambda f: put(f / ".gitattributes"), ".gitattributes"),
    "a history": (lambda f: put(f / ".git" / "HEAD"), ".git/"),
    "checkpoints": (lambda f: put(f / "checkpoints" / "step-00000010" / "state.json"), "checkpoints/"),
    "a network of another library": (lambda f: put(f / "unet" / "config.json", "{}"), "unet/"),
    "an empty folder": (lambda f: (f / "samples").mkdir(), "samples/"),
    "notes among the weights": (lambda f: put(f / "transformer" / "notes.txt"), "transformer/notes.txt"),
    "a folder among the weights": (lambda f: put(f / "transformer" / "old" / "x"), "transformer/old/"),
    "weights of another kind": (lambda f: put(f / "transformer" / "model.safetensors"), "transformer/"),
    "a variant": (
        lambda f: shutil.copy(
            f / "transformer" / WEIGHTS, f / "transformer" / "diffusion_pytorch_model.fp16.safetensors"
        ),
        "transformer/diffusion_pytorch_model.fp16.safetensors",
    ),
    "words of another tokenizer": (lambda f: put(f / "text_tokenizer" / "vocab.txt"), "text_tokenizer/vocab.txt"),
    "what a run exports": (lambda f: TrainedOn((2, 3), 10, ()).save(f / "transformer"), "transformer/trained_on.json"),
    "code": (lambda f: put(f / "text_tokenizer" / "tok.py"), "text_tokenizer/tok.py"),
    "a chat template": (
        lambda f: put(f / "image_tokenizer" / "chat_template.jinja"),
        "image_tokenizer/chat_template.jinja",
    ),
    "other weights under our name": (
        lambda f: save_file({"lora": torch.zeros(2)}, f / "transformer" / WEIGHTS),
        f"transformer/{WEIGHTS}",
    ),
    "weights that are cut": (
        lambda f: (f / "transformer" / WEIGHTS).write_bytes((f / "transformer" / WEIGHTS).read_bytes()[:-9]),
        f"transformer/{WEIGHTS}",
    ),
    "a model of another class": (
        lambda f: edit(f / "image_tokenizer" / "config.json", _class_name="AutoencoderKL"),
        "image_tokenizer/config.json",
    ),
    "a note in the index": (lambda f: edit(f / "model_index.json", note="mine"), "model_index.json"),
    "an index of another class": (
        lambda f: edit(f / "model_index.json", _class_name="StableDiffusionPipeline"),
        "model_index.json",
    ),
    "no index": (lambda f: (f / "model_index.json").unlink(), "transformer/"),
    "an index that is none": (lambda f: (f / "model_index.json").write_text("[]"), "model_index.json"),
    "a part behind a link": (lambda f: link_away(f / "transformer"), "transformer"),
    "a file behind a link": (lambda f: link_away(f / "transformer" / "config.json"), "transformer/config.json"),
    "an index behind a link": (lambda f: link_away(f / "model_index.json"), "model_index.json"),
    "a link that leads nowhere": (lambda f: (f / "later").symlink_to("nowhere"), "later"),
    "a pipe": (lambda f: os.mkfifo(f / "transformer" / "pipe"), "transformer/pipe"),
    "a pipe in place of the index": (
        lambda f: (f / "model_index.json").unlink() or os.mkfifo(f / "model_index.json"),
        "model_index.json",
    ),
    "a file in place of a part": (
        lambda f: shutil.rmtree(f / "text_tokenizer") or put(f / "text_tokenizer"),
        "text_tokenizer",
    ),
}


@pytest.mark.parametrize("name", THEIRS)
def test_saving_over_what_is_not_ours_is_refused_and_named(pipe, copy, name):
    change, named = THEIRS[name]
    change(copy)
    before = tree(copy)
    with pytest.raises(ValueError) as caught:
        pipe.save_pretrained(copy)
    said = str(caught.value)
    assert named in said and str(copy) in said and "save to a new folder" in said and "\n" not in said
    assert tree(copy) == before
    assert not [p for p in copy.parent.iterdir() if p.name.startswith(".")]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_lies_in_a_pipeline_is_kept(saved, tmp_path_factory, data):
    folder = Path(shutil.copytree(saved, tmp_path_factory.mktemp("planted") / "model"))
    parts = st.sampled_from(["transformer", "image_tokenizer", "text_tokenizer", "vae", "scheduler", "logs", "."])
    words = st.text("abcdelmnostx_-. 0159", min_size=1, max_size=8).filter(lambda w: w.strip(".") and w.strip() == w)
    known = ["config.json", WEIGHTS, "model_index.json", "tokenizer.json", "vocabulary.json.bak", "events.out"]
    path = folder / data.draw(parts) / data.draw(words | st.sampled_from(known))
    if path.exists() or path.name == "README.md":
        return
    path.mkdir(parents=True) if data.draw(st.booleans()) else put(path)
    before = tree(folder)
    with pytest.raises(ValueError, match="would be lost"):
        check_target(folder)
    assert tree(folder) == before


def test_our_own_folder_is_replaced_whatever_it_was_saved_from(pipe, copy):
    assert others_in_pipeline(copy) == []
    other = tiny_pipeline(1)
    other.save_pretrained(copy, max_shard_size="20KB")
    assert (copy / "transformer" / f"{WEIGHTS}.index.json").is_file() and others_in_pipeline(copy) == []
    pipe.save_pretrained(copy)  # and back to one file
    assert others_in_pipeline(copy) == []
    again = UniDiffPipeline.from_pretrained(copy)
    assert torch.equal(again.transformer.embed_tokens.weight, pipe.transformer.embed_tokens.weight)
    assert sorted(p.name for p in copy.parent.iterdir()) == ["model"]


def test_what_comes_while_the_folder_is_written_is_kept(pipe, copy, monkeypatch):
    from unidiff.pipelines import owned

    def write(temporary: Path) -> None:
        put(temporary / "model_index.json", "{}")
        put(copy / "notes.txt")

    with pytest.raises(ValueError, match=r"notes\.txt would be lost"):
        owned.write_folder(copy, write)
    assert (copy / "notes.txt").read_text() == "mine" and UniDiffPipeline.from_pretrained(copy)


def test_a_run_whose_output_is_the_model_itself_is_kept(pipe, copy):
    for name in (
        "checkpoints/latest",
        "metrics.jsonl",
        "config.yaml",
        "model/config.json",
        "pipeline/model_index.json",
    ):
        put(copy / name)
    before = tree(copy)
    with pytest.raises(
        ValueError, match=r"checkpoints/, config\.yaml, metrics\.jsonl, model/, pipeline/ would be lost"
    ):
        pipe.save_pretrained(copy)
    assert tree(copy) == before


def test_model_folders(tmp_path):
    transformer, _, _, settings = tiny_parts()
    transformer.save_pretrained(tmp_path / "run" / "model")
    put(tmp_path / "run" / "model" / "vocabulary.json", json.dumps(settings.vocabulary.to_dict()))
    TrainedOn((2, 3), 10, ("generate",)).save(tmp_path / "run" / "model")
    assert others_in_model(tmp_path / "run" / "model") == []
    put(tmp_path / "run" / "model" / "notes.txt")
    put(tmp_path / "run" / "model" / "vocabulary.json", '{"words": ["mine"]}')
    assert others_in_model(tmp_path / "run" / "model") == ["notes.txt", "vocabulary.json"]
    put(tmp_path / "sd" / "unet" / "config.json", '{"_class_name": "UNet2DConditionModel"}')
    with pytest.raises(ValueError, match=r"holds no model that unidiff wrote; unet/ would be lost"):
        check_replaceable(tmp_path / "sd", others_in_model, "model")
    put(tmp_path / "empty" / "x")
    (tmp_path / "empty" / "x").unlink()
    check_replaceable(tmp_path / "empty", others_in_model, "model")
    check_replaceable(tmp_path / "new", others_in_model, "model")


def test_saving_a_model_keeps_other_models(tmp_path):
    transformer, image, _, _ = tiny_parts()
    transformer.save_pretrained(tmp_path / "t")
    put(tmp_path / "t" / "notes.txt")
    before = tree(tmp_path / "t")
    with pytest.raises(ValueError, match="holds a MaskedTransformer, which would be lost"):
        image.save_pretrained(tmp_path / "t")
    assert tree(tmp_path / "t") == before
    transformer.save_pretrained(tmp_path / "t", max_shard_size="20KB")  # the same class again
    assert (tmp_path / "t" / "notes.txt").read_text() == "mine" and not (tmp_path / "t" / WEIGHTS).exists()
    transformer.save_pretrained(tmp_path / "t")
    assert sorted(p.name for p in (tmp_path / "t").iterdir()) == ["config.json", WEIGHTS, "notes.txt"]
    MaskedTransformer.from_pretrained(tmp_path / "t")
    put(tmp_path / "unet" / "config.json", '{"_class_name": "UNet2DConditionModel"}')
    with pytest.raises(ValueError, match="holds a UNet2DConditionModel"):
        transformer.save_pretrained(tmp_path / "unet")
    put(tmp_path / "bare" / WEIGHTS)
    with pytest.raises(ValueError, match="holds a weight file"):
        transformer.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="is a file"):
        transformer.save_pretrained(tmp_path / "bare" / WEIGHTS)


def test_a_link_is_written_through_and_what_it_leads_to_is_looked_at(pipe, copy, tmp_path):
    put(tmp_path / "photos" / "a.png")
    links = {name: tmp_path / f"{name} link" for name in ("photos", "model", "later", "circle")}
    for name, link in links.items():
        link.symlink_to(link if name == "circle" else tmp_path / name)
    with pytest.raises(ValueError, match=r"a\.png would be lost"):
        pipe.save_pretrained(links["photos"])
    with pytest.raises(OSError, match="symbolic links"):
        pipe.save_pretrained(links["circle"])
    for name in ("model", "later"):
        pipe.save_pretrained(links[name])
        assert links[name].is_symlink() and not (tmp_path / name).is_symlink()
        assert UniDiffPipeline.from_pretrained(links[name]).settings == pipe.settings
    (copy / "inside").symlink_to(tmp_path / "elsewhere")  # a folder of a run on another disk
    pipe.save_pretrained(copy / "inside")
    assert (copy / "inside").is_symlink() and others_in_pipeline(tmp_path / "elsewhere") == []
    assert (tmp_path / "photos" / "a.png").read_text() == "mine" and links["circle"].is_symlink()


def test_tokenizers_of_others_are_kept(tmp_path):
    mine = TextTokenizer.train(["a dog"] * 3, 300)
    for name, class_name in (("llama", "LlamaTokenizer"), ("damaged", None)):
        put(tmp_path / name / "tokenizer.json", "{}")
        put(
            tmp_path / name / "tokenizer_config.json",
            json.dumps({"tokenizer_class": class_name}) if class_name else "{",
        )
        before = tree(tmp_path / name)
        with pytest.raises(ValueError, match="holds another tokenizer"):
            mine.save_pretrained(tmp_path / name)
        assert tree(tmp_path / name) == before
    put(tmp_path / "beside" / "notes.txt")
    for words in (["a dog"] * 3, ["two cats"] * 3):
        TextTokenizer.train(words, 300).save_pretrained(tmp_path / "beside")
    assert sorted(tree(tmp_path / "beside")) == ["notes.txt", "tokenizer.json", "tokenizer_config.json"]


def test_image_tokenizers_of_another_library_are_saved_with_the_same_care(tmp_path):
    blocks = {"down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"]}
    model = VQModel(block_out_channels=[4], latent_channels=4, num_vq_embeddings=16, norm_num_groups=2, **blocks)
    put(tmp_path / "file")
    tiny_parts()[1].save_pretrained(tmp_path / "other")
    for place, words in (("file", "is a file"), ("other", "holds a CellVQModel")):
        with pytest.raises(ValueError, match=words):
            VQImageTokenizer(model).save_pretrained(tmp_path / place)
    VQImageTokenizer(model).save_pretrained(tmp_path / "new")
    assert others_in_model(tmp_path / "new") == [] and VQImageTokenizer.from_pretrained(tmp_path / "new").factor == 1
