"""Pipeline folders: read strictly, written whole, replaced only where unidiff wrote all of it. Finding them is `unidiff.hub`."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.quantizers import PipelineQuantizationConfig

from unidiff.errors import read_json
from unidiff.families.checkpoint.load import find_beside
from unidiff.families.checkpoint.small_memory import offload
from unidiff.families.layout import RowLayout
from unidiff.files import resolve_link
from unidiff.hub import HUB_OPTIONS, RELEASED, locate
from unidiff.models.parallel import spread
from unidiff.models.transformer import MaskedTransformer
from unidiff.pipelines.adapters import PipelineAdapters
from unidiff.pipelines.card import CARD, ModelFacts, Origin, card_of, read_origin, send_folder, written_by_a_person
from unidiff.pipelines.options import check_keywords
from unidiff.pipelines.owned import CODE, CODE_TEXT, INDEX, PIPELINE_CLASS, is_pipeline, read_settings, write_folder
from unidiff.pipelines.released import LoadedParts, is_released, load_released_parts
from unidiff.process import pick_device
from unidiff.schedulers import load_scheduler
from unidiff.schema import check_value
from unidiff.tokens.image.vq import VQImageTokenizer
from unidiff.tokens.text import TextTokenizer
from unidiff.weights.files import stored_dtype, with_variant
from unidiff.weights.model import check_save_options

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PARTS = ("transformer", "image_tokenizer")  # that a device map places
_ORIGINS = ("_name_or_path", "name_or_path", "is_local", "local_files_only")


def load_tokenizers(folder: Path, variant: str | None = None) -> tuple[VQImageTokenizer, TextTokenizer]:
    """The tokenizers of a pipeline folder."""
    # Never in half precision: rounded weights move codes, and the transformer knows only those it was trained on.
    images = VQImageTokenizer.from_pretrained(folder / "image_tokenizer", variant=variant)
    if images.draws:
        find_beside(images.model, folder / "image_tokenizer")
    return images, TextTokenizer.from_pretrained(folder / "text_tokenizer")


def check_transformer(folder: str | Path) -> None:
    """Raise FileNotFoundError where no model lies."""
    folder = Path(folder)
    if (folder / "config.json").is_file():
        return
    inside = [name for name in ("model", "transformer") if (folder / name / "config.json").is_file()]
    hint = f"did you mean {str(folder / inside[0])!r}?" if inside else "name a folder with a saved MaskedTransformer"
    fault = "holds no config.json" if folder.exists() else "does not exist"
    raise FileNotFoundError(f"{str(folder)!r} {fault}; {hint}")


def load_transformer(folder: str | Path, dtype: torch.dtype = torch.float32, **options: Any) -> MaskedTransformer:
    """A `MaskedTransformer` folder in evaluation mode; never looked up on the network. `options` of `ModelMixin`."""
    check_transformer(folder)
    return MaskedTransformer.from_pretrained(str(folder), torch_dtype=dtype, **options).eval()


def forget_origins(folder: Path) -> None:
    """Drop the paths that diffusers and transformers note in configs: a model must not name its maker's machine."""
    for path in sorted([*folder.rglob("*config.json"), folder / INDEX]):
        config = read_json(path, "a config")
        kept = {key: value for key, value in config.items() if key not in _ORIGINS}
        if kept != config:
            path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    """A torch dtype from itself or its name; float32 for None."""
    if dtype is None:
        return torch.float32
    if isinstance(dtype, torch.dtype) and dtype in (*_DTYPES.values(), torch.float64):
        return dtype
    if isinstance(dtype, str) and dtype in _DTYPES:
        return _DTYPES[dtype]
    raise ValueError(f"dtype is {dtype!r:.80}; expected one of {', '.join(_DTYPES)}")


