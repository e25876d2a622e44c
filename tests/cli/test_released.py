"""`unidiff info`, `convert` and `verify` as a person meets them."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from folder_trees import tree
from muddit_parts import write_folder
from PIL import Image
from released_parts import tiny_weights, write_tiny
from safetensors.torch import load_file
from shard_samples import write_samples
from siglip_parts import write_image_parts
from tiny_pipeline import tiny_parts, tiny_pipeline

from unidiff.models.trained_on import TrainedOn
from unidiff.pipeline import UniDiffPipeline
from unidiff.pipelines.released import load_images


@pytest.fixture
def llada(tmp_path):
    write_tiny(tmp_path / "llada", "llada")
    return tmp_path / "llada"


def table(text: str) -> dict[str, str]:
    return {key.strip(): value.strip() for key, value in (line.split(":", 1) for line in text.splitlines())}


def test_info_of_a_released_checkpoint_and_of_its_file(run, llada):
    for path in (llada, llada / "model.safetensors"):
        status, out, _ = run("info", path)
        lines = table(out)
        assert status == 0 and lines["family"] == "llada" and lines["dtype"] == "float32"
        assert lines["parameters"] == f"{sum(v.numel() for v in tiny_weights('llada').values()):,}"
        assert lines["vocabulary"] == "40 ids: text 0-39, no images, [MASK] 30"
        assert "of weights + about" in lines["memory"] and "torch" in lines["unidiff"]


def test_info_of_our_own_folder_either_way(run, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    first = run("info", tmp_path / "model")
    assert first == run("info", "--model", tmp_path / "model")
    lines = table(first[1])
    assert lines["family"] == "unidiff" and "24 x 16 pixels" in lines["picture"] and "float32" in lines["memory"]


def test_convert_there_and_back(run, llada, tmp_path):
    status, out, _ = run("convert", llada, tmp_path / "ours")
    assert status == 0 and out == f"{tmp_path / 'ours'}: llada in unidiff's layout\n"
    assert table(run("info", tmp_path / "ours")[1])["family"] == "llada"
    status, out, _ = run("convert", tmp_path / "ours", tmp_path / "back", "--dtype", "bfloat16")
    assert status == 0 and "in the released layout" in out
    back, state = load_file(tmp_path / "back" / "model.safetensors"), load_file(llada / "model.safetensors")
    assert set(back) == set(state) and all(torch.equal(back[n], v.bfloat16()) for n, v in state.items())
    status, _, error = run("convert", llada, tmp_path / "ours")
    assert status == 1 and error == f"unidiff: {tmp_path / 'ours'} is not an empty folder; name a new one\n"


def test_verify_says_what_differs_and_fails(run, llada):
    status, out, _ = run("verify", llada, "--device", "cpu")
    assert status == 1 and "closest to llada" in out and "FAIL published settings" in out
    assert "ok   known answer" in out and "ok   a pass of this checkpoint" in out


def test_an_image_tokenizer_with_decoders_beside_it(run, tmp_path):
    """Codes of pictures in shards, by the converted tokenizer as by the released one."""
    write_image_parts(tmp_path / "uni")
    theirs, ours = tmp_path / "uni" / "image_tokenizer", tmp_path / "ours"
    lines = table(run("info", theirs)[1])
    assert lines["family"] == "siglip_vq" and "of weights, read when it is first needed" in lines["decoder-turbo"]
    status, out, _ = run("verify", theirs, "--device", "cpu")
    assert status == 0 and "ok   decoder: " in out and "ok   decoder-turbo: " in out
    assert run("convert", theirs, ours)[1] == f"{ours}: siglip_vq in unidiff's layout\n"
    write_samples(tmp_path / "raw", 4)
    tiny_parts()[2].save_pretrained(tmp_path / "words")
    given = ("--shards", tmp_path / "raw", "--text-tokenizer", tmp_path / "words", "--image-size", 8)
    status, out, error = run("encode", tmp_path / "tokens", "--image-tokenizer", ours, *given)
    assert status == 0 and "4 samples" in out, (out, error)
    (theirs.parent / "vae" / "config.json").unlink()
    status, out, error = run("info", theirs)
    assert status == 1 and "vae/config.json does not exist, which" in error and error.count("\n") == 1


def test_the_pixel_decoder_is_chosen_on_the_command_line(run, tmp_path):
    write_image_parts(tmp_path / "uni")
    transformer, _, texts, settings = tiny_parts()
    images = load_images(tmp_path / "uni")
    UniDiffPipeline(transformer, images, texts, settings).save_pretrained(tmp_path / "own")
    for part in ("decoder", "decoder-turbo", "vae"):
        shutil.copytree(tmp_path / "uni" / part, tmp_path / "own" / part)
    shutil.copy(tmp_path / "uni" / "image_tokenizer" / "sigvq_embedding.pt", tmp_path / "own" / "image_tokenizer")
    given = ("generate", "a dog", "--model", tmp_path / "own", "--device", "cpu", "--steps", 2, "--seed", 3)
    made = {}
    for name in ("decoder", "decoder-turbo"):
        out = tmp_path / f"{name}.png"
        assert run(*given, "--out", out, "--pixel-decoder", name, "--pixel-steps", 2)[0] == 0
        made[name] = Image.open(out)
        assert made[name].size == (12, 8)  # 3 x 2 codes of 4 x 4 pixels
    assert made["decoder"].tobytes() != made["decoder-turbo"].tobytes()
    status, _, error = run(*given, "--out", tmp_path / "x.png", "--pixel-decoder", "fast")
    assert status == 1 and "the decoder is 'fast'; expected one of ['decoder', 'decoder-turbo']" in error


def test_mistakes_are_one_sentence(run, llada, tmp_path):
    (llada / "config.json").write_text(json.dumps({"hidden": 1}))
    for command in ("info", "verify"):
        status, _, error = run(command, llada)
        assert status == 1 and error.startswith("unidiff: ") and error.count("\n") == 1 and "name the family" in error
    status, _, error = run("info", tmp_path / "none")
    assert status == 1 and "does not exist" in error
    status, _, error = run("convert", llada, tmp_path / "x", "--dtype", "int3")
    assert status == 1 and "dtype is 'int3'" in error


@pytest.fixture
def places(tmp_path, monkeypatch, capsys):
    """Everything that could be named by mistake, in the folder where one stands."""
    tiny_pipeline().save_pretrained(tmp_path / "pipe")
    write_tiny(tmp_path / "llada", "llada")
    write_folder(tmp_path / "muddit" / "512")
    transformer, image, text, _ = tiny_parts()
    for part, name in ((transformer, "t"), (image, "i"), (text, "x")):
        part.save_pretrained(tmp_path / name)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "deep")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    return tmp_path


NAMES = ("t", "i", "x", "file", "empty", "fifo", "loop", "dangling", "none", "", ".", "/", "a/b/c", "n" * 300)
NAMES += ("/dev/null", "/dev/zero", "llada/config.json", "pipe/model_index.json", "muddit", "muddit/512/scheduler")


def sentence(done) -> str:
    """The error of a command that failed as it should: status 1, nothing printed, one line."""
    status, out, error = done
    assert (status, out) == (1, "") and error.startswith("unidiff: ") and error.count("\n") == 1, (status, error)
    return error


@pytest.mark.parametrize("command", ["info", "verify", "convert"])
def test_whatever_is_named_as_a_model(run, places, command):
    for number, name in enumerate(NAMES):
        sentence(run(command, name, *([f"out{number}"] if command == "convert" else [])))
    if command != "info":  # these are for released checkpoints
        for name in ("pipe", "emoji"):
            rest = ["out"] if command == "convert" else []
            assert "is a pipeline of unidiff already" in sentence(run(command, name, *rest))
    assert not list(places.glob("out*"))


OUTS = ("file", "file/x", "fifo", "loop", "/", ".", "", "llada", "llada/deep/..", "n" * 300, "/dev/null", "/dev/full")


@pytest.mark.parametrize("command", ["convert", "pack"])
def test_whatever_is_named_as_a_target(run, places, command):
    before = tree(places)
    for out in (*OUTS, "pipe", "llada/in", "t", "/proc/new"):
        if command == "convert":
            sentence(run("convert", "llada", out))
        elif out not in ("pipe", "llada/in"):  # a pipeline is replaced, and a folder in another is a folder
            sentence(run("pack", "t", "i", "x", out, "--text-length", 10, "--image-size", "24x16"))
    assert tree(places) == before


def test_options_that_contradict_the_model(run, places):
    run("convert", "llada", "ours")
    for arguments, words in {
        ("info", "pipe", "--family", "nope"): "leave --family out",
        ("info", "pipe", "--family", "llada"): "leave --family out",
        ("info", "llada", "--family", "nope"): "family is 'nope'",
        ("info", "ours", "--family", "nope"): "family is 'nope'",
        ("info", "ours", "--family", "mdlm"): "was converted from llada",
        ("verify", "ours", "--family", "mdlm"): "was converted from llada",
        ("convert", "ours", "back", "--family", "mdlm"): "was converted from llada",
        ("info", "pipe", "--model", "llada"): "two models are named",
        ("info", "pipe", "--subfolder", "nope"): "nope does not exist",
        ("verify", "llada", "--device", "nope"): "device 'nope' cannot be used",
        ("verify", "llada", "--device", "meta"): "device 'meta' cannot be used",
        ("convert", "llada", "out", "--dtype", "int8"): "dtype is 'int8'",
        ("pack", "t", "i", "x", "out", "--text-length", "10"): "give image_size",
        ("pack", "t", "i", "x", "out"): "give text_length and image_size",
    }.items():
        assert words in sentence(run(*arguments))
    assert run("info", "ours", "--family", "llada")[0] == 0 and run("info", "muddit", "--subfolder", "512")[0] == 0
    assert not (places / "out").exists() and not (places / "back").exists()


def test_sizes_and_lengths_that_are_none(run, places):
    for size in ("0", "-1", "nan", "1e3", "1" * 20, "9" * 5000, "", "24x", "x16", "2x4x8", "20", "2.5"):
        error = sentence(run("pack", "t", "i", "x", "out", "--text-length", 10, f"--image-size={size}"))
        assert "image-size" in error or "image size" in error
    for length in ("0", "-1", "nan", "1e3", "1" + "0" * 30, "9" * 5000, "", "2", "1048577", "2.5"):
        status, _, error = run("pack", "t", "i", "x", "out", f"--text-length={length}", "--image-size", "24x16")
        assert status in (1, 2) and "Traceback" not in error and ("text-length" in error or "text_length" in error)
    assert not (places / "out").exists()


def test_info_lists_the_tasks_that_were_trained(run, places):
    assert "text_to_image, caption, answer, inpaint, generate" in table(run("info", "pipe")[1])["tasks"]
    TrainedOn((2, 3), 10, ("text_to_image", "caption")).save(places / "t")
    assert run("pack", "t", "i", "x", "packed")[0] == 0
    lines = table(run("info", "packed")[1])
    assert lines["tasks"] == "text_to_image, caption, inpaint" and "24 x 16 pixels" in lines["picture"]


def test_a_folder_of_a_whole_pipeline_is_converted_with_all_its_parts(run, places):
    (places / "muddit" / "512" / "notes").mkdir()
    (places / "muddit" / "512" / "notes" / "a.txt").write_text("mine")
    for arguments in (("muddit/512", "a"), ("muddit", "b", "--subfolder", "512")):
        assert run("convert", *arguments)[0] == 0
        assert (places / arguments[1] / "notes" / "a.txt").is_file() and (places / arguments[1] / "vqvae").is_dir()
    for name, target in (("gone", "nowhere"), ("round", "."), ("up", places / "muddit")):
        (places / "muddit" / "512" / "notes" / name).symlink_to(target)
        assert f"notes/{name} is a link" in sentence(run("convert", "muddit/512", "c"))
        (places / "muddit" / "512" / "notes" / name).unlink()
    os.mkfifo(places / "muddit" / "512" / "notes" / "pipe")
    assert "neither a file nor a folder" in sentence(run("convert", "muddit/512", "c"))
    assert not (places / "c").exists()
