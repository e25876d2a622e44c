"""Code that lies in a model folder is never run, and nobody is asked about it, whatever part of whatever folder names it."""

from __future__ import annotations

import builtins
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from muddit_parts import write_folder
from released_parts import write_tiny
from tiny_pipeline import tiny_pipeline
from transformers import AutoTokenizer

from unidiff.families.checkpoint.convert import convert
from unidiff.families.checkpoint.verify import describe
from unidiff.models.transformer import MaskedTransformer
from unidiff.pipeline import UniDiffPipeline
from unidiff.pipelines.owned import is_pipeline
from unidiff.pipelines.pack import pack_pipeline
from unidiff.pipelines.released import load_texts
from unidiff.tokens.image.vq import VQImageTokenizer
from unidiff.tokens.text import TextTokenizer

MAPS = {
    "AutoTokenizer": ["tok.Planted", "tok.Planted"],
    **{f"Auto{kind}": "tok.Planted" for kind in ("Config", "Model", "ModelForCausalLM", "Processor", "ImageProcessor")},
}


class NoInput(io.TextIOBase):
    """A stdin that nobody may read."""

    def readable(self) -> bool:
        return True

    def readline(self, *_) -> str:
        raise AssertionError("stdin was read")

    read = readline


@pytest.fixture(autouse=True)
def nobody_asks(monkeypatch):
    def asked(*_):
        raise AssertionError("somebody was asked")

    monkeypatch.setattr(builtins, "input", asked)
    monkeypatch.setattr(sys, "stdin", NoInput())


@pytest.fixture
def marker(tmp_path) -> Path:
    return tmp_path / "the planted code ran"


def plant(folder: Path, marker: Path) -> None:
    """Code under every name that a library could look for, in every part of a folder, and configs that name it."""
    code = f"open({str(marker)!r}, 'w').write('ran')\nclass Planted: pass\n"
    places = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    for place in places:
        for name in ("tok", "pipeline", "modeling", "my_pipeline", "handler", "__init__", "setup", place.name):
            (place / f"{name}.py").write_text(code)
        (place / "custom_generate").mkdir()
        (place / "custom_generate" / "generate.py").write_text(code)
        for name in ("processor_config.json", "preprocessor_config.json", "generation_config.json"):
            (place / name).write_text(json.dumps({"auto_map": MAPS, "custom_generate": "generate"}))
    for path in [*folder.rglob("config.json"), *folder.rglob("tokenizer_config.json")]:
        path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": MAPS}))


def tokenizer_class(folder: Path, name: str | None) -> None:
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text())
    values.pop("tokenizer_class", None)
    path.write_text(json.dumps(values | ({} if name is None else {"tokenizer_class": name})))


@pytest.fixture
def words(tmp_path, marker) -> Path:
    TextTokenizer.train(["a dog"], 300).save_pretrained(tmp_path / "words")
    plant(tmp_path / "words", marker)
    return tmp_path / "words"


@pytest.mark.parametrize("name", [None, "Planted", "PlantedFast", "PreTrainedTokenizerFast", "LlamaTokenizer"])
@pytest.mark.parametrize("config", [None, {"model_type": "llada"}, {"model_type": "planted"}, {"model_type": "llama"}])
def test_text_tokenizers(words, marker, name, config):
    tokenizer_class(words, name)
    if config is not None:
        (words / "config.json").write_text(json.dumps({**config, "auto_map": MAPS}))
    try:
        assert TextTokenizer.from_pretrained(words).encode("a dog")
    except FileNotFoundError as error:  # it cannot be read without the code
        assert "\n" not in str(error)
    assert not marker.exists()
    with pytest.raises(ValueError, match="unknown arguments"):
        TextTokenizer.from_pretrained(words, trust_remote_code=True)


def test_what_needs_code_is_refused_with_the_way_out(words, marker):
    tokenizer_class(words, "Planted")
    with pytest.raises(FileNotFoundError, match=r"needs code of its own \(auto_map\), which is never run here"):
        TextTokenizer.from_pretrained(words)
    assert not marker.exists()


def test_the_planted_code_would_run(words, marker):
    """The traps of this file are real: with leave, the library runs them."""
    tokenizer_class(words, "Planted")
    with pytest.raises(Exception):  # noqa: B017 (`Planted` is no tokenizer)
        AutoTokenizer.from_pretrained(words, trust_remote_code=True)
    assert marker.exists()


