"""Loading that refuses what diffusers only warns about: wrong weights, unknown config keys, NaN."""

from __future__ import annotations

import difflib
import inspect
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import is_accelerate_available
from safetensors import SafetensorError

from unidiff.errors import first_line, is_out_of_memory, plain, read_json, reading, reason_of
from unidiff.files import filling_folder, path_of, resolve_link
from unidiff.schema import check_arguments, check_value
from unidiff.weights.adapter import has_adapters
from unidiff.weights.files import (
    build_on_meta,
    check_dtype,
    check_finite,
    check_model_dtype,
    check_shapes,
    open_checkpoint,
    refuse,
    weight_file,
    with_variant,
)

# diffusers warns about modules to be "kept in float32" at every `to(dtype)`, also where there are none
logging.getLogger("diffusers.models.modeling_utils").addFilter(
    lambda record: "kept in float32: []" not in str(record.msg)
)


HOOKS = {"_hf_hook", "_diffusers_hook"}
"""Attributes of a module that accelerate and diffusers put hooks into."""


def bring(module: torch.nn.Module) -> None:
    """Let the hooks of a module bring it to where it computes, as before its `forward`; for modules with `HOOKS`.

    Models here compute by methods of other names. What the hooks brought stays until they take it away.
    """
    held = vars(module)
    registered = held["_diffusers_hook"].hooks.values() if "_diffusers_hook" in held else ()
    for hook in (*([held["_hf_hook"]] if "_hf_hook" in held else ()), *registered):
        hook.pre_forward(module)


