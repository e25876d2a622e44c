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

from unidiff.errors import DamagedFile, check_regular, json_name, plain, read_json, reading
from unidiff.families.checkpoint.config_keys import ConfigError, check_names
from unidiff.families.checkpoint.expert_names import ExpertLayout
from unidiff.families.checkpoint.keymap import KeyMap, KeyMismatch, assemble, strip_prefixes, unwrap
from unidiff.families.family import FAMILIES, Family, Released, recognise
from unidiff.hub import RELEASED, locate
from unidiff.models.dual_transformer import DualTransformer
from unidiff.models.transformer import MaskedTransformer
from unidiff.schema import Depth, check_value, from_data
from unidiff.tokens import Vocabulary
from unidiff.tokens.image.vq import IMAGE_TOKENIZERS, VQImageTokenizer
from unidiff.weights.files import (
    AnyTensor,
    StoredTensor,
    build_on_meta,
    check_finite,
    check_model_dtype,
    in_memory,
    open_checkpoint,
    weight_file,
)

ENTRIES = ("ema", "model", "state_dict")  # of a file that holds more than weights
CONFIG_NAMES = ("config.json", "config.yaml", "config.yml")
PIPELINE_PARTS = ("transformer", "vqvae")
IMAGE_PLACES = ("image_tokenizer", "vqvae", "magvitv2", "vq_ds16_c2i.pt", "vq_ds8_c2i.pt")
"""Where image tokenizers lie beside the weights of a denoiser."""
RECORD = "released.json"
CONSTANTS = "constants.safetensors"
_SPELLING: Mapping[str, Any] = {
    "block_group_size": Depth | None,
    "fused": bool,
    "copies": bool,
    "experts": ExpertLayout,
}
LARGEST_YAML = 2**22  # bytes
LARGEST_COUNT = 10**6  # values of a YAML file with its aliases written out
_TABLES = r"(vocab_embed\.embedding|wte\.weight|embed\.embeddings\.weight|quantize\.embedding\.weight)$"


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
        dtype: of the floating-point weights; None keeps the checkpoint's. device: where to; None for the CPU.
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
    # 1. what unidiff wrote says everything itself
    if (path / RECORD).is_file():
        given = {"config": config, "vocabulary": vocabulary, "entry": entry}
        if unused := sorted(name for name, value in given.items() if value is not None):
            raise ValueError(f"{path} was converted and brings its own {' and '.join(unused)}; leave {unused[0]}= out")
        record = read_record(path)
        if family is not None and FAMILIES.get_or_refuse(family, "family").name != record.family:
            raise ValueError(f"{path} was converted from {record.family}, not {family}; leave the family out")
        return _load_converted(path, record, dtype, device)
    # 2. open and recognise; no weight is read
    file = weight_file(path, any_name=True)
    beside = find_config(file.parent) if config is None else None
    config = read_config(beside) if config is None else config
    content = open_checkpoint(file)
    state = _entry(content, entry)
    tensors = _stored(file, content, state)
    try:
        check_names(config)
        tensors = strip_prefixes(tensors)
        found = recognise(config, tensors) if family is None else FAMILIES.get_or_refuse(family, "family")
    except ValueError as error:
        raise ValueError(f"{beside or 'config=' if isinstance(error, ConfigError) else file}: {error}") from error
    config = {**sections_beside(found, file.parent), **config}
    if found.default_config is None and not config:
        raise FileNotFoundError(f"{file.parent} holds no config.json, which {found.name} needs; add it or give config=")
    # 3. build and fill; a Lightning file's averaged weights have no names, its family gives them theirs
    lightning = entry is None and isinstance(content.get("ema"), Mapping) and "shadow_params" in content["ema"]
    try:
        model, ids = found.load(content if lightning else state, config, dtype, device, vocabulary)
    except ValueError as error:
        of_config = isinstance(error, ConfigError)
        hinted = isinstance(error, KeyMismatch) or (of_config and not found.has_keys(tensors))
        hint = f"; {_would_fit(found, tensors)}" if hinted else ""
        raise ValueError(f"{(beside or 'config=') if of_config else file} as {found.name}: {error}{hint}") from error
    network = model.model if isinstance(model, VQImageTokenizer) else model
    held = {name: tensors.get(name, tensors.get(name.removeprefix(found.prefix))) for name in found.constants}
    constants = {name: in_memory(value).clone() for name, value in held.items() if value is not None}
    find_beside(network, file.parent)
    carried = {name: cast_later(value, dtype) for name, value in tensors.items() if found.carries(name)}
    check_carried(carried, str(file))
    return Released(found, network, ids, config, found.spelling(tensors, config), constants, carried=carried)


