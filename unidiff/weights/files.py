"""Released weight files, read tensor by tensor (safetensors, indexes, torch files without running code), and checked.

Opening a file reads names, shapes and dtypes. The bytes of a tensor are read when it is asked for and belong to the
file's mapping until they are copied, so that a model can be filled with no second copy of it in memory.
"""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from unidiff.errors import DamagedFile, check_regular, few, first_line, is_out_of_memory, plain, read_json, reading

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
SAFE_SUFFIX = ".safetensors"
TORCH_MAGIC = (b"PK\x03\x04", b"\x80\x02")  # zip archive; the older bare pickle
INDEX_ENDING = ".index.json"
_STEMS = (
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
)
FOLDER_NAMES = tuple(f"{stem}{index}" for stem in _STEMS for index in ("", INDEX_ENDING))
_SHARD = re.compile(r"[^\\\0]+\.(safetensors|pt|pth|bin|ckpt)")
AGAIN = "the weight file is damaged or of another kind; download it again"
WINDOW = 16 * 2**20  # bytes read through one mapping of a torch file before it is given back and mapped again
_SAFE_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file that has not been read. `read` gives it on the CPU, backed by the file: copy it before the file
    may change."""

    shape: torch.Size
    dtype: torch.dtype
    read: Callable[[], Tensor]


AnyTensor = Tensor | StoredTensor


def in_memory(value: AnyTensor) -> Tensor:
    """The tensor itself, read if it is a stored one."""
    return value.read() if isinstance(value, StoredTensor) else value


def open_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a weight file with a `StoredTensor` in place of every tensor.

    Args:
        path: a `.safetensors`, `.pt`, `.pth`, `.bin` or `.ckpt` file; an index (`*.index.json`) of several; or a folder
            that holds one of `FOLDER_NAMES`.

    Raises:
        FileNotFoundError: nothing there, or a shard is missing.
        ValueError: another suffix, a damaged file, a torch file that could run code or holds no mapping, or shards that
            differ from their index.
    """
    path = weight_file(path)
    if path.suffix == ".json":
        return _open_shards(path)
    if path.suffix == SAFE_SUFFIX:
        return _open_safe(path)
    if path.suffix not in TORCH_SUFFIXES:
        raise ValueError(f"{path} has suffix {path.suffix!r}; expected {SAFE_SUFFIX} or one of {TORCH_SUFFIXES}")
    return _TorchFile(path).content()


def weight_file(path: str | Path, any_name: bool = False, variant: str | None = None, safe_only: bool = False) -> Path:
    """The weight file or index behind `path`: itself, or the one in a folder.

    Args:
        any_name: also take a folder's only weight file under another name than `FOLDER_NAMES`.
        variant: inside the file names, as diffusers puts it there ("fp16"). safe_only: leave torch files out.

    Raises:
        FileNotFoundError: nothing there, or several files that could be meant.
    """
    path = Path(path)
    if path.is_dir():
        names = [name for name in FOLDER_NAMES if not safe_only or SAFE_SUFFIX in name]
        names = [with_variant(name, variant) for name in names]
        found = [path / name for name in names if (path / name).is_file()]
        if not found and any_name:
            found = sorted(p for p in path.iterdir() if p.suffix in (SAFE_SUFFIX, *TORCH_SUFFIXES) and p.is_file())
            if len(found) > 1:
                raise FileNotFoundError(f"{path} holds {len(found)} weight files ({found[0].name}, ...); name one")
        if not found:
            raise FileNotFoundError(f"{path} holds none of {', '.join(names)}; name the weight file itself")
        path = found[0]
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; name a released weight file")
    check_regular(path)
    return path


def with_variant(name: str, variant: str | None) -> str:
    """The name of a weight file or index as diffusers writes it for a variant such as "fp16"; None: `name` itself.

    Raises:
        ValueError: a variant that is no short word.
    """
    if variant is None:
        return name
    if not isinstance(variant, str) or not re.fullmatch(r"[A-Za-z0-9_]{1,40}", variant):
        raise ValueError(f"variant is {variant!r:.80}; expected a short word of letters and digits, such as 'fp16'")
    if name.endswith(INDEX_ENDING):
        return f"{name.removesuffix('.json')}.{variant}.json"
    return name.replace(".", f".{variant}.", 1)


def stored_dtype(folder: Path, variant: str | None = None) -> torch.dtype:
    """The dtype of the first floating-point weight in a folder's safetensors; float32 where there is none."""
    stored = open_checkpoint(weight_file(folder, variant=variant, safe_only=True)).values()
    return next((value.dtype for value in stored if value.dtype.is_floating_point), torch.float32)


