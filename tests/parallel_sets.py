"""The golden sets of MMaDA-Parallel: their cases, and the models A and M that they hold."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from golden import absent_set, golden_folders
from reference.batches import llada_batch
from safetensors.torch import load_file
from torch import Tensor

from unidiff.families.lumina import LUMINA
from unidiff.families.mmada import MMADA, SPECIALS, mmada_vocabulary
from unidiff.tokens import Vocabulary

LOGITS = dict(atol=5e-5, rtol=0.0)


def is_a(folder: Path) -> bool:
    return "cfg_img" in next(iter(settings_of(folder)["cases"].values()))


def settings_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def cases(a: bool) -> list[Any]:
    found = [f for f in golden_folders("mmada_parallel") if (f / "weights.safetensors").exists() and is_a(f) == a]
    made = [pytest.param(f, name, id=f"{f.name}-{name}") for f in found for name in settings_of(f)["cases"]]
    return made or [absent_set("mmada_parallel", None)]


@lru_cache(maxsize=4)
def load(folder: Path) -> tuple[Any, Vocabulary]:
    config = settings_of(folder)
    ids, size, weights = config["tokens"], config["model"]["vocab_size"], load_file(folder / "weights.safetensors")
    if is_a(folder):
        names = {"newline": "newline", "boi": "boi", "eoi": "eoi", "uncondition": "uncondition", "answer_pad": "pad"}
        names |= {"answer": "answer_start", "end_answer": "answer_end"}
        first = ids["image_offset"]
        codes = (first, first + ids["codebook_size"])
        vocabulary = Vocabulary(size, (0, first), codes, ids["mask"], specials={n: ids[t] for n, t in names.items()})
        fields = {**config["model"], "architectures": ["LLaDAForMultiModalGeneration"]}
        return LUMINA.load(weights, fields, vocabulary=vocabulary)[0], vocabulary
    marks = {name.strip("<|>[]").lower(): i for name, i in ids["reserved"].items()}
    specials = {name: i for name, i in {**marks, **ids}.items() if name in SPECIALS}
    vocabulary = mmada_vocabulary(size, ids["text_tokenizer_len"], ids["codebook_size"], ids["mask"], specials)
    fields = {**config["model"], "new_vocab_size": size}
    return MMADA.load(weights, fields, vocabulary=vocabulary)[0], vocabulary


def logits_of(model: Any, ids: Tensor) -> Tensor:
    """`[B, L, V]` of rows without padding."""
    return model(llada_batch(ids.long()))