def find_beside(network: Any, folder: Path) -> None:
    """Let a network from this folder know what else lies beside, see `Family.beside`."""
    for family in FAMILIES.values():
        if family.beside is not None and isinstance(network, family.network):
            family.beside(network, folder)


def sections_beside(family: Family, folder: Path) -> dict[str, Any]:
    """The family's further files of settings that lie in a folder, by the name of their section."""
    places = {name: folder / f"{name}.json" for name in family.sections}
    return {name: read_json(path, "a JSON config") for name, path in places.items() if path.is_file()}


def find_part(name: str | Path, subfolder: str | None = None, **hub_options: Any) -> Path:
    """The file, or the folder with weights, behind a name; of a diffusers folder, its `transformer`."""
    path = Path(name)
    if path.is_dir() or not path.exists():
        path = locate(name, RELEASED, **hub_options)
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


def _entry(content: Mapping[str, Any], entry: str | None) -> Mapping[str, Any]:
    """The weights inside a checkpoint: an entry (`ValueError` without it); for None the first of `ENTRIES` that holds named
    weights, or the whole without any.
    """
    there = {name: value for name, value in content.items() if isinstance(value, Mapping)}
    if entry is None:  # a Lightning `ema` holds a list of weights beside counters
        named = (n for n in ENTRIES if any(isinstance(v, (StoredTensor, Mapping)) for v in there.get(n, {}).values()))
        return there.get(next(named, ""), content)
    if entry not in there:
        raise ValueError(f"the checkpoint has no entry {entry!r}; it has {sorted(there) or 'bare weights'}")
    return there[entry]


