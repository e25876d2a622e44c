"""Measurements that are kept, one JSON file each, and hashes of what they depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import unidiff.decoding
import unidiff.models
from unidiff.errors import read_json
from unidiff.evaluation.report import sources_hash
from unidiff.files import replace_text
from unidiff.pipeline import UniDiffPipeline


@dataclass(frozen=True)
class Cells:
    """A folder of finished measurements, made when the first is saved. The name of a file holds a hash of all that its
    content depends on."""

    folder: Path

    def path(self, name: str, key: Mapping[str, Any]) -> Path:
        """Where a measurement lies."""
        return self.folder / f"{name}-{_hash(key)[:12]}.json"

    def load(self, name: str, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """A finished measurement, or None.

        Raises:
            ValueError: a file that is none.
        """
        path = self.path(name, key)
        if not path.is_file():
            return None
        data = read_json(path, "a kept measurement")
        found, same = data.get("found"), data.get("key") == json.loads(json.dumps(key))
        if not same or not isinstance(found, dict) or data.get("sum") != _hash(found)[:16]:
            raise ValueError(f"{str(path)!r} is not the measurement that its name says; remove it")
        return found

    def measured(self, name: str, key: Mapping[str, Any], measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """What is kept, else what `measure` finds, which is kept from now on."""
        if (kept := self.load(name, key)) is not None:
            return kept
        found = json.loads(json.dumps(measure()))
        data = {"key": key, "found": found, "sum": _hash(found)[:16]}  # the sum: a file that was changed is noticed
        replace_text(self.path(name, key), json.dumps(data, indent=1) + "\n")
        return found


def _hash(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def model_hash(pipe: UniDiffPipeline) -> str:
    """SHA-256 over weights, words and layout of a pipeline, without its sampler settings."""
    digest = hashlib.sha256()
    for part in (pipe.transformer, pipe.image_tokenizer):
        for name, tensor in sorted(part.state_dict().items()):
            digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    how = ("samplers", "num_candidates")
    layout = {name: value for name, value in pipe.settings.to_dict().items() if name not in how}
    config = {name: v for name, v in pipe.transformer.config.items() if not name.startswith("_")}  # not its folder
    words = sorted(pipe.text_tokenizer.get_vocab().items())
    digest.update(json.dumps([layout, config, words], sort_keys=True, default=str).encode())
    return digest.hexdigest()


def code_hash() -> str:
    """SHA-256 over the sampler, its caches and the transformer: measurements of different code are not quite comparable."""
    folders = [Path(str(package.__file__)).parent for package in (unidiff.decoding, unidiff.models)]
    return sources_hash(sorted(path for folder in folders for path in folder.rglob("*.py")))
