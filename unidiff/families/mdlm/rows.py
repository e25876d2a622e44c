"""MDLM's rows: texts that go on and texts with holes, by the reverse process on a grid of times."""

from __future__ import annotations

from typing import Any

from unidiff.decoding.config import ModalityDecoding, SamplerConfig
from unidiff.families.chat import TextLayout


def mdlm_sampler(steps: int = 128) -> SamplerConfig:
    """Ancestral sampling with alpha_t = 1 - t (the log-linear noise of the paper) in so many steps, each of which is a pass
    only where it unmasks something.
    """
    return SamplerConfig(ModalityDecoding(steps=steps, rule="ancestral", schedule="linear"))


def mdlm_layout(released: Any, texts: Any) -> TextLayout:
    """Of a loaded model and its tokenizer."""
    return TextLayout(released.vocabulary, texts.encode, mdlm_sampler(), paced=True, left=False, family="mdlm")
