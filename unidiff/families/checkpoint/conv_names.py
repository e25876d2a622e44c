"""From released weights to an image tokenizer on the shared convolutional autoencoder; the renaming is the family's."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unidiff.checked import build_on_meta
from unidiff.families.checkpoint.files import open_checkpoint, pick_entry
from unidiff.families.checkpoint.keymap import Entry, KeyMap, assemble
from unidiff.tokens.image.conv_autoencoder import ConvTokenizerModel
from unidiff.tokens.image.vq import VQImageTokenizer

PREFIXES = ("module.", "_orig_mod.", "_orig_module.")
ENTRIES = ("ema", "model", "state_dict")
# our names inside a level, and the names that both families use
_PARTS = (
    (r"\.shortcut\.", ".nin_shortcut."),
    (r"\.out\.", ".proj_out."),
)

Rename = Callable[[str], str]


def rename_with(rules: Iterable[tuple[str, str | Callable[[re.Match[str]], str]]]) -> Rename:
    """A renaming by regular expressions, applied in order after those that all families share."""
    compiled = [(re.compile(pattern), value) for pattern, value in (*_PARTS, *rules)]

    def rename(name: str) -> str:
        for pattern, value in compiled:
            name = pattern.sub(value, name)
        return name

    return rename


def read_weights(source: str | Path | Mapping[str, Any], entry: str | None = None) -> Mapping[str, Any]:
    """Names to weights from a file, a folder or what was read from one; see `open_checkpoint` and `pick_entry`."""
    content = source if isinstance(source, Mapping) else open_checkpoint(source)
    return pick_entry(content, entry, ENTRIES)


def build_tokenizer(
    model_class: type[ConvTokenizerModel],
    config: Mapping[str, Any],
    rename: Rename,
    state: Mapping[str, Any],
    dtype: torch.dtype | None,
    constants: Mapping[str, Tensor] | None = None,
    device: torch.device | str | None = None,
) -> VQImageTokenizer:
    """A tokenizer in evaluation mode that takes over the tensors of `state` (cast to `dtype` if given).

    Raises:
        ValueError: missing or left-over weights, a wrong shape, NaN, or a constant of another value.
    """
    model = build_on_meta(model_class, config)
    return VQImageTokenizer(assemble(model, tokenizer_keymap(model, rename, constants or {}), state, dtype, device))


def tokenizer_keymap(model: ConvTokenizerModel, rename: Rename, constants: Mapping[str, Tensor]) -> KeyMap:
    """One entry per weight of the model."""
    return KeyMap([Entry(name, rename(name)) for name in model.state_dict()], 0, PREFIXES, constants)
