"""Tiny released checkpoints of every family, with random weights under released names, and those of the golden sets."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from golden import golden_folders
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from unidiff.families.dynin import dynin_vocabulary
from unidiff.families.family import FAMILIES
from unidiff.families.image_tokenizers import LLAMAGEN_KEYS
from unidiff.families.llada2_uni.rows import MARKS, NUMBER
from unidiff.families.mmada import mmada_vocabulary
from unidiff.tokens import Vocabulary


def tiny_weights(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random weights of a tiny checkpoint under released names."""
    torch.manual_seed(seed)
    entry = FAMILIES[family]
    state = entry.export(entry.make(entry.tiny.config, **entry.tiny.measured))
    drawn = {}
    for name, value in state.items():
        fixed = name in entry.constants or not value.is_floating_point()
        drawn[name] = value.contiguous().clone() if fixed else torch.randn(value.shape).mul_(0.2).to(dtype)
    return drawn


def write_tiny(folder: Path, family: str, file: str = "model.safetensors", **changes: Any) -> dict[str, Tensor]:
    """A released folder: `config.json` (with changes) and the weights; returns the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    state = tiny_weights(family)
    (folder / "config.json").write_text(json.dumps({**FAMILIES[family].tiny.config, **changes}))
    save_file(state, folder / file)
    return state


class Payload:
    """Unpickling it would create a folder."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@dataclass(frozen=True)
class GoldenCheckpoint:
    """A reference checkpoint: its weight file, upstream's config, the id layout where the config implies none, and ids of words that
    a tokenizer has to know.
    """

    path: Path
    config: Mapping[str, Any]
    vocabulary: Vocabulary | None = None
    words: Mapping[str, int] = field(default_factory=dict)

    def write(self, folder: Path) -> dict[str, Tensor]:
        """A released folder with it; returns the weights."""
        state = load_file(self.path)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        save_file(state, folder / "model.safetensors")
        return state


BUILT_SETS = (
    "unidisc",
    "mdlm",
    "llada",
    "llada_v",
    "llada_moe",
    "llada2_mini",
    "llada2_uni",
    "mmada",
    "dynin",
    "ml_cache",
    "dllm_cache",
    "muddit",
    "llamagen_vq",
    "magvitv2",
    "mmada_parallel",
)
"""Golden sets with checkpoints of families that are built; the others wait for theirs, whatever is in them."""


def golden_checkpoints() -> list[GoldenCheckpoint]:
    """Every weight file of the golden sets in `BUILT_SETS` whose names are those of a family."""
    found = []
    for name in BUILT_SETS:
        for folder in golden_folders(name):
            for path in sorted(folder.glob("*.safetensors")):
                with safe_open(path, framework="pt") as file:
                    names = list(file.keys())
                whole = not any(
                    name.startswith("sigvq.") for name in names
                )  # an image tokenizer with features of codes
                if whole and any(f.has_keys(names) for f in FAMILIES.values()):
                    found.append(_golden(path))
    return found


def llada_v_config(full: Mapping[str, Any]) -> dict[str, Any]:
    """Upstream's config of a golden set of LLaDA-V, and what of its tower no released config states."""
    marks = ("mask", "bos", "eos", "eot", "start_header", "end_header")
    ids = {f"{name}_token_id": full["tokens"][name] for name in marks}
    mm = {name: value for name, value in full["mm"].items() if name not in ("image_mean", "image_std")}
    vision = {
        name: value
        for name, value in full["vision"].items()
        if name not in ("num_hidden_layers_note", "tokens_per_side")
    }
    return {"model_type": "llava_llada", **full["model"], **ids, **mm, "vision_config": vision}


# what the sets call marks of Lumina-DiMOO
_LUMINA = {
    "boa": "answer",
    "answer_start": "answer",
    "eoa": "end_answer",
    "answer_end": "end_answer",
    "pad": "answer_pad",
}


def _marks(ids: Mapping[str, Any], family: str) -> dict[str, int]:
    """Special ids of a set by the family's names; of Lumina-DiMOO 0 for those that the set has not."""
    given = {**ids.get("reserved", {}), **{name: i for name, i in ids.items() if isinstance(i, int)}}
    plain = {name.strip("<|>[]").replace("/", "end_").removesuffix("_id").lower(): i for name, i in given.items()}
    named = {_LUMINA.get(name, name): i for name, i in plain.items()} if family == "lumina" else plain
    wanted = FAMILIES[family].vocabulary({}).specials
    return {name: named.get(name, 0) for name in wanted if name in named or family == "lumina"}


