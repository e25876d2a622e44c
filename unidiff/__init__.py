"""unidiff: unified multimodal discrete diffusion in PyTorch (text and image tokens, one masked diffusion model)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unidiff.decoding import CacheConfig, Guidance, ModalityDecoding, Sampler, SamplerConfig
    from unidiff.models.transformer import MaskedTransformer
    from unidiff.pipeline import UniDiffPipeline
    from unidiff.tokens import Modality, Span, TokenBatch, Vocabulary
    from unidiff.tokens.image.vq import VQImageTokenizer
    from unidiff.tokens.text import TextTokenizer

__version__ = "0.1.0"

# Names are imported on first use, so that `import unidiff` and `unidiff --help` do not wait for torch.
_HOMES = {
    name: home
    for home, names in {
        "unidiff.decoding": ("CacheConfig", "Guidance", "ModalityDecoding", "Sampler", "SamplerConfig"),
        "unidiff.models.transformer": ("MaskedTransformer",),
        "unidiff.pipeline": ("UniDiffPipeline",),
        "unidiff.tokens": ("Modality", "Span", "TokenBatch", "Vocabulary"),
        "unidiff.tokens.image.vq": ("VQImageTokenizer",),
        "unidiff.tokens.text": ("TextTokenizer",),
    }.items()
    for name in names
}

__all__ = [
    "CacheConfig",
    "Guidance",
    "MaskedTransformer",
    "Modality",
    "ModalityDecoding",
    "Sampler",
    "SamplerConfig",
    "Span",
    "TextTokenizer",
    "TokenBatch",
    "UniDiffPipeline",
    "VQImageTokenizer",
    "Vocabulary",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'unidiff' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
