"""Models in unidiff's own folder layout that came from a released checkpoint, and the record of where they came from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from unidiff.errors import DamagedFile, read_json
from unidiff.families.checkpoint.conv_names import conv_keymap
from unidiff.families.checkpoint.keymap import assemble
from unidiff.models.mmdit import MMDiT
from unidiff.models.transformer import MaskedTransformer
from unidiff.schema import check_fields
from unidiff.tokens.image.vq import IMAGE_TOKENIZERS
from unidiff.tokens.vocabulary import Vocabulary
from unidiff.weights.checks import build_on_meta
from unidiff.weights.files import open_checkpoint

RECORD = "released.json"
CONSTANTS = "constants.safetensors"
_TRANSFORMERS: dict[str, Any] = {cls.__name__: cls for cls in (MaskedTransformer, MMDiT)}


@dataclass(frozen=True)
class Record:
    """What a converted folder remembers of its origin.

    Attributes:
        family: name in the registry.
        config: upstream's configuration.
        layout: spelling of the released names, see `Family.spelling`.
        vocabulary: id layout; None for an image tokenizer.
        constants: name of the file with the checkpoint's fixed buffers; None without any.
    """

    family: str
    config: Mapping[str, Any]
    layout: Mapping[str, Any] = field(default_factory=dict)
    vocabulary: Vocabulary | None = None
    constants: str | None = None

    def to_json(self) -> str:
        """Text of `released.json`."""
        values = {name: getattr(self, name) for name in (f.name for f in fields(self))}
        values["vocabulary"] = None if self.vocabulary is None else self.vocabulary.to_dict()
        return json.dumps(values, indent=2, sort_keys=True) + "\n"


def read_record(folder: Path) -> Record:
    """`released.json` of a converted folder.

    Raises:
        ValueError: damaged, or with unknown or missing keys.
    """
    path = folder / RECORD
    known = {f.name for f in fields(Record)}
    values = read_json(path, "a record of a conversion")
    unknown, missing = sorted(set(values) - known), sorted({"family", "config"} - set(values))
    if unknown or missing:
        raise ValueError(f"{path} has unknown keys {unknown} and lacks {missing}; expected {sorted(known)}")
    if values.get("constants") not in (None, CONSTANTS):
        raise ValueError(f"{path} names {values['constants']!r} as constants; expected {CONSTANTS!r} or null")
    ids = values.get("vocabulary")
    try:
        record = Record(**{**values, "vocabulary": None if ids is None else Vocabulary.from_dict(ids)})
        check_fields(record, "")
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); convert the checkpoint again") from error
    return record


def load_native(folder: Path, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Any:
    """A model folder in diffusers' layout of one of our classes, in evaluation mode, tensor by tensor.

    Args:
        folder: with `config.json` and safetensors weights.
        dtype: of the floating-point weights; None keeps the stored ones.
        device: where to; None for the CPU.

    Raises:
        FileNotFoundError: no config or weights there.
        ValueError: another class, unknown config keys, or weights that are missing, left over, misshaped or not finite.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; name a folder with a saved model")
    config = read_json(path, "a model's config")
    name = config.get("_class_name")
    known = {*_TRANSFORMERS, *IMAGE_TOKENIZERS}
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"{path} describes a {name!r}; expected one of {sorted(known)}")
    try:
        if name in IMAGE_TOKENIZERS:
            IMAGE_TOKENIZERS[name].check_config(config)
        model = build_on_meta(_TRANSFORMERS.get(name) or IMAGE_TOKENIZERS[name].network_class(), config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    keymap = conv_keymap(model)
    try:
        return assemble(model, keymap, open_checkpoint(folder), dtype, device)
    except DamagedFile:
        raise
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