def _uni_words(ids: Mapping[str, Any]) -> dict[str, int]:
    """Marks of LLaDA2.0-Uni's tokenizer; the set has those of roles as ids of whole turns, and one for a number of rows or columns."""
    system, assistant = ids["system"], ids["assistant"]
    marks = {MARKS[name]: ids[name] for name in ("soi", "eoi", "boi")}
    marks |= {MARKS["uncondition"]: ids["uncondition"][0], MARKS["role"]: system[0], MARKS["end_role"]: assistant[-1]}
    return marks | {NUMBER.format(32): ids["height_token"]}  # pictures of the usual size


def _golden(path: Path) -> GoldenCheckpoint:
    """The config is a section called as the file, or `model_config`, or `model`; else the upstream keys of the whole."""
    full = json.loads((path.parent / "config.json").read_text())
    if "vocab" in full:  # MMaDA: its config holds the rows, the layout is declared
        ids = full["vocab"]
        layout = (
            ids["new_vocab_size"],
            ids["image_token_offset"],
            ids["codebook_size"],
            ids["mask"],
            _marks(ids, "mmada"),
        )
        return GoldenCheckpoint(path, {**full["model"], "new_vocab_size": layout[0]}, mmada_vocabulary(*layout))
    if "token_ids" in full:  # LLaDA2
        ids = {name: i for name, i in full["token_ids"].items() if name.endswith("_token_id")}
        config = {**full["model"], **ids, "block_length": full["block_length"]}
        return GoldenCheckpoint(path, config, words=_uni_words(full["token_ids"]) if "soi" in full["token_ids"] else {})
    if "mask_token_id" in full:  # LLaDA-MoE
        return GoldenCheckpoint(path, {**full["model"], "mask_token_id": full["mask_token_id"]})
    if "mm" in full:  # LLaDA-V
        return GoldenCheckpoint(path, llada_v_config(full))
    if "speech_codebook_size" in full.get("tokens", {}):  # Dynin-Omni, as MMaDA; the sizes tell it apart
        ids = full["tokens"]
        rows = {name: ids[name] for name in ("new_vocab_size", "llm_vocab_size", "codebook_size")}
        sizes = ids["new_vocab_size"], ids["image_token_offset"], ids["codebook_size"], ids["speech_codebook_size"]
        vocabulary = dynin_vocabulary(*sizes, ids["mask"], _marks(ids, "dynin"))
        return GoldenCheckpoint(path, {**full["model"], **rows}, vocabulary)
    if "tokens" in full and "cases" in full:  # MMaDA-Parallel: A has Lumina's ids, M MMaDA's
        ids, config = full["tokens"], full["model"]
        size, start = config["vocab_size"], ids.get("image_offset", ids.get("text_tokenizer_len"))
        marks = _marks(ids, "lumina" if "image_offset" in ids else "mmada")
        codes = (start, start + ids["codebook_size"])
        vocabulary = Vocabulary(size, (0, start), codes, ids["mask"], specials=marks)
        own = {"architectures": ["LLaDAForMultiModalGeneration"]} if "image_offset" in ids else {"new_vocab_size": size}
        return GoldenCheckpoint(path, {**config, **own}, vocabulary)
    if "tokens" in full:  # Lumina
        ids, config = full["tokens"], full["model_config"]
        start, size = ids["vocab_offset"], config["vocab_size"]
        codes, marks = (start, start + ids["codebook_size"]), _marks(ids, "lumina")
        vocabulary = Vocabulary(size, (0, start), codes, ids["mask"], specials=marks)
        return GoldenCheckpoint(path, {"architectures": ["LLaDAForMultiModalGeneration"], **config}, vocabulary)
    if path.stem in full or "model_config" in full:
        return GoldenCheckpoint(path, full.get(path.stem, full.get("model_config")))
    if "d_model" in full.get("model", {}):
        return GoldenCheckpoint(path, full["model"])
    for known in ((*LLAMAGEN_KEYS.used, *LLAMAGEN_KEYS.harmless), ("codebook_dim", "encoder", "decoder")):
        if known[0] in full:
            return GoldenCheckpoint(path, {key: full[key] for key in known if key in full})
    return GoldenCheckpoint(path, full)