class CheckedModel(ModelMixin, PeftAdapterMixin, ConfigMixin):  # type: ignore[misc]
    """A `ModelMixin` whose `from_pretrained` and `from_config` raise one clear sentence instead of guessing."""

    if TYPE_CHECKING:
        config: Any  # diffusers declares a dict; its keys read as attributes too

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        vars(sys.modules[cls.__module__]).setdefault("ModelMixin", ModelMixin)  # where diffusers looks how to load it

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, **kwargs: Any) -> Self:
        """As `ModelMixin.from_pretrained` (`torch_dtype`/`dtype`, `subfolder`, `revision`, `variant`, ...), safetensors only.

        Raises:
            FileNotFoundError: no config or no safetensors weights there.
            ValueError: another model class, unknown config keys, weights that are missing, unexpected, of another
                shape or unreadable, or that hold NaN or infinity.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        loaded = load_checked(super().from_pretrained, cls.__name__, pretrained_model_name_or_path, **kwargs)
        return loaded if wants_info else loaded[0]  # type: ignore[return-value]

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike,
        max_shard_size: int | str = "10GB",
        variant: str | None = None,
        **options: Any,
    ) -> None:
        """Write config and weights (safetensors), complete or not at all; other files in the folder stay.

        Args:
            max_shard_size: bytes, or text such as "5GB"; larger models become several files.
            variant: a word in the names of the weight files, such as "fp16", to be named again when they are loaded.
            options: diffusers' others, of which only the defaults are taken.

        Raises: as `save_model`, and `ValueError` for an argument that the loaders cannot follow.
        """
        check_save_options(options, max_shard_size)
        with_variant("", variant)
        save = super().save_pretrained
        save_model(self, save_directory, lambda folder: save(folder, max_shard_size=max_shard_size, variant=variant))

    @classmethod
    def extract_init_dict(cls, config_dict: dict, **kwargs: Any) -> tuple[dict, dict, dict]:
        """Split a config into constructor arguments; an unknown key or another class raises `ValueError`."""
        parameters = inspect.signature(cls.__init__).parameters
        known = set(parameters) - {"self"}
        if not isinstance(config_dict.get("quantization_config"), Mapping):  # of the caller, not of the file
            config_dict = {name: value for name, value in config_dict.items() if name != "quantization_config"}
        if unknown := sorted(k for k in config_dict if not k.startswith("_") and k not in known):
            raise ValueError(
                f"{cls.__name__} config has unknown keys {[plain(k) for k in unknown[:5]]}; expected some of {sorted(known)}"
            )
        needed = {name for name in known if parameters[name].default is inspect.Parameter.empty}
        if missing := sorted(needed - config_dict.keys() - kwargs.keys()):
            raise ValueError(f"{cls.__name__} config lacks {missing}")
        family = config_dict.get("_class_name", cls.__name__)
        if family not in [c.__name__ for c in cls.__mro__]:
            raise ValueError(f"the config describes a {plain(family)}, not a {cls.__name__}; load it with its class")
        return super().extract_init_dict(config_dict, **kwargs)

    def check_arguments(self) -> None:
        """Raise `ValueError` unless the config holds what the constructor declares; for the top of constructors."""
        check_arguments(type(self).__init__, self.config, type(self).__name__)

    def weight_copies(self) -> dict[str, str]:
        """Names under which a file may hold an equal copy of another weight, with the name of that weight."""
        return {}


def built_from(config_class: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """For `__init__(self, config)` of a `CheckedModel`: callers, and `config.json`, give the fields of a frozen dataclass."""

    def decorate(init: Callable[..., None]) -> Callable[..., None]:
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            init(self, config_class(*args, **kwargs))

        own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        fields = inspect.signature(config_class).parameters.values()
        __init__.__signature__ = inspect.Signature([own, *fields])  # type: ignore[attr-defined]
        return register_to_config(__init__)

    return decorate


def load_text_encoder(
    kind: Any, folder: Path, dtype: torch.dtype | None, types: Mapping[str, Any], expected: str, **more: Any
) -> Any:
    """The `text_encoder` of a released folder, of a class of transformers; None for a dtype keeps the checkpoint's.

    Args:
        types: what keys of its config have to be, besides `dtype`. expected: the folder, for the message.
        more: handed on to `from_pretrained`.

    Raises:
        FileNotFoundError: no text encoder. ValueError: as of `load_checked`.
    """
    if not (folder / "text_encoder").is_dir():
        raise FileNotFoundError(f"{folder} has no text_encoder; name {expected}")
    kinds = dict.fromkeys(("dtype", "torch_dtype"), Literal["float64", "float32", "float16", "bfloat16"] | None)
    more |= dict(dtype="auto" if dtype is None else dtype, local_files_only=True, trust_remote_code=False)
    source = str(folder / "text_encoder")
    return load_checked(kind.from_pretrained, kind.__name__, source, types={**kinds, **types}, **more)[0]


def load_checked(
    loader: Callable[..., Any],
    class_name: str,
    source: str | os.PathLike | None,
    *,
    types: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[Any, dict[str, Any]]:
    """Call a `from_pretrained` of diffusers or transformers and refuse what it would only warn about.

    A local folder is looked through before: config, names, shapes and dtypes. So a wrong one costs no memory, and the
    library has nothing to print about it.

    Args:
        loader: the bound `from_pretrained` of a model class. source: folder or hub name. kwargs: handed on to it.
        types: what keys of the config have to be, besides what the model class declares.

    Returns:
        (model, loading info of the library).

    Raises:
        FileNotFoundError: no config or no safetensors weights there.
        ValueError: a config of another class or with values that are none, or weights that are missing, unexpected,
            misshaped, no floating-point numbers, unreadable, NaN or infinite.
    """
    where = f"{class_name} at {str(source)!r}"
    for name in ("torch_dtype", "dtype"):
        check_model_dtype(kwargs.get(name))
    if source is not None:
        path_of(source)
    folder = Path(source or "") / (kwargs.get("subfolder") or "")
    if folder.is_file():
        raise FileNotFoundError(f"{where} is a file; name the folder that holds it, with config.json and weights")
    if folder.is_dir():
        _look_through(getattr(loader, "__self__", None), folder, where, types or {}, kwargs.get("variant"))
    kwargs.setdefault("low_cpu_mem_usage", is_accelerate_available())
    if kwargs.pop("use_safetensors", None) is False:
        raise ValueError("use_safetensors is False; weights are read from safetensors files only, so leave it out")
    settings = {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    try:
        model, info = loader(source, **{**kwargs, **settings})
    except (OSError, SafetensorError) as error:
        if _chain_holds(error, SafetensorError):
            raise ValueError(f"{where}: the weight file is damaged, or no safetensors file") from error
        raise FileNotFoundError(f"{where}: no config.json with safetensors weights ({first_line(error)})") from error
    except (TypeError, AttributeError, LookupError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(f"{where} cannot be loaded ({reason_of(error)}); check its config and weights") from error
    copies = model.weight_copies() if isinstance(model, CheckedModel) else {}
    problems = {
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(set(info["unexpected_keys"]) - set(copies)),
        "misshaped": sorted(str(key[0]) if isinstance(key, tuple) else str(key) for key in info["mismatched_keys"]),
        "failed": [str(message).partition("\n")[0] for message in info["error_msgs"]],
    }
    refuse(where, problems)
    if kwargs.get("quantization_config") is None:
        check_finite(model, where)
    return model, info


def _look_through(cls: Any, folder: Path, where: str, types: Mapping[str, Any], variant: str | None) -> None:
    """Compare config and weight file of a local folder, reading headers only."""
    path = folder / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{where}: no config.json with safetensors weights ({path} does not exist)")
    config = read_json(path, "a model's config")
    for name, annotation in types.items():
        if name in config:
            check_value(config[name], annotation, f"{path}: {name}")
    file = weight_file(folder, variant=variant, safe_only=True)
    stored = open_checkpoint(file)
    if not (isinstance(cls, type) and issubclass(cls, ConfigMixin)):  # transformers has names of its own making
        for name, value in stored.items():
            check_dtype(f"{name} of {file}", value, is_float=not name.endswith("position_ids"))
        if hasattr(cls, "config_class"):
            with reading(path, "a model's config"), torch.device("meta"):
                cls(cls.config_class.from_dict(config))
        return
    named = config.get("_class_name", cls.__name__)
    if not isinstance(named, str):
        raise ValueError(f"{path}: _class_name is {plain(named)}; expected {cls.__name__!r}")
    model = build_on_meta(cls, {**config, "_class_name": named}, str(path))
    wanted = model.state_dict()
    copies = {c: o for c, o in getattr(model, "weight_copies", dict)().items() if c in stored}
    check_shapes(where, wanted, stored, {copy: wanted[original] for copy, original in copies.items()})
    for name, value in stored.items():
        check_dtype(f"{name} of {file}", value, wanted[copies.get(name, name)].is_floating_point())
    for copy, original in copies.items():
        if not torch.equal(stored[copy].read(), stored[original].read()):
            raise ValueError(f"{file}: {copy!r} differs from {original!r}, though the config ties them")


def _chain_holds(error: BaseException | None, kind: type[BaseException]) -> bool:
    while error is not None and not isinstance(error, kind):
        error = error.__cause__ or error.__context__
    return error is not None


CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model"
"""Stem of the weight files that diffusers writes."""

_FIXED = {  # options of diffusers' `save_pretrained`, with the only value that the loaders here know
    "safe_serialization": (True, "weights are read from safetensors files only"),
    "push_to_hub": (False, "call push_to_hub on the pipeline"),
    "use_flashpack": (False, "weights are read from safetensors files only"),
    "is_main_process": (True, "call it on one process only"),
    "save_function": (None, "weights are written by safetensors"),
}


def check_save_options(options: Mapping[str, Any], max_shard_size: int | str | None) -> None:
    """Raise `ValueError` for arguments of `save_pretrained` that would write what the loaders cannot read."""
    for name, value in options.items():
        if name not in _FIXED:
            near = difflib.get_close_matches(name, ["max_shard_size", *_FIXED], 1)
            hint = f"; did you mean {near[0]!r}?" if near else "; expected max_shard_size or none"
            raise ValueError(f"save_pretrained got an unknown argument {name!r}{hint}")
        wanted, why = _FIXED[name]
        if value is not wanted:
            raise ValueError(f"save_pretrained cannot take {name}={value!r:.80}: {why}")
    if isinstance(max_shard_size, str):
        fine = re.fullmatch(r"(?=.*[1-9])\d{1,9}(\.\d+)?[KMGT]?B", max_shard_size, re.IGNORECASE) is not None
    else:
        fine = max_shard_size is None or (type(max_shard_size) is int and max_shard_size > 0)
    if not fine:
        raise ValueError(f"max_shard_size is {max_shard_size!r}; expected a number of bytes, or text such as '5GB'")


def save_model(model: torch.nn.Module, folder: str | os.PathLike[str], write: Callable[[Path], None]) -> None:
    """Put what `write` writes for `model` (config and weights) into `folder`: complete, or not at all.

    Raises:
        ValueError: `folder` is a file or holds a model of another class, or weights that no loader would take.
        OSError: a full or read-only disk; the message names the folder.
    """
    kind, folder = type(model).__name__, resolve_link(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is a file; name a folder to save the {kind} in")
    held = _model_in(folder)
    if held not in (None, kind):
        raise ValueError(f"{str(folder)!r} holds a {plain(held)}, which would be lost; save the {kind} elsewhere")
    if has_adapters(model):
        raise ValueError(
            f"the {kind} has adapters; call fuse_lora() to keep their effect, then unload_lora_weights(), and save it then"
        )
    for name, value in model.state_dict().items():
        if value.is_meta:
            raise ValueError(f"{kind}: {name} is on the meta device and has no values; load the weights first")
        if value.layout != torch.strided:
            raise ValueError(f"{kind}: {name} is sparse; call to_dense() on it before saving")
        if hasattr(value, "__tensor_flatten__"):  # made of other tensors: quantised, or a shard
            raise ValueError(
                f"{kind}: {name} is a {type(value).__name__}, of few bits or of one rank; save the plain model"
            )
    check_finite(model, f"{kind}, which is to be saved")
    with filling_folder(folder) as temporary:
        write(temporary)
        written = {file.name for file in temporary.iterdir()}
    for stale in folder.glob(f"{WEIGHTS}*"):  # of the model that was there
        if stale.name not in written and _is_weight_file(stale.name):
            stale.unlink()


def _is_weight_file(name: str) -> bool:
    pattern = rf"{WEIGHTS}(\.\w+)?(-\d{{5}}-of-\d{{5}})?\.safetensors(\.index(\.\w+)?\.json)?"
    return re.fullmatch(pattern, name) is not None


def _model_in(folder: Path) -> str | None:
    """The class of the model whose files would be overwritten; None without one."""
    if (folder / CONFIG).exists():
        try:
            return str(read_json(folder / CONFIG, "a config").get("_class_name", "model of another library"))
        except ValueError:
            return f"damaged {CONFIG}"
    return "weight file" if any(_is_weight_file(file.name) for file in folder.glob(f"{WEIGHTS}*")) else None
