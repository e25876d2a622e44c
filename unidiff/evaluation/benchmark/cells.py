"""Measurements that are kept: quality of a decode on many cases, seconds of a few rows, one JSON file each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

import unidiff.decoding
import unidiff.models
from unidiff.decoding import CacheConfig
from unidiff.decoding.stats import DecodeStats
from unidiff.errors import read_json
from unidiff.evaluation.benchmark.settings import QUALITY, Decode, cases_per_part
from unidiff.evaluation.report import Report, sources_hash
from unidiff.files import replacing
from unidiff.pipeline import UniDiffPipeline
from unidiff.pipelines.output import UniDiffOutput
from unidiff.worlds.emoji.cases import CATEGORIES, caption_scenes, inpaint_cases, prompt_cases, question_cases
from unidiff.worlds.emoji.evaluation import profile_of
from unidiff.worlds.emoji.judge import EmojiEval
from unidiff.worlds.emoji.model import Hole, PipelineModel
from unidiff.worlds.emoji.scenes import KINDS, render_batch


@dataclass(frozen=True)
class Cells:
    """A folder of finished measurements. The name of a file holds a hash of all that its content depends on.

    Args:
        folder: made when the first is saved.
    """

    folder: Path

    def path(self, name: str, key: Mapping[str, Any]) -> Path:
        """Where a measurement lies."""
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
        return self.folder / f"{name}-{digest}.json"

    def load(self, name: str, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """A finished measurement, or None.

        Raises:
            ValueError: a file that is none.
        """
        path = self.path(name, key)
        if not path.is_file():
            return None
        data = read_json(path, "a kept measurement")
        found = data.get("found")
        if (
            data.get("key") != json.loads(json.dumps(key))
            or not isinstance(found, dict)
            or data.get("sum") != _sum(found)
        ):
            raise ValueError(f"{str(path)!r} is not the measurement that its name says; remove it")
        return found

    def save(self, name: str, key: Mapping[str, Any], found: Mapping[str, Any]) -> None:
        """Keep a measurement; the file appears complete or not at all."""
        with replacing(self.path(name, key)) as temporary:
            data = {"key": key, "found": found, "sum": _sum(found)}
            temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")

    def measured(self, name: str, key: Mapping[str, Any], measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """What is kept, else what `measure` finds, which is kept from now on."""
        found = self.load(name, key)
        if found is None:
            self.save(name, key, measure())
            found = self.load(name, key)
        assert found is not None
        return found


def _sum(found: Mapping[str, Any]) -> str:
    """Of what was found, so that a file that was changed or damaged is noticed."""
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Call:
    """What is kept of one decode."""

    rows: int
    nfe: int
    seconds: float
    stats: DecodeStats
    cache: CacheConfig | None
    note: str


class Watched:
    """A pipeline whose decodes are counted: hands every call on and notes what it cost."""

    def __init__(self, pipe: UniDiffPipeline) -> None:
        self._pipe = pipe
        self.calls: list[Call] = []

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._pipe, name)
        if name not in QUALITY:
            return found

        def call(*args: Any, **options: Any) -> UniDiffOutput:
            out = found(*args, **options)
            self.calls.append(Call(len(out.texts), out.nfe, out.seconds, out.stats, out.cache, out.cache_note))
            return out

        return call

    def model(self, batch: int, decode: Decode, **options: Any) -> PipelineModel:
        """What EmojiEval asks, decoded in this way, once for each case."""
        return PipelineModel(cast(UniDiffPipeline, self), batch, sampler=decode.config, num_candidates=1, **options)


def measure_quality(
    pipe: UniDiffPipeline, decode: Decode, cache: CacheConfig, seed: int, n: int, batch: int
) -> dict[str, Any]:
    """EmojiEval's report of one task, with outcomes. In float32 it does not depend on the batch."""
    model = Watched(pipe).model(batch, decode, cache=cache)
    report = EmojiEval(model, profile_of(pipe), seed, n).run(["joint" if decode.task == "generate" else decode.task])
    return {"report": report.to_dict(outcomes=True), "code": code_hash()}


