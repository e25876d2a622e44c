"""Pipeline folders: read strictly, written whole, replaced only where unidiff wrote all of it. Finding them is `unidiff.hub`."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from unidiff.errors import few, plain, read_json, reading
from unidiff.families.checkpoint.load import load_own
from unidiff.families.layout import RowLayout
from unidiff.files import replacing_folder, resolve_link
from unidiff.hub import ALL_FILES, HUB_OPTIONS, locate
from unidiff.models.trained_on import FILE as TRAINED_ON
from unidiff.models.trained_on import read_trained_on
from unidiff.models.transformer import MaskedTransformer
from unidiff.pipelines.adapters import PipelineAdapters
from unidiff.pipelines.options import check_keywords
from unidiff.pipelines.released import LoadedParts, is_released, load_released_parts
from unidiff.pipelines.settings import PipelineSettings
from unidiff.schema import check_value
from unidiff.tokens import Vocabulary
from unidiff.tokens.image.vq import VQImageTokenizer
from unidiff.tokens.text import TextTokenizer
from unidiff.weights.adapter import ADAPTER_FILES
from unidiff.weights.model import CONFIG, WEIGHTS, check_save_options

VOCABULARY = "vocabulary.json"
INDEX = "model_index.json"
PIPELINE_CLASS = "UniDiffPipeline"
MODELS, WORDS = ("transformer", "image_tokenizer"), "text_tokenizer"
PARTS = (*MODELS, WORDS)
_INDEX_KEYS = {"_class_name", "_diffusers_version", "_name_or_path", "settings", *PARTS}
_SHOWN = 6  # names in a message
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ORIGINS = ("_name_or_path", "name_or_path", "is_local", "local_files_only")


def load_tokenizers(folder: Path) -> tuple[VQImageTokenizer, TextTokenizer]:
    """The tokenizers of a pipeline folder."""
    # Never in half precision: rounded weights move codes, and the transformer knows only those it was trained on.
    images = VQImageTokenizer.from_pretrained(folder / "image_tokenizer")
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


def load_transformer(folder: str | Path, dtype: torch.dtype = torch.float32) -> MaskedTransformer:
    """A `MaskedTransformer` folder in evaluation mode; never looked up on the network."""
    check_transformer(folder)
    return MaskedTransformer.from_pretrained(str(folder), torch_dtype=dtype).eval()


def is_pipeline(folder: Path) -> bool:
    """Whether a folder holds a unidiff pipeline, by the class that its index names."""
    path = folder / INDEX
    if not path.is_file():
        return False
    with reading(path, "an index"):
        return f'"{PIPELINE_CLASS}"' in path.read_text(encoding="utf-8-sig", errors="replace")


def read_settings(folder: Path) -> PipelineSettings:
    """Of the index of a unidiff pipeline; `FileNotFoundError` for none, `ValueError` for one of another class."""
    path = folder / INDEX
    if not path.is_file():
        raise FileNotFoundError(
            f"{str(folder)!r} holds no {INDEX}; name a folder written by save_pretrained or by `unidiff pack`"
        )
    index = read_json(path, "an index of a pipeline")
    if (kind := index.get("_class_name")) != PIPELINE_CLASS:
        raise ValueError(f"{path} describes a {kind}, not a {PIPELINE_CLASS}; load it with its own library")
    try:
        return PipelineSettings.from_dict(index.get("settings") or {})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def forget_origins(folder: Path) -> None:
    """Drop the paths that diffusers and transformers note in configs: a model must not name its maker's machine."""
    for path in sorted([*folder.rglob("*config.json"), folder / INDEX]):
        config = read_json(path, "a config")
        kept = {key: value for key, value in config.items() if key not in _ORIGINS}
        if kept != config:
            path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_target(target: str | Path) -> None:
    """Raise `ValueError` where saving a pipeline to `target` would lose what `save_pretrained` did not write."""
    check_replaceable(target, others_in_pipeline, "pipeline")


