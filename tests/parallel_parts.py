"""MMaDA-Parallel's models A and M in small, with rows and runs of them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from decode_layout import request_of
from torch import Tensor

from unidiff.decoding import Sampler, SamplerOutput
from unidiff.families.layout import DecodeRequest
from unidiff.families.llada import LLADA
from unidiff.families.lumina import MARKS, LuminaLayout
from unidiff.families.mmada import MMADA, SPECIALS, MMaDALayout, mmada_vocabulary
from unidiff.families.parallel import JointSettings
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Vocabulary

NAMES = ("eos", "newline", "answer_pad", "boi", "eoi", "uncondition", "answer", "end_answer")
IDS_A = {name: 30 + i for i, name in enumerate(NAMES)}
VOCABULARY_A = Vocabulary(60, (0, 40), (40, 56), 29, specials=IDS_A)
IDS_M = {name: 20 + i for i, name in enumerate(SPECIALS)}
VOCABULARY_M = mmada_vocabulary(size=60, offset=41, codebook_size=16, mask_id=40, specials=IDS_M)
WORDS = {"a": [1], "red": [2], "fox": [3], "make": [4], "it": [5], "system": [9, 9], "user": [6], "assistant": [7]}
JOINT = JointSettings(8, 4, 1.5, 2.0)
TEXTS = ["make it red", "a red fox make it red"]
CODES = torch.arange(2 * 6).view(2, 2, 3) * 5 % 16
SQUARE = torch.arange(2 * 4).view(2, 2, 2) * 3 % 16


def encode(text: str) -> list[int]:
    return [i for word in text.split() for i in WORDS[word]]


A = LuminaLayout(
    VOCABULARY_A, encode, {name: [20 + i] for i, name in enumerate(MARKS)}, systems=("system",) * 3, joint=JOINT
)
M = MMaDALayout(VOCABULARY_M, encode, side=2, joint=replace(JOINT, text_guidance=0.5))
CONFIGS = {
    "A": (LLADA, {"vocab_size": 60, "mask_token_id": 29}),
    "M": (MMADA, {"new_vocab_size": 60}),
}
GIVEN: dict[str, dict[str, dict[str, Any]]] = {
    "A": {"edit": dict(codes=CODES, grid=(3, 2)), "generate": dict(grid=(2, 3))},
    "M": {"edit": dict(codes=SQUARE), "generate": {}},
}
LAYOUTS = {"A": A, "M": M}
BOTH = pytest.mark.parametrize("variant", LAYOUTS)
_MODELS: dict[tuple[str, str], MaskedTransformer] = {}


def model_of(variant: str, dtype: str = "float64") -> MaskedTransformer:
    if (variant, dtype) not in _MODELS:
        family, more = CONFIGS[variant]
        sizes = {"d_model": 24, "n_heads": 2, "n_kv_heads": 2, "n_layers": 2, "mlp_hidden_size": 40}
        torch.manual_seed(3)
        model = MaskedTransformer(**family.settings({**sizes, **more})).eval()
        for p in model.parameters():
            torch.nn.init.normal_(p, 1.0 if p.ndim == 1 else 0.0, 0.4)
        _MODELS[variant, dtype] = model.to(getattr(torch, dtype))
    return _MODELS[variant, dtype]


def request_for(variant: str, task: str, layout: Any = None, texts: Any = TEXTS, longest: int = 6, **more: Any) -> Any:
    given = {**GIVEN[variant][task], **more}
    given = {n: v[: len(texts)] if isinstance(v, Tensor) else v for n, v in given.items()}
    return request_of(layout or LAYOUTS[variant], task, texts=list(texts), longest=longest, told=True, **given)


class Spy:
    """A denoiser that keeps the ids that it sees."""

    def __init__(self, model: Any) -> None:
        self.model, self.seen = model, list[Tensor]()

    def hidden(self, ids: Tensor, *rest: Any) -> Tensor:
        self.seen.append(ids.clone())
        return self.model.hidden(ids, *rest)

    def head(self, *about: Any) -> Tensor:
        return self.model.head(*about)


class Loud:
    """A denoiser that says one id everywhere, where it may."""

    def __init__(self, model: Any, loud: int) -> None:
        self.model, self.loud, self.hidden = model, loud, model.hidden

    def head(self, features: Tensor, start: int, stop: int) -> Tensor:
        logits = self.model.head(features, start, stop).clone()
        if start <= self.loud < stop:
            logits[..., self.loud - start] += 1000
        return logits


def run(
    variant: str, request: DecodeRequest, layout: Any = None, policy: Any = None, seeds: Any = (1, 2), model: Any = None
) -> SamplerOutput:
    layout, model = layout or LAYOUTS[variant], model or model_of(variant)
    seeds, config = torch.tensor(seeds[: len(request.words)]), request.needs.keep_in(request.config)
    ready = layout.prepared(SimpleNamespace(transformer=model), request, config, seeds)
    sampler = Sampler(model, ready.vocabulary or layout.vocabulary, ready.config, policy, ready.rules)
    return sampler(request.batch, seeds, record=True, unconditional=request.unconditional)


def open_codes(request: DecodeRequest, out: SamplerOutput, mask: int) -> list[int]:
    """How many codes of the first row are masked after each pass, before the first one too."""
    return [int((ids[0, request.picture[0]] == mask).sum()) for ids in out.trajectory]


def open_words(request: DecodeRequest, out: SamplerOutput, mask: int) -> list[int]:
    return [int((ids[0, request.words[0]] == mask).sum()) for ids in out.trajectory]