def test_every_part_of_a_pipeline(tmp_path, marker):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    plant(tmp_path / "model", marker)
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    for entry in (["tok", "Planted"], ["my_pipeline", "Planted"], "Planted"):
        changed = {**index, **dict.fromkeys(("transformer", "image_tokenizer", "text_tokenizer"), entry)}
        (tmp_path / "model" / "model_index.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match="unknown keys"):  # auto_map is no setting of a model
            UniDiffPipeline.from_pretrained(tmp_path / "model")
    for config in tmp_path.rglob("config.json"):
        values = json.loads(config.read_text())
        values.pop("auto_map")
        config.write_text(json.dumps(values))
    assert UniDiffPipeline.from_pretrained(tmp_path / "model").text_to_image("a dog", generator=0)
    assert index["_class_name"] == [
        "pipeline",
        "UniDiffPipeline",
    ]  # for diffusers: `pipeline.py` is planted, and not run
    for name in ("Planted", ["tok", "Planted"], ["pipeline", "Planted"], ["tok", "UniDiffPipeline"]):
        (tmp_path / "model" / "model_index.json").write_text(json.dumps({**index, "_class_name": name}))
        with pytest.raises(ValueError):
            UniDiffPipeline.from_pretrained(tmp_path / "model")
    assert not marker.exists()


def test_models_and_image_tokenizers(tmp_path, marker):
    pipe = tiny_pipeline()
    for name, model in (("t", pipe.transformer), ("i", pipe.image_tokenizer)):
        model.save_pretrained(tmp_path / name)
        plant(tmp_path / name, marker)
    for load in (MaskedTransformer.from_pretrained, VQImageTokenizer.from_pretrained):
        for name in ("t", "i"):
            with pytest.raises(ValueError):
                load(tmp_path / name)
    pipe.texts.save_pretrained(tmp_path / "x")
    plant(tmp_path / "x", marker)
    with pytest.raises(ValueError):
        pack_pipeline(tmp_path / "t", tmp_path / "i", tmp_path / "x", tmp_path / "out")
    assert not marker.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "family", ["llada", "mmada", "dynin", "lumina", "dream", "unidisc", "mdlm", "llamagen", "magvit"]
)
def test_released_folders(tmp_path, marker, family):
    folder = tmp_path / family
    write_tiny(folder, family)
    TextTokenizer.train(["a dog"], 300).save_pretrained(folder)
    shutil.copytree(folder, folder / "text_tokenizer", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    plant(folder, marker)
    for number, name in enumerate(("TokenizersBackend", "DreamTokenizer", "Planted", None)):
        for place in (folder, folder / "text_tokenizer"):
            tokenizer_class(place, name)
        for work in (
            lambda: UniDiffPipeline.from_pretrained(folder),
            lambda: load_texts(folder),
            lambda: describe(folder),
            lambda: convert(folder, tmp_path / f"out {number}"),  # noqa: B023 (called at once)
        ):
            try:
                work()
            except (ValueError, FileNotFoundError) as error:
                assert "\n" not in str(error)
    assert not marker.exists()


def test_muddit(tmp_path, marker):
    folder = tmp_path / "muddit"
    write_folder(folder)
    plant(folder, marker)
    config = folder / "text_encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "attn_implementation": "somebody/kernel"}))
    try:
        UniDiffPipeline.from_pretrained(folder)
    except (ValueError, FileNotFoundError) as error:
        assert "\n" not in str(error)
    assert not marker.exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["info", "verify", "generate"])
def test_yes_on_stdin_changes_nothing(tmp_path, marker, command):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    plant(tmp_path / "model", marker)
    tokenizer_class(tmp_path / "model" / "text_tokenizer", "Planted")
    for config in tmp_path.rglob("config.json"):
        values = json.loads(config.read_text())
        values.pop("auto_map", None)
        config.write_text(json.dumps(values))
    assert is_pipeline(tmp_path / "model")
    place = [str(tmp_path / "model")] if command != "generate" else ["--model", str(tmp_path / "model"), "a dog"]
    run = subprocess.run(
        [sys.executable, "-m", "unidiff", command, *place],
        input="yes\n" * 1000, capture_output=True, text=True, timeout=300, cwd=tmp_path,
    )  # fmt: skip
    assert run.returncode not in (0, 70) and "Traceback" not in run.stderr, run.stderr
    assert "y/N" not in run.stdout + run.stderr and not marker.exists()
