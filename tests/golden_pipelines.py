"""Folders of pipelines with the checkpoints of golden sets: their weights, a tokenizer of their ids, and a small image tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from released_pipelines import write_network
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from unidiff.families.checkpoint.convert import convert
from unidiff.families.checkpoint.load import load_released
from unidiff.families.family import FAMILIES
from unidiff.tokens import Vocabulary


def write_golden_pipeline(
    folder: Path,
    weights: Path,
    config: Mapping[str, Any],
    vocabulary: Vocabulary | None,
    words: Mapping[str, int] = MappingProxyType({}),
) -> None:
    """A converted folder with everything that a pipeline needs; words are `w0`, `w1`, ... for the ids of text, and some of their own."""
    theirs = folder.parent / f"{folder.name}_released"
    theirs.mkdir(parents=True)
    (theirs / "config.json").write_text(json.dumps(config))
    save_file(dict(load_file(weights).items()), theirs / "model.safetensors")
    convert(theirs, folder, vocabulary=vocabulary)
    shutil.rmtree(theirs)
    vocabulary = vocabulary or load_released(folder, device="meta").vocabulary
    assert vocabulary is not None
    write_words(folder / "tokenizer", vocabulary, words)
    if vocabulary.image_size:
        tiny = FAMILIES["vq_model"].tiny.config
        write_network(folder / "image_tokenizer", "vq_model", {**tiny, "num_vq_embeddings": vocabulary.image_size})


def write_words(folder: Path, vocabulary: Vocabulary, own: Mapping[str, int] = MappingProxyType({})) -> None:
    """A tokenizer that knows one word for each id of text; others are the first one."""
    start, stop = vocabulary.text
    words = {f"w{i}": i for i in range(stop - start) if i not in own.values()} | dict(own)
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0").save_pretrained(folder)