def _stored(file: Path, content: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a checkpoint by name; `ValueError` without any, or with names that are none."""
    tensors = {name: value for name, value in unwrap(state).items() if hasattr(value, "shape")}
    if not tensors:
        listed = sorted(map(str, content))[:5]
        raise ValueError(f"{file} holds no named weights; name another file or entry (it has {listed})")
    if strange := [name for name in tensors if not isinstance(name, str)]:
        raise ValueError(f"{file} holds a weight under {plain(strange[0])}; expected names")
    return tensors


def find_config(folder: Path) -> Path | None:
    """The configuration file in a folder with weights, None without one."""
    return next((folder / name for name in CONFIG_NAMES if os.path.lexists(folder / name)), None)


def read_config(path: Path | None) -> dict[str, Any]:
    """What a configuration file holds; empty for None, `ValueError` for a damaged one. Interpolations stay as they are."""
    if path is None:
        return {}
    if path.suffix == ".json":
        return cast(dict[str, Any], read_json(path, "a JSON config"))
    check_regular(path)
    if (size := path.stat().st_size) > LARGEST_YAML:
        raise ValueError(f"{path} has {size} bytes, too many for a config; it is damaged or another file")
    with reading(path, "a YAML config"):
        text = path.read_text(encoding="utf-8-sig")
        if _count(yaml.safe_load(text), {}) > LARGEST_COUNT:  # aliases of aliases
            raise ValueError(f"it names more than {LARGEST_COUNT} values")
        config = OmegaConf.to_container(OmegaConf.create(text))
    if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
        raise ValueError(f"{path} holds {json_name(config)}; expected named settings")
    return cast(dict[str, Any], config)


def _count(value: Any, seen: dict[int, int]) -> int:
    """How many values a tree has when every alias is written out."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if id(value) not in seen:
        seen[id(value)] = 1 + sum(_count(one, seen) for one in inner)
    return seen[id(value)]


def _would_fit(family: Family, tensors: Mapping[str, Any]) -> str:
    """What the weights themselves say about the model that they belong to."""
    if not family.has_keys(tensors):
        try:
            return f"the weights are those of {recognise({}, tensors).name}"
        except ValueError as error:
            return str(error)
    layers = {int(m[1]) for name in tensors if (m := re.search(r"(?:^|\.)(?:blocks|layers)\.(\d+)\.", name))}
    tables = {name: tuple(value.shape) for name, value in tensors.items() if re.search(_TABLES, name)}
    facts = [f"{max(layers) + 1} layers"] if layers else []
    facts += [f"{name} of shape {shape}" for name, shape in tables.items()]
    return f"what would fit: a config for the weights' {', '.join(facts) or 'shapes'}"


@dataclass(frozen=True)
class Record:
    """What a converted folder remembers of its origin.

    Attributes:
        family: name in the registry. config: upstream's.
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


def _load_converted(
    folder: Path, record: Record, dtype: torch.dtype | None, device: torch.device | str | None
) -> Released:
    """What `save_converted` wrote, of this record; errors as in `load_released`."""
    family, ids = FAMILIES[record.family], record.vocabulary
    model = load_own(folder, dtype, device)
    if isinstance(model, MaskedTransformer) and ids is not None and ids.size != model.config["vocab_size"]:
        rows = model.config["vocab_size"]
        raise ValueError(f"{folder / RECORD} has {ids.size} ids, but the model {rows}; convert it again")
    constants, carried = {}, {}
    if record.constants:
        kept = open_checkpoint(folder / record.constants)
        carried = {name: cast_later(value, dtype) for name, value in kept.items() if family.carries(name)}
        constants = {name: in_memory(value) for name, value in kept.items() if name not in carried}
        if unknown := sorted(constants.keys() - set(family.constants)):
            raise ValueError(f"{folder / record.constants} holds {unknown}; expected some of {list(family.constants)}")
        check_finite(constants, str(folder / record.constants))
        check_carried(carried, str(folder / record.constants))
    find_beside(model, folder)
    return Released(family, model, ids, record.config, record.layout, constants, carried=carried)


def cast_later(value: AnyTensor, dtype: torch.dtype | None) -> AnyTensor:
    """A weight in another dtype (None keeps its own), cast when it is read; whole numbers stay."""
    if dtype is None or not value.dtype.is_floating_point:
        return value
    return StoredTensor(value.shape, dtype, lambda: in_memory(value).to(dtype))


def check_carried(carried: Mapping[str, AnyTensor], where: str) -> None:
    """`check_finite` of weights that are not kept in memory, one after the other."""
    for name, value in carried.items():
        check_finite({name: in_memory(value)}, where)


def load_own(
    folder: Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    variant: str | None = None,
) -> Any:
    """A folder of `config.json` and weights of one of our classes, in evaluation mode, tensor by tensor.

    Args:
        dtype, device: as in `load_released`. variant: as in `weight_file`.

    Raises:
        FileNotFoundError: no config or weights there.
        ValueError: another class, unknown config keys, or weights that are missing, left over, misshaped or not finite.
    """
    path = where = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; name a folder with a saved model")
    config = read_json(path, "a model's config")
    released = (family.network for family in FAMILIES.values() if family.vocabulary)
    networks = {cls.__name__: cls for cls in (*released, DualTransformer)}
    name, known = config.get("_class_name"), {*networks, *IMAGE_TOKENIZERS}
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"{path} describes a {name!r}; expected one of {sorted(known)}")
    try:
        if name in IMAGE_TOKENIZERS:
            IMAGE_TOKENIZERS[name].check_config(config)
        model = build_on_meta(networks.get(name) or IMAGE_TOKENIZERS[name].network_class(), config)
        where = folder
        return assemble(model, KeyMap.of(model), open_checkpoint(weight_file(folder, variant=variant)), dtype, device)
    except DamagedFile:
        raise
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