def write_folder(target: str | Path, write: Callable[[Path], None]) -> None:
    """Call `write` on an empty folder beside `target`, then put it in place; errors as of `check_target`, and of disks."""
    check_target(target)
    with replacing_folder(target) as temporary:
        write(temporary)
        check_target(target)  # a large model takes minutes to write


def read_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    """A torch dtype from itself or its name; float32 for None."""
    if dtype is None:
        return torch.float32
    if isinstance(dtype, torch.dtype) and dtype in (*_DTYPES.values(), torch.float64):
        return dtype
    if isinstance(dtype, str) and dtype in _DTYPES:
        return _DTYPES[dtype]
    raise ValueError(f"dtype is {dtype!r:.80}; expected one of {', '.join(_DTYPES)}")


def check_replaceable(target: str | Path, others: Callable[[Path], list[str]], what: str) -> None:
    """Raise `ValueError` where replacing `target` would lose something that unidiff did not write as `what`.

    Args:
        others: `others_in_pipeline`, `others_in_model` or `others_in_adapter`. what: for the message, for instance "pipeline".
    """
    place = resolve_link(target)
    if place.exists() and not place.is_dir():
        raise ValueError(f"{str(target)!r} is a file; name a folder to save the {what} in")
    if blocked := next((p for p in place.parents if p.exists() and not p.is_dir()), None):
        raise ValueError(f"{str(target)!r} lies under {str(blocked)!r}, which is a file; name another folder")
    if not place.is_dir():
        return
    if lost := others(place):
        says = f"is not empty and holds no {what}" if lost == entries(place) else f"holds more than a {what}"
        raise ValueError(
            f"{str(target)!r} {says} that unidiff wrote; {few(lost, _SHOWN)} would be lost, so save to a new folder"
        )


def others_in_pipeline(folder: Path) -> list[str]:
    """Entries of a folder that `UniDiffPipeline.save_pretrained` did not write; all where it holds no pipeline."""
    try:
        read_settings(folder)
        known = set(read_json(folder / INDEX)) <= _INDEX_KEYS
    except (ValueError, OSError):
        known = False
    if not known:
        return entries(folder)
    found = []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink() and path.name in PARTS:
            inside = _others_in_words(path) if path.name == WORDS else others_in_model(path, exported=False)
            found += [f"{path.name}/{name}" for name in inside]
        elif path.name != INDEX or path.is_symlink():
            found.append(_shown(path))
    return found


def others_in_model(folder: Path, exported: bool = True) -> list[str]:
    """Entries of a folder that no `save_pretrained` of a model wrote (nor training, with `exported`); all without a model."""
    try:
        with reading(folder, "a model"):
            load_own(folder, device="meta")  # names and shapes of the weights are those that the config asks for
        known = {CONFIG, *(_notes_of_a_run(folder) if exported else ())}
        single, index = f"{WEIGHTS}.safetensors", folder / f"{WEIGHTS}.safetensors.index.json"
        if (folder / single).is_file():
            known.add(single)
        else:
            known |= {index.name, *read_json(index)["weight_map"].values()}
    except (ValueError, OSError):
        return entries(folder)
    return _unknown(folder, known)


def others_in_adapter(folder: Path) -> list[str]:
    """Entries of a folder that training did not write as an adapter; all where it holds none."""
    if not all((folder / name).is_file() for name in ADAPTER_FILES):
        return entries(folder)
    return _unknown(folder, set(ADAPTER_FILES))


def entries(folder: Path) -> list[str]:
    """Names of everything in a folder, hidden files too; those of folders end with a slash."""
    return [_shown(path) for path in sorted(folder.iterdir())]


def _notes_of_a_run(folder: Path) -> set[str]:
    found = set()
    with suppress(ValueError, OSError):
        Vocabulary.from_dict(read_json(folder / VOCABULARY))
        found.add(VOCABULARY)
    with suppress(ValueError, OSError):
        read_trained_on(folder)
        found.add(TRAINED_ON)
    return found


def _others_in_words(folder: Path) -> list[str]:
    try:
        words = TextTokenizer.from_pretrained(folder).tokenizer
    except (ValueError, OSError):
        return entries(folder)
    known = {"tokenizer.json", "tokenizer_config.json"} | ({"chat_template.jinja"} if words.chat_template else set())
    if not words.is_fast:
        known |= {"added_tokens.json", *words.vocab_files_names.values()}
    return _unknown(folder, known)


