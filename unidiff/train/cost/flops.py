"""What a model costs, counted from its config: parameters, and floating-point operations of a training step.

Layers count as in `unidiff.models.denoiser.LayerFlops`: 2 L N for L tokens and N weights of linear layers, and attention 4 D
for each visible query-key pair and layer. The head adds 2 D n per position that the loss needs, n the size of its slice.

The backward pass counts twice the forward pass. Operations done again (recomputed logits, activation checkpoints) are not
counted: utilisation measures useful work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from unidiff.errors import first_line
from unidiff.models.transformer import MaskedTransformer


@dataclass(frozen=True)
class ModelSize:
    """Weights of a model.

    Attributes:
        total: all parameters.
        block_linear: weights of the linear layers inside all blocks, which every token passes through.
        pair_flops: attention of one query to one key, all layers together, forward.
        blocks: all parameters inside blocks.
        embedding: token and modality embeddings.
        head: the output matrix and bias, 0 where it is the embedding.
        hidden_size, num_layers: width and depth.
    """

    total: int
    block_linear: int
    pair_flops: int
    blocks: int
    embedding: int
    head: int
    hidden_size: int
    num_layers: int


def model_size(settings: Mapping[str, Any], vocab_size: int) -> ModelSize:
    """Count a `MaskedTransformer` of these arguments without making its weights.

    Raises:
        ValueError: arguments that it does not take.
    """
    try:
        with torch.device("meta"):
            model = MaskedTransformer(vocab_size=vocab_size, **settings)
    except TypeError as error:  # an unknown name
        raise ValueError(f"model settings: {first_line(error).partition('() ')[2] or error}") from error
    embeddings = [m.weight.numel() for m in (model.embed_tokens, model.embed_modality) if m is not None]
    outputs = [p.numel() for p in (model.output_weight, model.output_bias) if p is not None]
    return ModelSize(
        total=sum(p.numel() for p in model.parameters()),
        block_linear=sum(layer.token for layer in model.traits.layers)
        // 2,  # a weight is a product and a sum per token
        pair_flops=sum(layer.pair for layer in model.traits.layers),
        blocks=sum(p.numel() for p in model.blocks.parameters()),
        embedding=sum(embeddings),
        head=sum(outputs),
        hidden_size=model.config.hidden_size,
        num_layers=len(model.blocks),
    )


@dataclass(frozen=True)
class TrainingRow:
    """Tokens of one row and what the loss needs of them.

    Attributes:
        text, image: tokens of each modality.
        text_slice, image_slice: sizes of the two slices of the head.
        hidden_share: mean share of positions that are masked; 1/2 for uniform times.
        pairs: visible query-key pairs per layer; None for every pair of the row.
        copies: how often each token passes through the blocks: 2 in block diffusion, clean and noisy.
    """

    text: int
    image: int
    text_slice: int
    image_slice: int
    hidden_share: float = 0.5
    pairs: int | None = None
    copies: int = 1

    @property
    def length(self) -> int:
        return self.text + self.image


@dataclass(frozen=True)
class RowFlops:
    """Operations of one row, forward and backward together."""

    blocks: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        return self.blocks + self.attention + self.head


def row_flops(size: ModelSize, row: TrainingRow) -> RowFlops:
    """Training operations of one row; see the module's formulas."""
    pairs = row.length**2 if row.pairs is None else row.pairs
    scored = row.hidden_share * (row.text * row.text_slice + row.image * row.image_slice)
    return RowFlops(
        blocks=3 * 2 * row.length * row.copies * size.block_linear,
        attention=3 * size.pair_flops * pairs,
        head=3 * 2 * size.hidden_size * scored,
    )


def block_causal_pairs(length: int, block_length: int) -> int:
    """Query-key pairs of one sample in which a query sees its own block and earlier ones."""
    whole, rest = divmod(length, block_length)
    return block_length**2 * whole * (whole + 1) // 2 + rest * length
