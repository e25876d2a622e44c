"""A run from settings to a pipeline: the tokenizers that its data names, the training, and how the new model is decoded best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from unidiff.decoding import Guidance, SamplerConfig
from unidiff.files import write_json
from unidiff.mirror import local_folder, local_model
from unidiff.pipeline import UniDiffPipeline
from unidiff.pipelines.owned import check_target
from unidiff.pipelines.pack import pack_pipeline
from unidiff.train.config import TokenizerConfig, TrainConfig
from unidiff.train.data.datasets import noted_tokenizers, open_sources
from unidiff.train.data.source import TokenSource
from unidiff.train.dual_pipeline import check_dual_target, pack_dual
from unidiff.train.trainer import train

PIPELINE, DECODING = "pipeline", "decoding.json"
TEMPERATURES, CHOICES, SCALES = (0.7, 1.0), (1.0, 4.0), (1.0, 2.0, 4.0)
"""Temperatures of the token draw and of the choice of positions, and scales of guidance, all of which are tried."""


def pretrain(config: TrainConfig, environment: Mapping[str, str]) -> int:
    """A run of `config`, as `unidiff.train.trainer.train` does; with tokenizers, OUTPUT/pipeline is its model at the end.

    Tokenizers that `config` does not name are those that the data was encoded with. The pipeline holds `model-best` where
    there is one, and draws with the settings that `find_decoding` finds on `logging.sweep_rows` held-out rows. The output,
    tokenizers, tables and starting weights may lie in stores, see `unidiff.mirror`.
    """
    named, own, data = noted_tokenizers(config.data.train), config.tokenizer, config.data
    image, text = own.image or named.get("image", ""), own.text or named.get("text", "")
    config = replace(
        config,
        tokenizer=TokenizerConfig(local_model(image), local_model(text)),
        checkpoint=replace(config.checkpoint, init_from=local_model(config.checkpoint.init_from)),
        data=replace(data, train=_table(data.train), validation=_table(data.validation)),
    )
    with local_folder(config.output) as place:
        return _pretrain(replace(config, output=str(place)), environment)


def _table(spec: str) -> str:
    return local_model(spec) if spec.endswith(".safetensors") else spec


def _pretrain(config: TrainConfig, environment: Mapping[str, str]) -> int:
    if not (config.tokenizer.image and config.tokenizer.text):
        return train(config, environment)
    target = Path(config.output) / PIPELINE
    (check_dual_target if config.network == "dual" else check_target)(target)
    return train(config, environment, finish=lambda: _save_pipeline(config, target))


def _save_pipeline(config: TrainConfig, target: Path) -> None:
    best, last = (Path(config.output) / name for name in ("model-best", "model"))
    if config.network == "dual":
        pack_dual(best if best.is_dir() else last, config.tokenizer.image, config.tokenizer.text, target)
        return
    pipe = pack_pipeline(
        best if best.is_dir() else last, config.tokenizer.image, config.tokenizer.text, target,
        dtype=getattr(torch, config.checkpoint.export_dtype),
    )  # fmt: skip
    rows = config.logging.sweep_rows
    if rows and "text_to_image" in pipe.settings.trained:
        train_rows, held_out = open_sources(config)
        pipe = pipe.to(dtype=torch.float32)
        trials = find_decoding(pipe, held_out or train_rows, rows)
        write_json(Path(config.output) / DECODING, [vars(trial) for trial in trials])
        with_decoding(pipe, trials[0]).save_pretrained(target)


@dataclass(frozen=True)
class DecodeTrial:
    """Settings of drawing, and how far the drawings are from real pictures."""

    temperature: float
    choice_temperature: float
    guidance_scale: float
    distance: float  # see `picture_distance`

    def apply(self, sampler: SamplerConfig, guided: bool) -> SamplerConfig:
        """The settings on those of a task."""
        image = replace(sampler.image, temperature=self.temperature, choice_temperature=self.choice_temperature)
        return replace(sampler, image=image, guidance=Guidance(self.guidance_scale) if guided else sampler.guidance)


def find_decoding(pipe: UniDiffPipeline, source: TokenSource, rows: int) -> list[DecodeTrial]:
    """Every combination of `TEMPERATURES`, `CHOICES` and `SCALES`, the best first, by drawing the captions of `rows` rows."""
    found = source.fetch(torch.arange(min(rows, source.rows or rows)))
    captions = [pipe.texts.decode(ids[source.text_prefix :]).strip() for ids in found.captions]
    kept = [n for n, words in enumerate(captions) if words and "<" not in words]
    if not kept:
        return [DecodeTrial(0.7, 1.0, 2.0, float("nan"))]
    real = pipe.images.decode(found.codes[kept].to(pipe.device)).clamp(0, 1).cpu()
    usual, trials = pipe.settings.sampler("text_to_image"), []
    pipe.set_progress_bar_config(disable=True)
    for temperature, choice, scale in product(TEMPERATURES, CHOICES, SCALES):
        trial = DecodeTrial(temperature, choice, scale, 0.0)
        words = [captions[n] for n in kept]
        drawn = pipe.text_to_image(words, sampler=trial.apply(usual, True), generator=0, output_type="pt").images
        trials.append(replace(trial, distance=picture_distance(drawn.float().cpu(), real)))
    return sorted(trials, key=lambda trial: trial.distance)


def with_decoding(pipe: UniDiffPipeline, trial: DecodeTrial) -> UniDiffPipeline:
    """The pipeline that draws, fills and completes pictures with these settings."""
    samplers = {
        task: trial.apply(sampler, task == "text_to_image")
        if task in ("text_to_image", "inpaint", "generate")
        else sampler
        for task, sampler in pipe.settings.samplers.items()
    }
    settings = replace(pipe.settings, samplers=samplers)
    return UniDiffPipeline(pipe.transformer, pipe.images, pipe.texts, settings)


def picture_distance(drawn: Tensor, real: Tensor) -> float:
    """How much two sets of pictures float `[B, 3, H, W]` in [0, 1] differ in what can be told without a judge.

    Of every picture: mean and spread of each colour, and the strength of its edges. The distance is the squared difference of
    the sets' means and of their spreads, in units of the real pictures' spread, summed over the seven. White pictures, noise
    and one picture for all captions are far from real ones.
    """
    a, b = _traits(drawn), _traits(real)  # [B, 7]
    scale = b.std(0, correction=0).clamp(min=1e-3)
    means = (a.mean(0) - b.mean(0)) / scale
    spreads = (a.std(0, correction=0) - b.std(0, correction=0)) / scale
    return float((means.square() + spreads.square()).sum())


def _traits(pictures: Tensor) -> Tensor:
    flat = pictures.flatten(2)  # [B, 3, H * W]
    edges = pictures.diff(dim=2).abs().mean((1, 2, 3)) + pictures.diff(dim=3).abs().mean((1, 2, 3))
    return torch.cat([flat.mean(2), flat.std(2), edges[:, None]], 1)