def _unknown(folder: Path, known: set[str]) -> list[str]:
    fine = lambda path: path.name in known and path.is_file() and not path.is_symlink()  # noqa: E731
    return [_shown(path) for path in sorted(folder.iterdir()) if not fine(path)]


def _shown(path: Path) -> str:
    return plain(path.name) + ("/" if path.is_dir() and not path.is_symlink() else "")


class PipelineFolder(PipelineAdapters, DiffusionPipeline):
    """Gives a pipeline its folders: loading, saving, and sharing the parts of a loaded one."""

    layout: RowLayout

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
        return cls(**{**parts, **changes})

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        name: str | Path,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        subfolder: str | None = None,
        image_tokenizer: str | Path | None = None,
        text_tokenizer: str | Path | None = None,
        **hub_options: Any,
    ) -> Self:
        """Load a folder, a hub model `owner/name`, or an embedded model (`"emoji"`), of any family, strictly.

        Args:
            name: where.
            dtype: of the weights in memory; `torch_dtype` is the same. Left out: float32, or the checkpoint's own for a
                released family.
            subfolder: below `name`, for instance Muddit's `512`.
            image_tokenizer, text_tokenizer: where they are, for a released family that comes without.
            hub_options: revision, cache_dir, token, local_files_only, force_download.

        Raises:
            FileNotFoundError: nothing there, or a part is missing.
            ValueError: an unknown family, unknown settings, or weights that are missing, unexpected, misshaped or NaN.
            TypeError: an unknown argument.
        """
        check_keywords(cls.from_pretrained, hub_options, HUB_OPTIONS, cls)
        if dtype is not None and torch_dtype is not None and read_dtype(dtype) != read_dtype(torch_dtype):
            raise ValueError(f"dtype is {dtype} and torch_dtype {torch_dtype}, which mean the same; give one of them")
        chosen = dtype if torch_dtype is None else torch_dtype
        check_value(subfolder, str | None, "subfolder")
        folder = locate(name, ALL_FILES, **hub_options) / (subfolder or "")
        if not is_pipeline(folder) and is_released(folder):
            own = None if chosen is None else read_dtype(chosen)
            parts = load_released_parts(folder, own, image_tokenizer, text_tokenizer)
        elif image_tokenizer is not None or text_tokenizer is not None:
            raise ValueError(f"{str(folder)!r} brings its own tokenizers; leave image_tokenizer and text_tokenizer out")
        else:
            settings, transformer = read_settings(folder), load_transformer(folder / "transformer", read_dtype(chosen))
            parts = LoadedParts(transformer, *load_tokenizers(folder), settings)
        try:
            return cls(*parts)  # type: ignore[call-arg]  # as of `UniDiffPipeline`
        except ValueError as error:
            raise ValueError(f"the parts in {str(folder)!r} do not fit together: {error}") from error

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, max_shard_size: int | str | None = None, **options: Any
    ) -> None:
        """Write the whole folder (safetensors, in the dtype of the weights), or nothing.

        A pipeline that was saved there before is replaced; a link is written through.

        Args:
            max_shard_size: bytes, or text such as "5GB"; larger weights become several files. None: 10 GB.
            options: diffusers' others, of which only the defaults are taken.

        Raises:
            ValueError: a released family; a folder that holds anything that is no part of a pipeline of ours, an argument
                that `from_pretrained` could not follow, or weights that hold NaN or have no values. OSError: a full disk.
        """
        check_save_options(options, max_shard_size)
        if not hasattr(self, "settings"):
            raise ValueError(
                f"{self.layout.family} is not saved as a pipeline; `unidiff convert` writes its checkpoint in both layouts"
            )

        def write(folder: Path) -> None:
            DiffusionPipeline.save_pretrained(self, str(folder), max_shard_size=max_shard_size)
            forget_origins(folder)

        write_folder(save_directory, write)
