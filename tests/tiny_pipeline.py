"""A pipeline with random weights that decodes in milliseconds: 16 codes, 16 x 24 px, 10 text tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from unidiff.models.transformer import MaskedTransformer
from unidiff.pipeline import UniDiffPipeline
from unidiff.pipelines.settings import PipelineSettings
from unidiff.tokens import Vocabulary
from unidiff.tokens.image.vq import CellVQModel, VQImageTokenizer
from unidiff.tokens.text import TextTokenizer

TEXT_LENGTH, GRID, SIZE = 10, (2, 3), (16, 24)
CORPUS = ["a dog on a red background", "two cats", "an owl above a fox", "what is in the picture? a dog"] * 3


def tiny_parts(
    seed: int = 0,
    text_length: int = TEXT_LENGTH,
    grid: tuple[int, int] = GRID,
    corpus: Sequence[str] = CORPUS,
    **network: Any,
) -> tuple[MaskedTransformer, CellVQModel, TextTokenizer, PipelineSettings]:
    torch.manual_seed(seed)
    text = TextTokenizer.train(corpus, 320 if corpus is CORPUS else 1000)
    image = CellVQModel(8, 16, 4, 16, 1, (16,), (1,))
    for convolution in (image.decoder[0], image.decoder[-2]):  # contrast between codes
        torch.nn.init.normal_(convolution.weight, std=1.0)
    specials = {name: text.special(name) for name in ("eos", "caption", "question", "answer")}
    vocabulary = Vocabulary.unified(text.size, 16, specials)
    sizes = dict(hidden_size=16, num_layers=1, num_heads=2, ffn_size=32) | network
    transformer = MaskedTransformer(vocabulary.size, **sizes)
    for parameter in transformer.parameters():
        if parameter.ndim > 1:  # branches start at zero; attention must matter here
            torch.nn.init.normal_(parameter, std=0.3)
    return transformer, image, text, PipelineSettings(vocabulary, text_length, grid)


def tiny_pipeline(
    seed: int = 0,
    text_length: int = TEXT_LENGTH,
    grid: tuple[int, int] = GRID,
    corpus: Sequence[str] = CORPUS,
    **network: Any,
) -> UniDiffPipeline:
    transformer, image, text, settings = tiny_parts(seed, text_length, grid, corpus, **network)
    pipe = UniDiffPipeline(transformer, VQImageTokenizer(image), text, settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe
