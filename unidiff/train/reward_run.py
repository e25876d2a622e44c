"""A run of reward tuning: prompts and a reward of pictures, steps with checkpoints, and the tuned pipeline."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from unidiff.decoding.cache.config import choose_cache
from unidiff.errors import check_regular, first_line, reading
from unidiff.families.layout import TaskInputs
from unidiff.files import locked
from unidiff.pipeline import UniDiffPipeline
from unidiff.pipelines.card import ModelFacts
from unidiff.pipelines.options import DecodeOptions
from unidiff.schema import check_same
from unidiff.tokens import TokenBatch
from unidiff.train.build import add_adapters, export_adapter, merge_adapters
from unidiff.train.config import LoraConfig
from unidiff.train.reward import RewardConfig, RewardTuner, keep_share
from unidiff.train.run.checkpoint import RunCheckpoint, load_checkpoint
from unidiff.train.run.logs import Progress, RunLog, take_steps
from unidiff.train.run.resume import fitting

PictureReward = Callable[[list[str], Tensor], Tensor]
"""Texts and float pictures `[B, 3, H, W]` in [0, 1] to a number each."""
Prompts = Callable[[int], str]
"""By number, so that a position needs no state."""


def tune_pipeline(
    pipe: UniDiffPipeline,
    output: Path,
    reward: PictureReward,
    prompts: Prompts,
    run: RewardConfig,
    about: Mapping[str, str],
) -> None:
    """Tune `pipe` (in place) for text-to-image, or go on where the run in `output` stopped, and save it there.

    Where `about` differs it is another run. Raises ValueError for settings that do not fit, a folder of another run or in
    use, or a reward that fails.
    """
    asked = DecodeOptions(steps=run.passes, guidance_scale=run.guidance_scale)
    sampler = asked.apply(pipe.settings.sampler("text_to_image"))
    settings = replace(pipe.settings, samplers={**pipe.settings.samplers, "text_to_image": sampler})
    pipe = UniDiffPipeline(pipe.transformer, pipe.image_tokenizer, pipe.text_tokenizer, settings)
    tuning = _Run(pipe, reward, prompts, run, about)
    with locked(output, "reward tuning"):
        if (found := load_checkpoint(output / "checkpoints", "about", run.fallback, "--fallback")) is not None:
            tuning.restore(found, output)
            print(f"resumed at step {tuning.step} from {output / 'checkpoints'}", flush=True)
        log = RunLog(output, tuning.step, run.track, about=about)
        tokens = run.prompts_per_step * run.group * (settings.text_length + settings.grid[0] * settings.grid[1])
        progress = Progress(run.steps, tuning.step, tokens, 1, True)
        take_steps(tuning, run.steps, output, run.checkpoint_every, log, progress)
        if run.lora:
            export_adapter(pipe.transformer, output / "adapter", run.keep)
        merge_adapters(pipe.transformer)
        keep_share(pipe.transformer, tuning.tuner.reference, run.keep)
        changed = {name: value for name, value in asdict(run).items() if value != getattr(RewardConfig(), name)}
        pipe.save_pretrained(output / "pipeline", facts=ModelFacts(training={"reward tuning": True, **changed}))


class _Run:
    """See `unidiff.train.run.logs.SteppedRun`."""

    def __init__(
        self,
        pipe: UniDiffPipeline,
        reward: PictureReward,
        prompts: Prompts,
        run: RewardConfig,
        about: Mapping[str, str],
    ) -> None:
        self.pipe, self.reward, self.prompts, self.run, self.about = pipe, reward, prompts, run, about
        self.texts: list[str] = []  # of the step
        model, sampler = pipe.transformer, pipe.settings.sampler("text_to_image")
        torch.manual_seed(run.seed)  # adapters are drawn
        add_adapters(model, LoraConfig(rank=run.lora, alpha=2.0 * run.lora))
        batch, _ = prompt_rows(pipe, [prompts(0)] * min(run.rows, run.prompts_per_step * run.group))
        cache = choose_cache(run.cache, None, batch, sampler, model).config
        assert cache is not None
        self.tuner = RewardTuner(model, pipe.settings.vocabulary, sampler, self._score, run, cache)

    @property
    def step(self) -> int:
        return self.tuner.steps

    def advance(self, log: RunLog, progress: Progress) -> None:
        first, count = self.step * self.run.prompts_per_step, self.run.prompts_per_step
        self.texts = [self.prompts(first + number) for number in range(count)]
        report = self.tuner.step(*prompt_rows(self.pipe, self.texts))
        log.write(self.step, "reward", asdict(report))
        progress.step(self.step, f"reward {report.reward:.3f}  divergence {report.divergence:.4f}")

    def checkpoint(self) -> RunCheckpoint:
        """All but the reference, which is the starting model and is built again."""
        state, model = {"step": self.step, "about": dict(self.about)}, self.tuner.model
        return RunCheckpoint(dict(model.state_dict()), {}, self.tuner.optimisers.state(), state)

    def restore(self, found: RunCheckpoint, folder: Path) -> None:
        """Go on from a checkpoint in the run's `folder`. Raises ValueError for one of other settings or another model."""
        check_same(found.state.get("about", {}), self.about, folder, "output folder")
        with fitting(folder, "output folder"):
            self.tuner.model.load_state_dict(found.model)
            self.tuner.optimisers.load_state(found.optimiser)
        self.tuner.steps = found.state["step"]

    def _score(self, finished: TokenBatch) -> Tensor:
        settings = self.pipe.settings
        codes = finished.ids[:, settings.text_length :].unflatten(1, settings.grid) - settings.vocabulary.image[0]
        repeated = [text for text in self.texts for _ in range(self.run.group)]
        return self.reward(repeated, self.pipe.images.decode(codes).cpu())


