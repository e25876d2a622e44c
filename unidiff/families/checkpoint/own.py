"""Models in folders that unidiff wrote, and the record of the released checkpoint that one was converted from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from unidiff.errors import DamagedFile, read_json
from unidiff.families.checkpoint.keymap import KeyMap, assemble
from unidiff.families.family import Released
from unidiff.families.registry import FAMILIES
from unidiff.models.mmdit import MMDiT
from unidiff.models.transformer import MaskedTransformer
from unidiff.schema import Depth, check_value, from_data
from unidiff.tokens.image.vq import IMAGE_TOKENIZERS, VQImageTokenizer
from unidiff.tokens.vocabulary import Vocabulary
from unidiff.weights.checks import build_on_meta, check_finite
from unidiff.weights.files import in_memory, open_checkpoint

RECORD = "released.json"
CONSTANTS = "constants.safetensors"
_SPELLING: Mapping[str, Any] = {"block_group_size": Depth | None, "fused": bool, "copies": bool}
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


def read_record(folder: Path) -> Record:
    """`released.json` of a converted folder; `ValueError` for a damaged one."""
    path = folder / RECORD
    values = read_json(path, "a record of a conversion")
    try:
        record = from_data(Record, values, "it")
        if record.constants not in (None, CONSTANTS):
            raise ValueError(f"its constants are {record.constants!r}; expected {CONSTANTS!r} or null")
        for name, value in record.layout.items():
            check_value(value, _SPELLING.get(name, None), f"layout {name}")
        family = FAMILIES.get_or_refuse(record.family, "its family")
        if (record.vocabulary is None) != (family.vocabulary is None):
            raise ValueError(f"{family.name} {'has a' if family.vocabulary else 'has no'} vocabulary")
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; convert the checkpoint again") from error
    return record


def save_converted(released: Released, folder: Path) -> None:
    """Write the model as `save_pretrained` does, and the record of its origin, into an empty folder."""
    model: Any = released.model
    model.save_pretrained(folder)
    if released.constants:
        save_file({name: value.contiguous() for name, value in released.constants.items()}, folder / CONSTANTS)
    ids = None if released.vocabulary is None else released.vocabulary.to_dict()
    constants = CONSTANTS if released.constants else None
    record = Record(released.family.name, released.config, released.spelling, constants=constants)
    content = json.dumps({**asdict(record), "vocabulary": ids}, indent=2, sort_keys=True)
    (folder / RECORD).write_text(content + "\n", encoding="utf-8")


def load_converted(
    folder: Path, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Released:
    """What `save_converted` wrote; errors as in `load_released`."""
    record = read_record(folder)
    family, ids = FAMILIES[record.family], record.vocabulary
    model = load_own(folder, dtype, device)
    if isinstance(model, MaskedTransformer) and ids is not None and ids.size != model.config["vocab_size"]:
        rows = model.config["vocab_size"]
        raise ValueError(f"{folder / RECORD} has {ids.size} ids, but the model {rows}; convert it again")
    constants = {}
    if record.constants:
        constants = {name: in_memory(value) for name, value in open_checkpoint(folder / record.constants).items()}
        if unknown := sorted(constants.keys() - set(family.constants)):
            raise ValueError(f"{folder / record.constants} holds {unknown}; expected some of {list(family.constants)}")
        check_finite(constants, str(folder / record.constants))
    images = VQImageTokenizer(model) if family.vocabulary is None else None
    return Released(family, model, ids, record.config, record.layout, constants, images)


def load_own(folder: Path, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Any:
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
    name, known = config.get("_class_name"), {*_TRANSFORMERS, *IMAGE_TOKENIZERS}
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"{path} describes a {name!r}; expected one of {sorted(known)}")
    try:
        if name in IMAGE_TOKENIZERS:
            IMAGE_TOKENIZERS[name].check_config(config)
        model = build_on_meta(_TRANSFORMERS.get(name) or IMAGE_TOKENIZERS[name].network_class(), config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    try:
        return assemble(model, KeyMap.of(model), open_checkpoint(folder), dtype, device)
    except DamagedFile:
        raise
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