def _open_safe(path: Path) -> dict[str, Any]:
    with reading(path, "safetensors", AGAIN), safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        found = {name: (torch.Size(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    for name, (_, dtype) in found.items():
        if dtype not in _SAFE_DTYPES:
            kinds = sorted(_SAFE_DTYPES)
            raise ValueError(f"{path} holds tensor {plain(name)!r} of type {dtype}; expected some of {kinds}")
    return {
        n: StoredTensor(shape, _SAFE_DTYPES[kind], partial(_read_safe, path, n)) for n, (shape, kind) in found.items()
    }


def _read_safe(path: Path, name: str) -> Tensor:
    """A mapping is opened per read, so that what was read leaves the memory with its tensor."""
    with reading(path, "safetensors", AGAIN), safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


class _TorchFile:
    """One torch file, memory-mapped where its format allows; the mapping is renewed after every `WINDOW` bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._content: dict[str, Any] | None = None
        self._left = WINDOW
        self._seen: dict[int, Any] = {}
        with path.open("rb") as file:
            self.mapped = file.read(4) == TORCH_MAGIC[0]

    def content(self) -> dict[str, Any]:
        content = self._load()
        if not self.mapped:  # the older format is read whole, once
            self._content = content
        with reading(self.path, "a torch file", AGAIN):
            return self._stored(content, ())

    def _load(self) -> dict[str, Any]:
        content = load_torch(self.path, self.mapped)
        if not isinstance(content, dict):
            raise ValueError(f"{self.path} holds a {type(content).__name__}; expected named weights")
        return content

    def _stored(self, value: Any, key: tuple[Any, ...]) -> Any:
        """The same nesting of mappings and lists with stored tensors; what occurs many times is looked at once."""
        if isinstance(value, Tensor):
            check_tensor(self.path, ".".join(map(str, key)), value)
            return StoredTensor(value.shape, value.dtype, partial(self.read, key))
        if not isinstance(value, Mapping | list | tuple):
            return value
        if id(value) not in self._seen:
            self._seen[id(value)] = None  # until it is done
            pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
            inner = {k: self._stored(v, (*key, k)) for k, v in pairs}
            self._seen[id(value)] = inner if isinstance(value, Mapping) else list(inner.values())
        if self._seen[id(value)] is None:
            raise ValueError("an entry holds itself")
        return self._seen[id(value)]

    def read(self, key: tuple[Any, ...]) -> Tensor:
        if self._content is None:
            self._content, self._left = self._load(), WINDOW
        value: Any = self._content
        for part in key:
            value = value[part]
        self._left -= value.nbytes
        if self.mapped and self._left <= 0:
            self._content = None
        return value.detach()


def load_torch(path: Path, mapped: bool = False) -> Any:
    """The content of a torch file on the CPU; no code in it is run.

    Raises:
        FileNotFoundError: nothing there. ValueError: no whole torch file, or more in it than tensors and plain data.
    """
    check_regular(path)
    with path.open("rb") as file:
        if not file.read(4).startswith(TORCH_MAGIC):
            raise ValueError(f"{path} is no torch file (a web page or a pointer to it, perhaps); download it again")
    with reading(path, "a torch file", AGAIN):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(item.compress_type != zipfile.ZIP_STORED for item in archive.infolist()):
                    raise ValueError("it is compressed, which torch files never are")  # it could grow without end
        try:
            # training scripts save their command line next to the weights; the class only holds attributes
            with torch.serialization.safe_globals([argparse.Namespace]):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except pickle.UnpicklingError as error:
            raise DamagedFile(
                f"{path} is damaged, or holds more than tensors and plain data, and reading that could run code; "
                "convert it to safetensors where you trust it"
            ) from error
        except (RuntimeError, EOFError, OSError) as error:  # the file opened; torch says much about its archives
            said = "asks for more memory than there is, or is damaged" if is_out_of_memory(error) else "is damaged"
            raise DamagedFile(f"{path} {said}; download it again") from error


def check_tensor(path: Path, name: str, value: Tensor) -> None:
    """Raise `ValueError` for a tensor that is not simply numbers in a file: sparse, quantised, without data, or repeated."""
    kinds = {
        "sparse": lambda: value.layout != torch.strided,
        "quantised": lambda: value.is_quantized,
        "empty (on the meta device)": lambda: value.is_meta,
        "nested": lambda: value.is_nested,
        "larger than its data": lambda: value.nbytes > value.untyped_storage().nbytes(),
    }
    if kind := next((kind for kind, found in kinds.items() if found()), None):
        raise DamagedFile(f"{path}: tensor {plain(name)!r} is {kind}; expected plain tensors; save its dense values")


def _open_shards(index: Path) -> dict[str, Any]:
    """All tensors of the files that an index names."""
    listed = read_json(index, "an index of weights").get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise ValueError(f"{index} is damaged or no index with a weight_map of file names; download it again")
    shards = sorted(set(listed.values()))
    paths = [index.parent / name for name in shards]
    if outside := [name for name in shards if Path(name).name != name or not _SHARD.fullmatch(name)]:
        raise ValueError(f"{index} names {plain(outside[0])!r}; expected plain file names beside it")
    if absent := [path for path in paths if not path.exists()]:
        raise FileNotFoundError(
            f"{absent[0]} does not exist; download the whole checkpoint "
            f"({len(absent)} of {len(paths)} shards are missing)"
        )
    content: dict[str, Any] = {}
    for path in paths:
        part = open_checkpoint(path)
        wrong = sorted(name for name in part if listed.get(name) != path.name)
        lacking = sorted(name for name, shard in listed.items() if shard == path.name and name not in part)
        if wrong or lacking:
            said = f"{len(lacking)} missing ({few(map(plain, lacking))}), {len(wrong)} unexpected ({few(map(plain, wrong))})"
            raise ValueError(f"{path} does not hold what {index.name} says: {said}; download both again")
        content |= part
    return content


FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""What weights can be: eight bits need scales, which are a format of their own."""
_KINDS = ", ".join(str(kind).removeprefix("torch.") for kind in FLOATS)
_PART = 2**22  # elements looked at together


def build_on_meta(cls: Any, config: Mapping[str, Any], where: str = "") -> Any:
    """A model without memory for its weights, from constructor arguments or (of a config file) a whole config.

    Raises:
        ValueError: no such model can be made; the message starts with `where`.
    """
    try:
        with torch.device("meta"):
            return cls.from_config(dict(config)) if "_class_name" in config else cls(**config)
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError, LookupError, AttributeError) as error:
        said = str(error)
        if not isinstance(error, ValueError):  # a class of diffusers checks little of its config; ours check theirs
            said = f"{cls.__name__} cannot be made from its config ({first_line(error)}); check the sizes in it"
        raise ValueError(f"{where}: {said}" if where else said) from error


def check_model_dtype(dtype: Any) -> None:
    """Raise `ValueError` for a dtype that weights cannot be cast to without losing something; None and names pass."""
    if isinstance(dtype, torch.dtype) and dtype not in FLOATS:
        raise ValueError(f"dtype is {str(dtype).removeprefix('torch.')}; weights can be loaded as {_KINDS}")


def check_dtype(name: str, value: Any, is_float: bool = True) -> None:
    """Raise `ValueError` for a stored tensor of a dtype that its place cannot take over without losing something.

    `is_float`: whether the place is for floating-point numbers; otherwise for whole ones.
    """
    if is_float and value.dtype not in FLOATS:
        raise ValueError(
            f"weight {name!r} is stored as {str(value.dtype).removeprefix('torch.')}; expected one of {_KINDS} "
            "(quantised weights are made after loading, with unidiff.families.checkpoint.small_memory)"
        )
    if not is_float and (value.dtype.is_floating_point or value.dtype.is_complex):
        raise ValueError(f"weight {name!r} is stored as {value.dtype}; expected whole numbers")


def check_shapes(
    where: str, wanted: Mapping[str, Any], stored: Mapping[str, Any], more: Mapping[str, Any] | None = None
) -> None:
    """Raise `ValueError` unless weights have the names and shapes that a model wants; `more` may be there besides."""
    known = {**wanted, **(more or {})}
    problems = {
        "missing": sorted(wanted.keys() - stored.keys()),
        "unexpected": sorted(stored.keys() - known.keys()),
        "misshaped": sorted(n for n in stored.keys() & known.keys() if tuple(stored[n].shape) != tuple(known[n].shape)),
    }
    first = next(iter(problems["misshaped"]), None)
    refuse(where, problems, f", {tuple(stored[first].shape)} instead of {tuple(known[first].shape)}" if first else "")


def refuse(where: str, problems: Mapping[str, list[str]], more: str = "") -> None:
    """Raise `ValueError` about the names of weights under the kinds of what is wrong with them; pass where none are."""
    if found := "; ".join(f"{len(v)} {k} ({few(map(plain, v))})" for k, v in problems.items() if v):
        raise ValueError(f"{where}: the weights do not fit the config: {found}{more}; load a checkpoint of this model")


def check_finite(weights: torch.nn.Module | Mapping[str, torch.Tensor], where: str) -> None:
    """Raise `ValueError` naming the first weights (of a model, or by name) that hold NaN or infinity."""
    named = weights.state_dict() if isinstance(weights, torch.nn.Module) else weights
    if bad := [name for name, value in named.items() if not _is_finite(value)]:
        raise ValueError(
            f"{where}: {len(bad)} weights hold NaN or infinity ({few(map(plain, bad))}); the checkpoint is damaged"
        )


def _is_finite(value: torch.Tensor) -> bool:
    """In parts: `isfinite` of a whole embedding would need as much memory again."""
    if value.is_meta or not value.is_floating_point():
        return True
    return all(bool(torch.isfinite(part).all()) for part in value.detach().reshape(-1).split(_PART))
