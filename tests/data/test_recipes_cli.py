"""The two tokenizer recipes as commands, with good and bad input."""

import contextlib
import importlib.util
import io
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from shard_samples import write_samples

from unidiff.tokens.text import TextTokenizer

ROOT = Path(__file__).parents[2]


def run(recipe, *arguments, process=False):
    """(exit code, stdout, stderr) of a recipe, in this process unless a real one is asked for."""
    path = ROOT / "tokenizers" / recipe
    if process:
        command = [sys.executable, str(path), *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
        return result.returncode, result.stdout, result.stderr
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = module.main([str(a) for a in arguments])
    return status, out.getvalue(), err.getvalue()


def assert_fails(result, message):
    """One clear sentence on stderr and a non-zero exit."""
    code, _, errors = result
    assert code not in (0, None)
    assert message in errors and errors.startswith("error: "), errors
    assert errors.count("\n") == 1 and "Traceback" not in errors


def test_text_tokenizer_from_files_and_shards(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("zwei rote Äpfel\n\nfünf Bäume\n" * 5, encoding="utf-8")
    write_samples(tmp_path / "raw", 5, 10, lambda n, m: m | {"txt": b"\xff"} if n == 2 else m)
    out = tmp_path / "tokenizer"
    text = ("--text", tmp_path / "a.txt")
    with caplog.at_level(logging.WARNING):
        code, _, errors = run("train_text_tokenizer.py", out, *text, "--shards", tmp_path / "raw", "--vocab-size", 300)
    assert code == 0, errors
    assert "bad_caption" in caplog.text  # the damaged caption is reported
    tokenizer = TextTokenizer.from_pretrained(out)
    assert 260 < tokenizer.size <= 300
    assert len(tokenizer.encode("caption")) < 4 and len(tokenizer.encode(" Äpfel")) < 6
    assert tokenizer.decode(tokenizer.encode("Äpfel <|eos|>")) == "Äpfel <|eos|>"


def test_text_tokenizer_from_a_config(tmp_path):
    (tmp_path / "a.txt").write_text("one two\nthree four\n", encoding="utf-8")
    config = tmp_path / "c.yaml"
    config.write_text(f"text: [{tmp_path / 'a.txt'}]\nvocab_size: 262\nspecials: [eos, caption]\nlimit: 1\n")
    code, _, errors = run("train_text_tokenizer.py", tmp_path / "out", "--config", config)
    assert code == 0, errors
    assert TextTokenizer.from_pretrained(tmp_path / "out").specials() == {"eos": 0, "caption": 1}


def test_another_text_tokenizer_is_never_replaced(tmp_path):
    (tmp_path / "a.txt").write_text("one two\nthree four\n" * 9, encoding="utf-8")
    out, text = tmp_path / "out", ("--text", tmp_path / "a.txt", "--vocab-size")
    assert run("train_text_tokenizer.py", out, *text, 262)[0] == 0
    (out / "notes.md").write_text("mine")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    assert run("train_text_tokenizer.py", out, *text, 262)[0] == 0  # the same again
    assert_fails(run("train_text_tokenizer.py", out, *text, 265), "already holds another tokenizer (tokenizer.json")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_text_tokenizer_bad_input(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "c.yaml").write_text("vocabulary: 3\n")
    out = tmp_path / "out"
    cases = [
        ((), "no corpus", True),
        (("--text", tmp_path / "none.txt"), "does not exist", False),
        (("--text", tmp_path / "latin.txt"), "not UTF-8", False),
        (("--shards", f"pipe:touch {tmp_path}/ran"), "shell command", False),
        (("--config", tmp_path / "c.yaml"), "vocabulary", False),
        (("--config", tmp_path / "none.yaml"), "does not exist", False),
        (("--shards", tmp_path / "gone.tar"), "gone.tar'", False),
        (("--shards", tmp_path / "gone.tar", "--allow-missing"), "holds no text", False),
        (("--text", tmp_path / "latin.txt", "--limit", -1), "limit = -1 must be at least 0", False),
        (("--text", tmp_path / "latin.txt", "--vocab-size", 100), "need at least 260", False),
    ]
    for arguments, message, process in cases:
        assert_fails(run("train_text_tokenizer.py", out, *arguments, process=process), message)
    assert not out.exists() and not (tmp_path / "ran").exists()


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    from diffusers import VQModel

    root = tmp_path_factory.mktemp("tokenizers")
    TextTokenizer.train(["caption 1", "which?"], 300).save_pretrained(root / "text")
    sizes = {"block_out_channels": (8, 8), "down_block_types": ("DownEncoderBlock2D",) * 2}
    model = VQModel(
        **sizes, up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, norm_num_groups=4, latent_channels=4,
        num_vq_embeddings=32, vq_embed_dim=4,
    )  # fmt: skip
    model.save_pretrained(root / "image")
    return root


def encode(root, out, *arguments, image="image", process=False):
    common = ("--image-tokenizer", root / image, "--text-tokenizer", root / "text", "--text-length", 16)
    return run("encode_shards.py", out, *common, "--image-size", 8, *arguments, process=process)


def test_encode_shards(tmp_path, tokenizers, caplog):
    write_samples(tmp_path / "raw", 7, 4, lambda n, m: m | {"txt": b"\xff"} if n == 2 else m)
    code, output, errors = encode(tokenizers, tmp_path / "out", "--shards", tmp_path / "raw", "--samples-per-shard", 4)
    assert code == 0, errors
    assert "6 samples, 6 questions in 2 shards" in output
    assert (output + errors + caplog.text).count("1 bad_caption") == 1  # said once
    manifest = json.loads((tmp_path / "out" / "tokens.json").read_text())
    assert manifest["shards"] == {"00000.tar": 4, "00001.tar": 2} and manifest["grid"] == [4, 4]


def test_encode_shards_bad_input(tmp_path, tokenizers):
    write_samples(tmp_path / "raw", 2, 4)
    raw = ("--shards", tmp_path / "raw")
    cases = [
        (("--shards", f"pipe:touch {tmp_path}/ran"), {"process": True}, "shell command"),
        (("--shards", f"pipe:touch {tmp_path}/ran/"), {}, "shell command"),
        (("--shards", tmp_path / "gone-{0..2}.tar"), {}, "3 shards do not exist"),
        (("--shards", tmp_path / "gone-{0..99999999999}.tar"), {}, "more than 1,000,000 shards"),
        ((*raw, "--image-size", 0), {}, "--image-size is '0'; expected a number"),
        ((*raw, "--batch-size", 10**9), {}, "batch_size is 1000000000; expected"),
        ((*raw, "--workers", -1), {}, "workers is -1; expected a whole number from 0"),
        ((*raw, "--samples-per-shard", 2**63), {}, "samples_per_shard is 9223372036854775808"),
        ((*raw, "--device", "cuda:99"), {}, "cuda:99"),
        ((*raw, "--device", "quantum"), {}, "'quantum' cannot be used here"),
        (raw, {"image": "nothing"}, "does not exist"),
        (raw, {"image": "text"}, "does not exist"),
        ((*raw, "--image-size", 9), {}, "multiple of the tokenizer factor"),
        ((*raw, "--text-length", 1), {}, "text_length is 1; expected"),
        ((*raw, "--text-tokenizer", tmp_path / "none"), {}, "does not exist"),
    ]
    for arguments, options, message in cases:
        assert_fails(encode(tokenizers, tmp_path / "out", *arguments, **options), message)
    assert not (tmp_path / "out").exists() and not (tmp_path / "ran").exists()