class PipelineFolder(PipelineAdapters, DiffusionPipeline):
    """Gives a pipeline its folders: loading, saving, and sharing the parts of a loaded one."""

    _optional_components = ["scheduler"]  # noqa: RUF012 (as diffusers declares it)
    layout: RowLayout
    origin = Origin()

    @classmethod
    def from_pipe(cls, pipeline: Any, **changes: Any) -> Self:
        """A new pipeline with the parts of another one of this class, which share their weights.

        Args:
            changes: parts or settings to take instead, by their name in `components`.

        Raises:
            ValueError: a pipeline of another class, or a part that does not fit. TypeError: an unknown name.
        """
        if not isinstance(pipeline, cls):
            raise ValueError(f"from_pipe got a {type(pipeline).__name__}; expected a {cls.__name__}")
        parts = pipeline.components
        check_keywords(cls.from_pipe, changes, parts, cls)
        pipe = cls(**{**parts, **changes})
        pipe.origin = pipeline.origin
        return pipe

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        name: str | Path,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        subfolder: str | None = None,
        transformer: Any = None,
        image_tokenizer: Any = None,
        text_tokenizer: Any = None,
        scheduler: Any = None,
        variant: str | None = None,
        device_map: str | Mapping[str, Any] | torch.device | None = None,
        max_memory: Mapping[int | str, int | str] | None = None,
        offload_folder: str | Path | None = None,
        quantization_config: Any = None,
        low_cpu_mem_usage: bool | None = None,
        use_safetensors: bool | None = None,
        tp_plan: str | None = None,
        **hub_options: Any,
    ) -> Self:
        """Load a folder, a hub model `owner/name`, or an embedded model (`"emoji"`, `"faces"`), of any family, strictly.

        Args:
            name: where.
            dtype: of the weights in memory; `torch_dtype` is the same. Left out: float32, or the checkpoint's own for a
                released family; "auto": the checkpoint's own. Image tokenizers stay in float32, as their codes would move.
            subfolder: below `name`, for instance Muddit's `512`.
            transformer, image_tokenizer, text_tokenizer, scheduler: a part to take instead of reading it; of a released family
                that comes without tokenizers also where they are.
            variant: of the weight files, such as "fp16".
            device_map: a device for everything; a device for each part, `{"transformer": "cuda:0", "image_tokenizer": "cuda:1"}`
                (a part without one stays on the CPU); or "auto", "balanced" or a mapping of the transformer's modules by
                accelerate, which keeps in host memory or on disk what one accelerator does not hold.
            max_memory, offload_folder: of such a map: bytes by device, and where to put what goes to disk.
            quantization_config: of diffusers, for the transformer; a `PipelineQuantizationConfig` names it "transformer".
            low_cpu_mem_usage: as in diffusers. use_safetensors: nothing else is read.
            tp_plan: "auto" spreads the transformer over the processes that `torchrun` started, see `spread`.
            hub_options: revision, cache_dir, token, local_files_only, force_download.

        Raises:
            FileNotFoundError: nothing there, or a part is missing.
            ValueError: an unknown family, unknown settings, or weights that are missing, unexpected, misshaped or NaN.
            TypeError: an unknown argument.
        """
        check_keywords(cls.from_pretrained, hub_options, HUB_OPTIONS, cls)
        dtypes = [None if kind == "auto" else read_dtype(kind) for kind in (dtype, torch_dtype) if kind is not None]
        if len(set(dtypes)) > 1:
            raise ValueError(f"dtype is {dtype} and torch_dtype {torch_dtype}, which mean the same; give one of them")
        if use_safetensors is False:
            raise ValueError("use_safetensors is False; weights are read from safetensors files only, so leave it out")
        check_value(subfolder, str | None, "subfolder")
        check_value(tp_plan, Literal["auto"] | None, "tp_plan")
        folder = locate(name, RELEASED, **hub_options) / (subfolder or "")
        placed = {"device_map": device_map, "max_memory": max_memory, "offload_folder": offload_folder}
        by_part = _by_part(device_map)
        placed = placed if _is_map(device_map) and not by_part else {}
        asked = {"quantization_config": _of_transformer(quantization_config), "low_cpu_mem_usage": low_cpu_mem_usage}
        how = {option: value for option, value in {**placed, **asked, "variant": variant}.items() if value is not None}
        if not is_pipeline(folder) and is_released(folder):
            if how or transformer is not None:
                word = next(iter(how), "transformer")
                raise ValueError(
                    f"{word} goes with pipelines that unidiff saved, not with {str(folder)!r}; leave it out"
                )
            parts = load_released_parts(folder, dtypes[0] if dtypes else None, image_tokenizer, text_tokenizer)
        else:
            settings = read_settings(folder)
            for part, given in (("image_tokenizer", image_tokenizer), ("text_tokenizer", text_tokenizer)):
                if isinstance(given, str | Path):
                    raise ValueError(f"{str(folder)!r} brings its own {part}; leave it out, or give a loaded one")
            if transformer is None:
                own = dtypes[0] if dtypes else torch.float32
                place = folder / "transformer"
                check_transformer(place)
                transformer = load_transformer(place, own or stored_dtype(place, variant), **how)
            images, texts = load_tokenizers(folder, variant)
            parts = LoadedParts(transformer, image_tokenizer or images, text_tokenizer or texts, settings)
            scheduler = scheduler or load_scheduler(folder)
        try:
            pipe = cls(*parts, scheduler=scheduler)  # type: ignore[call-arg]  # as of `UniDiffPipeline`
        except ValueError as error:
            raise ValueError(f"the parts in {str(folder)!r} do not fit together: {error}") from error
        pipe.origin = read_origin(folder)
        if tp_plan is not None:
            return pipe.to(spread(pipe.transformer).device)
        if by_part:
            return _place(pipe, by_part)
        if placed:
            check_spread(pipe.transformer)
            pipe.images.to(pipe._execution_device)
        return pipe if device_map is None or placed else pipe.to(device_map)

    @property
    def dtype(self) -> torch.dtype:
        """Of the transformer; image tokenizers stay in float32."""
        return self.transformer.dtype

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """Keep the linear layers of all blocks in host memory, each on the device while it computes; see `offload`.

        Args:
            gpu_id: number of the accelerator, where `device` says none.

        Raises:
            ImportError: accelerate is not installed. ValueError: no accelerator, or weights that are not on the CPU.
        """
        place = torch.device(device or pick_device("auto"))
        if place.type == "cpu" and device is None:
            raise ValueError("sequential offloading needs an accelerator, and there is none; leave it out")
        place = torch.device(place.type, gpu_id) if gpu_id is not None else place
        offload(self.transformer, place)
        for part in (self.image_tokenizer, *self.layout.modules.values()):
            if part is not None:
                part.to(place)

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        max_shard_size: int | str | None = None,
        variant: str | None = None,
        facts: ModelFacts | None = None,
        **options: Any,
    ) -> None:
        """Write the whole folder (safetensors, in the dtype of the weights, and a model card), or nothing.

        A pipeline that was saved there before is replaced; a link is written through. A `README.md` that a person wrote or
        changed stays.

        Args:
            max_shard_size: bytes, or text such as "5GB"; larger weights become several files. None: 10 GB.
            variant: a word in the names of the weight files, such as "fp16", to be named again when they are loaded.
            facts: what the card says besides what the pipeline knows. Licences that it does not state are those on the card of
                the model that the pipeline was loaded from.
            options: diffusers' others, of which only the defaults are taken.

        Raises:
            ValueError: a released family; a folder that holds anything that is no part of a pipeline of ours, an argument
                that `from_pretrained` could not follow, or weights that hold NaN or have no values. OSError: a full disk.
        """
        check_save_options(options, max_shard_size)
        with_variant("", variant)
        if not hasattr(self, "settings"):
            raise ValueError(
                f"{self.layout.family} is not saved as a pipeline; `unidiff convert` writes its checkpoint in both layouts"
            )
        theirs = written_by_a_person(resolve_link(save_directory) / CARD)

        def write(folder: Path) -> None:
            DiffusionPipeline.save_pretrained(self, str(folder), max_shard_size=max_shard_size, variant=variant)
            forget_origins(folder)
            index = read_json(folder / INDEX)
            (folder / INDEX).write_text(
                json.dumps({**index, "_class_name": [CODE.stem, PIPELINE_CLASS]}, indent=2) + "\n"
            )
            (folder / CODE).write_text(CODE_TEXT, encoding="utf-8")
            (folder / CARD).write_bytes(card_of(self, self.origin.completed(facts)) if theirs is None else theirs)

        write_folder(save_directory, write)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        facts: ModelFacts | None = None,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        endpoint: str | None = None,
        **options: Any,
    ) -> str:
        """Save the pipeline and send it to the hub; a `README.md` that a person wrote there stays. Returns the commit's address.

        Args:
            repo_id: "owner/name"; made where it does not exist.
            endpoint: of another hub; None for `HF_ENDPOINT`, or huggingface.co.
            options: of `save_pretrained`.
        """
        facts = facts or ModelFacts(repo_id)
        with tempfile.TemporaryDirectory() as place:
            self.save_pretrained(Path(place) / "model", facts=facts, **options)
            send = {"commit_message": commit_message, "revision": revision, "create_pr": create_pr}
            return send_folder(Path(place) / "model", repo_id, endpoint, token, private, **send)