def prompt_rows(pipe: UniDiffPipeline, texts: list[str]) -> tuple[TokenBatch, Tensor | None]:
    """Rows `[P, L]` with given text and a hidden picture, and what guidance hides of them, on the model's device."""
    request = pipe.layout.request("text_to_image", TaskInputs(len(texts), texts)).repeated(1, pipe.transformer.device)
    return request.batch, request.condition(request.config.guidance.hide)


def check_places(output: Path, model: str) -> None:
    """Raise ValueError for an output that is a file, or where it and the model's folder lie inside each other."""
    place, base = Path(os.path.realpath(output)), Path(os.path.realpath(model))
    if place.exists() and not place.is_dir():
        raise ValueError(f"{str(output)!r} is a file or a device; name a folder to write to")
    if base.is_dir() and (base.is_relative_to(place) or place.is_relative_to(base)):
        raise ValueError(
            f"OUTPUT {str(output)!r} and MODEL {model!r} lie inside each other; name another output folder"
        )


def prompts_of(path: Path) -> Prompts:
    """The lines of a text file, again and again."""
    check_regular(path)
    with reading(path, "prompts (a text in UTF-8, one prompt a line)"):
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path} holds no prompts")
    return lambda number: lines[number % len(lines)]


def reward_of(place: str) -> PictureReward:
    """The function named MODULE:FUNCTION, looked for in the working folder too; what goes wrong in it is a ValueError."""
    module, _, name = place.partition(":")
    if not name:
        raise ValueError(f"--reward is {place!r}; expected 'oracle' or MODULE:FUNCTION")
    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever that module does
        raise ValueError(f"--reward {place!r} cannot be imported ({type(error).__name__}: {error})") from error
    if not callable(function):
        raise ValueError(f"--reward {place!r} is no function but {type(function).__name__}")

    def checked(texts: list[str], pictures: Tensor) -> Tensor:
        try:
            return torch.as_tensor(function(texts, pictures))
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            raise ValueError(
                f"the reward {place!r} failed in {where.filename} line {where.lineno} "
                f"({type(error).__name__}: {first_line(error)})"
            ) from error

    return checked
