"""`unidiff faces`: the two tokenizers, a table and shards."""

from __future__ import annotations

import tarfile

from typer.testing import CliRunner

from unidiff.cli.app import app
from unidiff.train.data.source import TokenTable
from unidiff.worlds.faces.cells import face_tokenizer


def run(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_from_nothing_to_a_table(tmp_path):
    run("faces", "cells", tmp_path / "cells")
    run("faces", "text", tmp_path / "text", "--count", 400)
    image, text = ("--image-tokenizer", tmp_path / "cells"), ("--text-tokenizer", tmp_path / "text")
    for name in ("a", "b"):
        run(
            "faces",
            "table",
            tmp_path / f"{name}.safetensors",
            *image,
            *text,
            "--count",
            30,
            "--captions",
            2,
            "--questions",
            3,
        )
    table, again = (TokenTable.load(tmp_path / f"{name}.safetensors") for name in ("a", "b"))
    assert table.digest() == again.digest()
    assert table.rows == 30 and table.grid == (8, 8) and table.text_length == 32
    assert table.tensors["captions"].shape[:2] == (30, 2) and table.tensors["questions"].shape[:2] == (30, 3)
    first, stop = table.vocabulary.image
    assert stop - first == face_tokenizer().codebook_size


def test_shards(tmp_path):
    run("faces", "shards", tmp_path / "shards", "--count", 3, "--split", "held_out")
    with tarfile.open(tmp_path / "shards" / "00000.tar") as tar:
        assert {name.partition(".")[2] for name in tar.getnames()} == {"png", "txt", "json"}
