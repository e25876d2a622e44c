"""A trained dual model as a folder in D-DiT's layout, which `UniDiffPipeline.from_pretrained` reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from unidiff.errors import read_json
from unidiff.families.checkpoint.convert import save_shards
from unidiff.families.checkpoint.load import load_own
from unidiff.families.ddit import CLASS, DDIT, KEYS
from unidiff.families.ddit.rows import SETTINGS, DualTexts, to_data
from unidiff.files import replacing_folder
from unidiff.models.trained_on import TrainedOn, read_trained_on
from unidiff.pipelines.pack import tasks_taught
from unidiff.tokens.image.vq import VQImageTokenizer
from unidiff.tokens.text import TextTokenizer
from unidiff.train.dual import scaled_vectors
from unidiff.weights.model import WEIGHTS

INDEX, PIPELINE = "model_index.json", "DualDiffSD3Pipeline"


def pack_dual(model: str | Path, image_tokenizer: str | Path, text_tokenizer: str | Path, out: str | Path) -> None:
    """Write one folder: `transformer`, `text_encoder`, `tokenizer`, `image_tokenizer`, `scheduler`, and `dual.json`.

    Args:
        model: folder of a `DualTransformer` that training wrote.
        image_tokenizer, text_tokenizer: folders of those that encoded its data.
        out: replaced where it holds such a folder, otherwise new.

    Raises:
        FileNotFoundError: a folder is missing. OSError: a full or read-only disk.
        ValueError: parts that do not fit together, or an `out` that holds something else.
    """
    check_dual_target(out)
    network, trained = load_own(Path(model)), read_trained_on(model)
    if not isinstance(trained, TrainedOn):
        raise ValueError(f"{str(model)!r} does not say what it was trained on; train it with unidiff train")
    images, texts = VQImageTokenizer.from_pretrained(image_tokenizer), TextTokenizer.from_pretrained(text_tokenizer)
    if texts.size + 1 != network.config.vocab_size or images.codebook_size != network.config.codebook_size:
        raise ValueError("the tokenizers have other sizes than the model; give those that encoded its data")
    caption, question, answer = ((texts.special(name),) for name in ("caption", "question", "answer"))
    settings = DualTexts(
        trained.text_length,
        trained.text_length,
        caption,
        question,
        answer,
        hidden=True,
        trained=_tasks(trained),
        scale=scaled_vectors(images)[1],
    )
    with replacing_folder(out) as folder:
        _write(folder / "transformer", _config(network, texts.special("eos")), DDIT.export(network.network))
        network.released_encoder().save_pretrained(folder / "text_encoder")
        texts.save_pretrained(folder / "tokenizer")
        images.save_pretrained(folder / "image_tokenizer")
        FlowMatchEulerDiscreteScheduler(shift=1.0).save_pretrained(folder / "scheduler")
        (folder / SETTINGS).write_text(json.dumps(to_data(settings), indent=1) + "\n", encoding="utf-8")
        (folder / INDEX).write_text(json.dumps({"_class_name": PIPELINE}, indent=1) + "\n", encoding="utf-8")


def check_dual_target(out: str | Path) -> None:
    """Raise `ValueError` where packing to `out` would lose what `pack_dual` did not write."""
    place = Path(out)
    if not place.exists():
        return
    ours = {"transformer", "text_encoder", "tokenizer", "image_tokenizer", "scheduler", SETTINGS, INDEX}
    if not place.is_dir() or {path.name for path in place.iterdir()} - ours:
        raise ValueError(f"{str(out)!r} holds something else than a dual model's pipeline; name a new folder")
    if (place / INDEX).exists() and read_json(place / INDEX).get("_class_name") != PIPELINE:
        raise ValueError(f"{str(out)!r} holds another pipeline; name a new folder")


def _tasks(trained: TrainedOn) -> tuple[str, ...]:
    return tuple(task for task in tasks_taught(trained.tasks) if task != "inpaint")


def _config(model: Any, end: int) -> dict[str, Any]:
    """D-DiT's config of a trained network."""
    names = {kind.ours: key for key, kind in KEYS.used.items() if hasattr(kind, "ours")}
    own = {names[name]: value for name, value in dict(model.network.config).items() if name in names}
    return {"_class_name": CLASS, **own, "eos_token_id": end}


def _write(folder: Path, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_shards(weights, folder, WEIGHTS)
