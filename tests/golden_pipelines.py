"""Folders of pipelines with the checkpoints of golden sets: their weights, a tokenizer of their ids, and a small image tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ddit_parts
import muddit_parts
import torch
from diffusers import VQModel
from released_parts import llada_v_config
from released_pipelines import write_network
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedTokenizerFast

from unidiff.families.checkpoint.convert import convert
from unidiff.families.checkpoint.load import load_released
from unidiff.families.family import FAMILIES
from unidiff.families.muddit import CLASSES
from unidiff.families.muddit.denoiser import MASK_EMBEDDING
from unidiff.families.unidisc import SPECIALS
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


def write_golden_llada_v(folder: Path, golden: Path) -> None:
    """LLaDA-V of a golden folder, with a tokenizer of words `w0`, `w1`, ... and the marks where the set has them."""
    config = json.loads((golden / "config.json").read_text())
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(llada_v_config(config)))
    save_file(dict(load_file(golden / "weights.safetensors")), folder / "model.safetensors")
    names = {"bos": "<|startoftext|>", "start_header": "<|start_header_id|>", "end_header": "<|end_header_id|>"}
    names |= {"eot": "<|eot_id|>", "eos": "<eos>", "mask": "<|mask|>"}
    words = {config["tokens"][name]: word for name, word in names.items()}
    table = {words.get(i, f"w{i}"): i for i in range(config["model"]["vocab_size"])}
    made = Tokenizer(models.WordLevel(table, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = [word for name, word in names.items() if name != "eos"]
    PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<eos>", pad_token="<eos>", additional_special_tokens=marks
    ).save_pretrained(folder)


def write_golden_muddit(folder: Path, golden: Path, name: str) -> None:
    """Muddit or Meissonic of a golden folder (`name` is that of its network), with its tokenizer of images and its text encoder.

    A network of other sizes than those gets small ones with random weights. The embedding of [MASK], which no set has, is
    random, and only Muddit's is written.
    """
    config = muddit_parts.read_config(golden)
    own, clip, vq = config[name], config["text_encoder"], config["vqvae"]
    weights = dict(load_file(golden / f"{name}.safetensors").items())
    family = "muddit" if "tokenizer_vocab_size" in own else "meissonic"
    kind = next(kind for kind, found in CLASSES.items() if found == family)
    _write_part(folder / "transformer", {"_class_name": kind, **own}, weights)
    torch.manual_seed(0)
    if own["joint_attention_dim"] == clip["hidden_size"]:
        encoder = muddit_parts.golden_clip(golden, None).encoder
        torch.save(torch.randn(clip["hidden_size"]), folder / MASK_EMBEDDING)
    else:
        width, heads = own["joint_attention_dim"], own["num_attention_heads"]
        sizes = {"hidden_size": width, "num_attention_heads": heads, "projection_dim": own["pooled_projection_dim"]}
        encoder = CLIPTextModelWithProjection(CLIPTextConfig(**{**clip, **sizes}))
    encoder.save_pretrained(folder / "text_encoder")
    same = own["codebook_size"] == vq["num_vq_embeddings"]
    images: Any = (
        muddit_parts.golden_vq(golden).model if same else VQModel(**{**vq, "num_vq_embeddings": own["codebook_size"]})
    )
    images.save_pretrained(folder / "vqvae")
    letters = [chr(ord("a") + i) for i in range(clip["vocab_size"] // 2 - 1)]
    words = [*letters, *(f"{x}</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], pad_token="a").save_pretrained(
        folder / "tokenizer"
    )


def write_golden_ddit(folder: Path, golden: Path) -> None:
    """D-DiT of a golden folder: network, T5 and autoencoder, with short texts of words `w0`, `w1`, ..."""
    config = ddit_parts.read_config(golden)
    _write_part(folder / "transformer", config["transformer"], load_file(golden / "transformer.safetensors"))
    ddit_parts.golden_t5(golden).encoder.save_pretrained(folder / "text_encoder")
    ddit_parts.golden_vae(golden).model.save_pretrained(folder / "vae")
    size = config["mask_index"]
    write_words(folder / "tokenizer", Vocabulary(size + 1, (0, size), (size, size), size))
    (folder / "dual.json").write_text(json.dumps({"length": 10, "answer_length": 14}))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "DualDiffSD3Pipeline"}))


def write_golden_interleaved(folder: Path, golden: Path) -> None:
    """UniDisc of packed samples with so many words that its mark of pictures is one: the set's rows of words again and again."""
    config = json.loads((golden / "config.json").read_text())
    weights = dict(load_file(golden / "weights.safetensors").items())
    few, size = config["text_vocab_size"], SPECIALS["image"] + 9
    for name in ("vocab_embed.embedding", "output_layer.linear.weight", "output_layer.linear.bias"):
        value = weights[name]
        words = value[torch.arange(size - 1) % (few - 1)]
        weights[name] = torch.cat((words, value[few - 1 :]))
    codes = config["vocab_size"] - few
    sizes = {"vocab_size": size + codes, "text_vocab_size": size, "mask_index": size - 1}
    save_file(weights, folder.parent / "interleaved.safetensors")
    write_golden_pipeline(folder, folder.parent / "interleaved.safetensors", {**config, **sizes}, None)


def _write_part(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(dict(weights.items()), folder / muddit_parts.WEIGHTS)