def _by_part(device_map: Any) -> dict[str, torch.device]:
    """Devices by part of the pipeline; empty for what says no part. `ValueError` for parts beside modules, or no devices."""
    named = device_map if isinstance(device_map, Mapping) and set(_PARTS) & set(device_map) else {}
    if unknown := sorted(set(named) - set(_PARTS)):
        raise ValueError(
            f"device_map names {unknown[0]!r} beside parts of the pipeline; expected some of {list(_PARTS)}"
        )
    try:
        return {name: torch.device(place) for name, place in named.items()}
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device_map is {dict(named)}; expected a device for each part, such as 'cuda:1'") from error


def _place(pipe: Any, places: Mapping[str, torch.device]) -> Any:
    """Put parts on their devices, in place. As in diffusers `pipe.to` is refused then, and `reset_device_map` undoes it."""
    parts = {"transformer": pipe.transformer, "image_tokenizer": pipe.images}
    if missing := [name for name in places if parts[name] is None]:
        raise ValueError(f"device_map names {missing[0]!r}, which this pipeline does not have; leave it out")
    for name, place in places.items():
        parts[name].to(place)
    for module in pipe.layout.modules.values():
        module.to(pipe.transformer.device, pipe.transformer.dtype)
    pipe.hf_device_map = {name: str(places.get(name, "cpu")) for name, part in parts.items() if part is not None}
    return pipe


def _is_map(device_map: Any) -> bool:
    """Whether accelerate is to place the parts of the transformer; otherwise it is one device, or None."""
    return isinstance(device_map, Mapping) or device_map in ("auto", "balanced", "balanced_low_0", "sequential")


def check_spread(transformer: Any) -> None:
    """Raise `ValueError` where accelerate put a transformer on several accelerators: what passes share stays on one."""
    places = {
        str(torch.device(p)) for p in getattr(transformer, "hf_device_map", {}).values() if p not in ("cpu", "disk")
    }
    if len(places) > 1:
        raise ValueError(
            f"device_map spreads the transformer over {', '.join(sorted(places))}; give one accelerator (others, 'cpu' and "
            "'disk' keep what it does not hold), or tp_plan='auto' under torchrun for several"
        )


def _of_transformer(config: Any) -> Any:
    """The part of a `PipelineQuantizationConfig` for the transformer; another config is for it as it is."""
    if not isinstance(config, PipelineQuantizationConfig):
        return config
    return config._resolve_quant_config(is_diffusers=True, module_name="transformer")
