"""Tiny released folders with everything a pipeline needs: random weights, an image tokenizer, a text tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from released_parts import write_tiny
from safetensors.torch import save_file

from unidiff.families.dynin import SPECIALS as DYNIN
from unidiff.families.family import FAMILIES
from unidiff.families.mmada import SPECIALS as MMADA
from unidiff.tokens import Vocabulary
from unidiff.tokens.text import TextTokenizer

CORPUS = ["a red fox on a hill", "two owls"]
LUMINA = ("eos", "newline", "answer_pad", "boi", "eoi", "uncondition", "answer", "end_answer")
TURNS = {
    **dict.fromkeys(("llada", "llada-v"), ("eos", "startoftext", "start_header_id", "end_header_id", "eot_id")),
    "dream": ("eos", "im_start", "im_end"),
}


UNIDISC_MODEL = {
    "hidden_size": 16,
    "n_blocks": 1,
    "n_heads": 2,
    "norm_type": "rms",
    "qk_norm": True,
    "modality_embed": True,
    "rope_2d": True,
    "txt_length": 10,
    "img_length": 9,
    "image_vocab_size": 12,
}


def write_network(folder: Path, family: str, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """`config.json` and random weights; returns those."""
    torch.manual_seed(0)
    model = FAMILIES[family].make(config)
    for value in model.parameters():
        torch.nn.init.normal_(value, std=0.3)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    weights = {n: v.contiguous() for n, v in FAMILIES[family].export(model).items()}
    save_file(weights, folder / "model.safetensors")
    return weights


def write_unidisc(folder: Path, **changes: int) -> None:
    """UniDisc beside LlamaGen's tokenizer (factor 2, 12 codes) and a text tokenizer: 3 x 3 codes, 6 x 6 pixels.

    The weights are in a torch file, as a training program with a compiled model writes it.
    """
    texts = TextTokenizer.train(CORPUS, 300)
    texts.save_pretrained(folder / "text_tokenizer")
    model = {**UNIDISC_MODEL, **changes, "text_vocab_size": texts.size + 1}
    weights = write_network(folder, "unidisc", {"model": model})
    torch.save({"model": {f"_orig_mod.{name}": value for name, value in weights.items()}}, folder / "unidisc.pt")
    (folder / "model.safetensors").unlink()
    write_tiny(folder / "image_tokenizer", "llamagen")


def write_model(folder: Path, family: str, **changes: int) -> None:
    """The tiny model with changes of its config."""
    write_network(folder, family, {**FAMILIES[family].tiny.config, **changes})


def write_pictures(folder: Path, family: str) -> Vocabulary:
    """MMaDA or Dynin-Omni (3 x 3 codes, and 4 speech codes), or Lumina-DiMOO, with 16 codes of 2 x 2 pixels; returns the id
    layout, which no config holds."""
    texts = TextTokenizer.train(CORPUS, 300)
    texts.save_pretrained(folder / "tokenizer")
    first, names = texts.size, {"mmada": MMADA, "dynin": DYNIN}.get(family, LUMINA)
    specials = {"eos": first, **{name: first + i for i, name in enumerate(names)}}
    start = first + len(names) + 1
    speech = 4 if family == "dynin" else 0
    size = start + 16 + speech
    more = {} if family == "lumina" else {"new_vocab_size": size, "num_vq_tokens": 9}
    write_model(folder, family, vocab_size=size, embedding_size=size, mask_token_id=start - 1, **more)
    write_tiny(folder / "image_tokenizer", FAMILIES[family].image_tokenizer or "")
    others = {"speech": (size - speech, size)} if speech else {}
    return Vocabulary(size, (0, start), (start, start + 16), start - 1, specials=specials, others=others)


UNI = ("eos", "image", "slash_image", "boi", "uncondition", "role", "end_role", "role_end")


def write_uni(folder: Path, sides: int = 8) -> TextTokenizer:
    """LLaDA2.0-Uni with 16 codes of 2 x 2 pixels and marks for that many rows and columns, in blocks of 4 tokens."""
    names = (*UNI, *(f"reserved_token_{side}" for side in range(1, sides + 1)))
    TextTokenizer.train(CORPUS, 320, names).save_pretrained(folder)
    spelled = {"slash_image": "<|/image|>", "end_role": "</role>"} | {
        n: f"<{n}>" for n in ("boi", "uncondition", "role")
    }
    for path in folder.glob("tokenizer*.json"):
        content = path.read_text(encoding="utf-8")
        for name, word in spelled.items():
            content = content.replace(f"<|{name}|>", word)
        path.write_text(content, encoding="utf-8")
    texts = TextTokenizer.from_pretrained(folder)
    first = texts.size + 1
    ids = {"vocab_size": first + 16, "image_token_offset": first, "mask_token_id": first - 1, "eos_token_id": 0}
    write_model(folder, "llada2-uni", **ids)
    write_tiny(folder / "image_tokenizer", "vq_model")
    return texts


def write_chat(folder: Path, family: str, marks: bool = True) -> TextTokenizer:
    """LLaDA, LLaDA-V, LLaDA-MoE, LLaDA2, Dream or MDLM beside a text tokenizer with the marks of its turns, or without; returns that."""
    ling = family in ("llada-moe", "llada2")
    turns = ("eos", "role", "end_role", "role_end") if ling else TURNS.get(family, ("eos",))
    texts = TextTokenizer.train(CORPUS, 300, turns if marks else ("eos",))
    texts.save_pretrained(folder)
    for path in folder.glob("tokenizer*.json") if ling else ():  # marks of another spelling
        content = path.read_text(encoding="utf-8").replace("<|role|>", "<role>").replace("<|end_role|>", "</role>")
        path.write_text(content, encoding="utf-8")
    size = texts.size + 1
    more = {
        "llada": {"embedding_size": size, "mask_token_id": size - 1},
        "dream": {"pad_token_id": 0, "mask_token_id": size - 1},
        "mdlm": {},
    }.get(family, {"mask_token_id": size - 1})
    write_model(folder, family, vocab_size=size, eos_token_id=0, **more)
    return texts
