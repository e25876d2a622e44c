"""`load_released`: a released model from a file, a folder or the hub, with its family recognised, and nothing partial."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from omegaconf import OmegaConf
from torch import Tensor, nn

from unidiff.errors import check_regular, json_name, plain, read_json, reading
from unidiff.families.checkpoint.config_keys import ConfigError, check_names
from unidiff.families.checkpoint.keymap import KeyMismatch, strip_prefixes, unwrap
from unidiff.families.checkpoint.native import RECORD, load_native, read_record
from unidiff.families.family import Family, Spelling
from unidiff.families.registry import FAMILIES, recognise
from unidiff.hub import ALL_FILES, locate
from unidiff.models.transformer import MaskedTransformer
from unidiff.schema import Depth, check_value
from unidiff.tokens.image.vq import VQImageTokenizer
from unidiff.tokens.vocabulary import Vocabulary
from unidiff.weights.checks import check_finite, check_model_dtype
from unidiff.weights.files import StoredTensor, in_memory, open_checkpoint, weight_file

ENTRIES = ("ema", "model", "state_dict")  # of a file that holds more than weights
LARGEST_YAML = 2**22  # bytes
LARGEST_COUNT = 10**6  # values of a YAML file with its aliases written out
CONFIG_NAMES = ("config.json", "config.yaml", "config.yml")
PIPELINE_PARTS = ("transformer", "vqvae")
SPELLING: Mapping[str, Any] = {"block_group_size": Depth | None, "fused": bool, "copies": bool}
"""What else the released names of weights can need, see `Family.spelling`."""


@dataclass(frozen=True)
class Checkpoint:
    """A released checkpoint that has been opened but not read.

    Attributes:
        path: of the weight file or index. config_path: of the configuration, where it lies beside.
        family: which it is.
        config: upstream's, empty where the family needs none.
        state: what the file holds, as the family's loader takes it.
        tensors: stored tensors by name, without prefixes.
    """

    path: Path
    family: Family
    config: Mapping[str, Any]
    state: Mapping[str, Any]
    tensors: Mapping[str, Any]
    config_path: Path | None = None


@dataclass(frozen=True)
class Released:
    """A released model, ready to run.

    Attributes:
        family: which it is.
        model: the network in evaluation mode (for an image tokenizer, the autoencoder inside).
        vocabulary: id layout; None for an image tokenizer.
        config: upstream's configuration.
        spelling: what else the released names of the weights need.
        constants: buffers that the architecture fixes, as the checkpoint stored them, under released names.
        images: the image tokenizer, where it is one.
    """

    family: Family
    model: nn.Module
    vocabulary: Vocabulary | None
    config: Mapping[str, Any]
    spelling: Spelling = field(default_factory=dict)
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    images: VQImageTokenizer | None = None

    def state_dict(self) -> dict[str, Tensor]:
        """The weights under released names; constants only where the checkpoint held them."""
        weights = self.family.export(self.model if self.images is None else self.images, self.spelling)
        return {n: v for n, v in weights.items() if n not in self.family.constants} | dict(self.constants)


def load_released(
    name: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    *,
    family: str | None = None,
    config: Mapping[str, Any] | None = None,
    vocabulary: Vocabulary | None = None,
    entry: str | None = None,
    subfolder: str | None = None,
    **hub_options: Any,
) -> Released:
    """Load a released denoiser or image tokenizer straight into `dtype` on `device`, tensor by tensor.

    Args:
        name: a weight file, a folder (weights and config side by side, or a diffusers folder with `transformer`), a
            folder that `unidiff convert` wrote, or a hub name.
        dtype: of the floating-point weights; None keeps the checkpoint's.
        device: where to; None for the CPU.
        family: a name in `FAMILIES` where config and weights do not tell.
        config: upstream's configuration, where none lies beside the weights.
        vocabulary: id layout, for families whose config does not imply it (MMaDA, Lumina of other sizes).
        entry: where the weights are inside a torch file; None for the first of `ema`, `model`, `state_dict` there.
        subfolder: below `name`.
        hub_options: revision, cache_dir, token, local_files_only, force_download.

    Raises:
        FileNotFoundError: no weights, no config, or a missing shard.
        ValueError: a damaged file, one that could run code, an unknown or another family, or weights that are missing,
            left over, misshaped or not finite; the message names the first ones and what would fit.
    """
    check_model_dtype(dtype)
    path = find_part(name, subfolder, **hub_options)
    if (path / RECORD).is_file():
        _check_unused(path, {"config": config, "vocabulary": vocabulary, "entry": entry}, family)
        return load_converted(path, dtype, device)
    found = open_released(path, family, config, entry)
    try:
        model, ids = found.family.load(found.state, found.config, dtype=dtype, device=device, vocabulary=vocabulary)
    except KeyMismatch as error:
        raise ValueError(f"{found.path} as {found.family.name}: {error}; {_would_fit(found)}") from error
    except ConfigError as error:
        hint = "" if found.family.has_keys(found.tensors) else f"; {_would_fit(found)}"
        raise ValueError(f"{found.config_path or 'config='} as {found.family.name}: {error}{hint}") from error
    except ValueError as error:
        raise ValueError(f"{found.path} as {found.family.name}: {error}") from error
    images = model if isinstance(model, VQImageTokenizer) else None
    return Released(
        found.family,
        model if images is None else images.model,
        ids,
        found.config,
        found.family.spelling(found.tensors, found.config),
        stored_constants(found),
        images,
    )


def load_converted(
    folder: Path, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Released:
    """A folder that `convert` wrote; errors as in `load_released`."""
    record = read_record(folder)
    try:
        family = FAMILIES.get_or_refuse(record.family, "family")
        for name, value in record.layout.items():
            check_value(value, SPELLING.get(name, None), f"layout {name}")
        if (record.vocabulary is None) != (family.vocabulary is None):
            raise ValueError(f"{family.name} {'has a' if family.vocabulary else 'has no'} vocabulary")
    except ValueError as error:
        raise ValueError(f"{folder / RECORD} is damaged: {error}; convert the checkpoint again") from error
    model = load_native(folder, dtype, device)
    rows = model.config.get("vocab_size")
    if isinstance(model, MaskedTransformer) and record.vocabulary is not None and record.vocabulary.size != rows:
        raise ValueError(f"{folder / RECORD} has {record.vocabulary.size} ids, but the model {rows}; convert it again")
    constants = {}
    if record.constants:
        constants = {name: in_memory(value) for name, value in open_checkpoint(folder / record.constants).items()}
        if unknown := sorted(constants.keys() - set(family.constants)):
            raise ValueError(f"{folder / record.constants} holds {unknown}; expected some of {list(family.constants)}")
        check_finite(constants, str(folder / record.constants))
    images = VQImageTokenizer(model) if family.vocabulary is None else None
    return Released(family, model, record.vocabulary, record.config, record.layout, constants, images)


def _check_unused(folder: Path, given: Mapping[str, Any], family: str | None) -> None:
    """Raise `ValueError` for arguments that contradict a converted folder, which says everything itself."""
    if unused := sorted(name for name, value in given.items() if value is not None):
        raise ValueError(f"{folder} was converted and brings its own {' and '.join(unused)}; leave {unused[0]}= out")
    if family is not None and FAMILIES.get_or_refuse(family, "family").name != (found := read_record(folder).family):
        raise ValueError(f"{folder} was converted from {found}, not {family}; leave the family out")


def find_part(name: str | Path, subfolder: str | None = None, **hub_options: Any) -> Path:
    """The file, or the folder with weights, behind a name; of a diffusers folder, its `transformer`."""
    path = Path(name)
    if path.is_dir() or not path.exists():
        path = locate(name, ALL_FILES, **hub_options)
    if subfolder is not None:
        path = path / subfolder
        if not path.is_dir():
            raise FileNotFoundError(f"{path} does not exist; name a subfolder of {str(name)!r}")
    if path.is_dir() and not any((path / config).exists() for config in CONFIG_NAMES):
        for part in PIPELINE_PARTS:
            if (path / part / "config.json").exists():
                return path / part
        inside = sorted(p.parent.parent.name for p in path.glob("*/transformer/config.json"))
        if inside:
            raise FileNotFoundError(f"{path} holds several models; give subfolder={inside[0]!r} or another of {inside}")
    return path


def open_released(
    path: Path, family: str | None = None, config: Mapping[str, Any] | None = None, entry: str | None = None
) -> Checkpoint:
    """Open and recognise a checkpoint without reading its weights; arguments and errors as in `load_released`."""
    file = weight_file(path, any_name=True)
    config_path = find_config(file) if config is None else None
    config = read_config(file) if config is None else config
    content = open_checkpoint(file)
    state = _entry(content, entry)
    tensors = {name: value for name, value in unwrap(state).items() if hasattr(value, "shape")}
    if not tensors:
        listed = sorted(map(str, content))[:5]
        raise ValueError(f"{file} holds no named weights; name another file or entry (it has {listed})")
    if strange := [name for name in tensors if not isinstance(name, str)]:
        raise ValueError(f"{file} holds a weight under {plain(strange[0])}; expected names")
    try:
        check_names(config)
        tensors = strip_prefixes(tensors)
        chosen = recognise(config, tensors) if family is None else FAMILIES.get_or_refuse(family, "family")
    except ConfigError as error:
        raise ValueError(f"{config_path or 'config='}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    if chosen.default_config is None and not config:
        raise FileNotFoundError(
            f"{file.parent} holds no config.json, which {chosen.name} needs; add it or give config="
        )
    lightning = isinstance(content.get("ema"), Mapping) and "shadow_params" in content["ema"] and entry is None
    # a Lightning file's averaged weights have no names; its family gives them theirs
    state = content if lightning else strip_prefixes(unwrap(state))
    return Checkpoint(file, chosen, config, state, tensors, config_path)


def _entry(content: Mapping[str, Any], entry: str | None) -> Mapping[str, Any]:
    """The weights inside a checkpoint that may nest them.

    Args:
        content: names to weights, or entries to such mappings.
        entry: the entry to take; None for the first of `ENTRIES` that holds named weights, or `content` itself without any.

    Raises:
        ValueError: `entry` is not there.
    """
    there = [name for name, value in content.items() if isinstance(value, Mapping)]
    if entry is not None:
        if entry not in there:
            raise ValueError(f"the checkpoint has no entry {entry!r}; it has {sorted(there) or 'bare weights'}")
        return content[entry]
    return next((content[name] for name in ENTRIES if name in there and _named_weights(content[name])), content)


def _named_weights(value: Mapping[str, Any]) -> bool:
    """A Lightning `ema` holds a list of weights beside counters, which only its family can name."""
    return any(isinstance(item, (Tensor, StoredTensor, Mapping)) for item in value.values())


def find_config(file: Path) -> Path | None:
    """The configuration file beside a weight file, None without one."""
    return next((file.parent / name for name in CONFIG_NAMES if os.path.lexists(file.parent / name)), None)


def read_config(file: Path) -> dict[str, Any]:
    """The configuration beside a weight file; empty without one. Interpolations in YAML stay as they are written.

    Raises:
        ValueError: one that is damaged or holds no mapping.
    """
    path = find_config(file)
    if path is None:
        return {}
    if path.suffix == ".json":
        return cast(dict[str, Any], read_json(path, "a JSON config"))
    check_regular(path)
    if (size := path.stat().st_size) > LARGEST_YAML:
        raise ValueError(f"{path} has {size} bytes, too many for a config; it is damaged or another file")
    with reading(path, "a YAML config"):
        text = path.read_text(encoding="utf-8-sig")
        if _nodes(yaml.safe_load(text), {}) > LARGEST_COUNT:  # aliases of aliases
            raise ValueError(f"it names more than {LARGEST_COUNT} values")
        config = OmegaConf.to_container(OmegaConf.create(text))
    if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
        raise ValueError(f"{path} holds {json_name(config)}; expected named settings")
    return cast(dict[str, Any], config)


def _nodes(value: Any, seen: dict[int, int]) -> int:
    """How many values a tree has when every alias is written out."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in seen:
        inner = value.values() if isinstance(value, dict) else value
        seen[id(value)] = 1 + sum(_nodes(one, seen) for one in inner)
    return seen[id(value)]


def stored_constants(found: Checkpoint) -> dict[str, Tensor]:
    """Buffers of the checkpoint that the architecture fixes, under released names."""
    stored = {}
    for name in found.family.constants:
        for candidate in (name, name.removeprefix("backbone.")):
            if candidate in found.tensors:
                stored[name] = in_memory(found.tensors[candidate]).clone()
                break
    return stored


def _would_fit(found: Checkpoint) -> str:
    """What the weights themselves say about the model that they belong to."""
    if not found.family.has_keys(found.tensors):
        try:
            return f"the weights are those of {recognise({}, found.tensors).name}"
        except ValueError as error:
            return str(error)
    layers = {int(m[1]) for name in found.tensors if (m := re.search(r"(?:^|\.)(?:blocks|layers)\.(\d+)\.", name))}
    facts = [f"{max(layers) + 1} layers"] if layers else []
    facts += [
        f"{name} of shape {tuple(value.shape)}"
        for name, value in found.tensors.items()
        if re.search(
            r"(vocab_embed\.embedding|wte\.weight|embed\.embeddings\.weight|quantize\.embedding\.weight)$", name
        )
    ]
    return f"what would fit: a config for the weights' {', '.join(facts) or 'shapes'}"
