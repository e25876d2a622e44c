"""Sample sheets while training."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from unidiff.models.transformer import MaskedTransformer
from unidiff.train.config import TrainConfig
from unidiff.train.source import TokenSource


def sheet_sampler(config: TrainConfig, source: TokenSource) -> Callable[[MaskedTransformer, int], Tensor] | None:
    return None