def chosen_cache(pipe: UniDiffPipeline, decode: Decode, batch: int, seed: int) -> tuple[CacheConfig, str]:
    """What "auto" takes for a batch of so many rows, and why. Decodes one pass."""
    watched = Watched(pipe)
    ask = requests(pipe, decode.task, batch, seed)
    ask(watched.model(batch, decode, cache="auto", callback_on_step_end=lambda *state: False))
    call = watched.calls[0]
    assert call.cache is not None
    return call.cache, call.note


def measure_seconds(
    pipe: UniDiffPipeline, trials: Mapping[str, tuple[Decode, str | CacheConfig]], rows: int, batch: int, seed: int
) -> dict[str, Any]:
    """Seconds per row of every trial, one after the other on the same rows: from the tokens of a request to those of its
    result, pictures and words not included.

    Args:
        trials: by name, all of one task. rows: how many. batch: rows per decode.
    """
    found, ask = {}, requests(pipe, next(iter(trials.values()))[0].task, rows, seed)
    for name, (decode, cache) in trials.items():
        watched = Watched(pipe)
        ask(watched.model(batch, decode, cache=cache))
        count = sum(call.rows for call in watched.calls)
        stats = [call.stats for call in watched.calls]
        full, partial = (sum(getattr(s, f"{kind}_passes") for s in stats) for kind in ("full", "partial"))
        tokens, layers = sum(s.ffn_tokens for s in stats), pipe.transformer.config.num_layers
        found[name] = {
            "seconds": sum(call.seconds for call in watched.calls) / count,
            "nfe": sum(call.nfe * call.rows for call in watched.calls) / count,
            "flops": sum(s.flops for s in stats) / count,
            "full_passes": full,
            "partial_passes": partial,
            "tokens_per_pass": tokens / layers / max(full + partial, 1),
        }
    return {"trials": found, "code": code_hash()}


def requests(pipe: UniDiffPipeline, task: str, rows: int, seed: int) -> Callable[[PipelineModel], Any]:
    """Rows of a task, its categories and kinds in turn: a function that asks a model for them."""
    profile, seeds = profile_of(pipe), list(range(seed, seed + rows))
    if task == "text_to_image":
        drawn = [prompt_cases(c, cases_per_part(task, rows), seed, profile) for c in CATEGORIES]
        prompts = [case.prompt for turn in zip(*drawn, strict=True) for case in turn][:rows]
        return lambda model: model.text_to_image(prompts, seeds)
    if task == "caption":
        seen = [caption_scenes(kind, cases_per_part(task, rows), seed, profile) for kind in KINDS]
        pictures = render_batch([scene for turn in zip(*seen, strict=True) for scene in turn][:rows], profile)
        return lambda model: model.caption(pictures, seeds)
    if task == "answer":
        asked = question_cases(rows, seed, profile)
        pictures = render_batch([c.scene for c in asked], profile)
        return lambda model: model.answer(pictures, [c.question for c in asked], seeds)
    if task == "generate":
        return lambda model: model.generate(seeds)
    torn = inpaint_cases(rows, seed, profile)
    pictures = render_batch([c.scene for c in torn], profile)
    masks = torch.stack([profile.boxes([c.hole]) for c in torn])
    return lambda model: model.inpaint(pictures, masks, [Hole(c.before, c.name, c.after) for c in torn], seeds)


def model_hash(pipe: UniDiffPipeline) -> str:
    """SHA-256 over weights, words and layout of a pipeline, without its sampler settings."""
    digest = hashlib.sha256()
    for part in (pipe.transformer, pipe.image_tokenizer):
        for name, tensor in sorted(part.state_dict().items()):
            digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    how = ("samplers", "num_candidates")
    layout = {name: value for name, value in pipe.settings.to_dict().items() if name not in how}
    config = {
        name: value for name, value in pipe.transformer.config.items() if not name.startswith("_")
    }  # not its folder
    words = sorted(pipe.text_tokenizer.get_vocab().items())
    digest.update(json.dumps([layout, config, words], sort_keys=True, default=str).encode())
    return digest.hexdigest()


def code_hash() -> str:
    """SHA-256 over the sampler, its caches and the transformer: measurements of different code are not quite comparable."""
    folders = [Path(str(package.__file__)).parent for package in (unidiff.decoding, unidiff.models)]
    return sources_hash(sorted(path for folder in folders for path in folder.rglob("*.py")))


def kept_report(found: Mapping[str, Any]) -> Report:
    """The report inside of what `measure_quality` found."""
    return Report.from_dict(found["report"])
