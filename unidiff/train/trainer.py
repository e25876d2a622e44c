"""A run from settings to an exported model: build, resume, loop, validate, save."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from unidiff.config import dump_config
from unidiff.files import replacing_folder
from unidiff.models.transformer import MaskedTransformer
from unidiff.train.build import build_model, pick_device
from unidiff.train.checkpoint import (
    Checkpoint,
    latest_name,
    load_checkpoint,
    save_checkpoint,
    write_atomic,
)
from unidiff.train.config import TrainConfig, check_config
from unidiff.train.ema import EMA
from unidiff.train.logs import Progress, RunLog, TaskMeter
from unidiff.train.optim import Optimisers, learning_rate_factor
from unidiff.train.signals import StopOnSignals
from unidiff.train.source import TokenSource
from unidiff.train.step import StepReport, TrainState, train_step
from unidiff.train.tasks import TaskMixer
from unidiff.train.validation import validate


class TrainingAborted(RuntimeError):
    """The run cannot go on: too many steps without a finite loss."""


class Trainer:
    """One run in `config.output`. `train` returns when the last step is done or SIGTERM / Ctrl-C arrived, both saved.

    Args:
        config: checked settings.
        source: training tokens.
        validation: held-out tokens, or None to train without validation.
        sampler: called as `sampler(model, step) -> uint8 [3, H, W]` every `logging.sample_every` steps.

    Raises:
        ValueError: settings that do not fit each other, the data or the checkpoint.
    """

    def __init__(
        self,
        config: TrainConfig,
        source: TokenSource,
        validation: TokenSource | None = None,
        sampler: Callable[[MaskedTransformer, int], torch.Tensor] | None = None,
    ) -> None:
        check_config(config)
        self.config, self.source, self.validation, self.sampler = config, source, validation, sampler
        if config.threads:
            torch.set_num_threads(config.threads)
        self.device = pick_device(config.device)
        self.folder = Path(config.output)
        self.checkpoints = self.folder / "checkpoints"
        crop = config.data.crop_fill
        self.mixer = TaskMixer(source, config.tasks, config.objective, config.seed, crop)
        model = build_model(config, source.vocabulary.size)
        model.to(self.device)  # type: ignore[arg-type]  # diffusers' decorator hides the signature
        hidden = torch.compile(model.hidden) if config.compile else model.hidden
        optimisers = Optimisers(model, config.optimiser)
        ema = EMA(model, config.ema.decay, config.ema.warmup)
        bf16 = config.precision == "bf16"
        self.state = TrainState(
            model, hidden, source.vocabulary, optimisers, ema, bf16=bf16, chunk=config.objective.chunk
        )
        self.samples = 0
        self.resumed = self._resume()
        self._stop = False

    @property
    def model(self) -> MaskedTransformer:
        return self.state.model

    def train(self) -> dict[str, float]:
        """Run to `config.steps`. Returns the last validation report (empty without one).

        Raises:
            TrainingAborted: `max_bad_steps` consecutive steps had no finite loss; the last good checkpoint stays.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.folder / "config.yaml", dump_config(self.config))
        settings, state = self.config, self.state
        length = self.source.text_length + self.source.grid[0] * self.source.grid[1]
        log = RunLog(self.folder, settings.logging.tensorboard, state.step)
        progress = Progress(
            settings.steps,
            state.step,
            settings.rows_per_step * length,
            settings.logging.every,
            settings.logging.progress,
        )
        meter, saved_at, report = TaskMeter(), time.monotonic(), {}
        if self.resumed:
            progress.say(f"resumed at step {state.step} from {self.checkpoints}")
        try:
            with StopOnSignals(self._request_stop):
                while state.step < settings.steps and not self._stop:
                    factor = learning_rate_factor(settings.schedule, state.step, settings.steps)
                    step = self._step(factor)
                    self._guard(step)
                    meter.add(step)
                    progress.step(state.step, step.loss, factor)
                    last = state.step == settings.steps
                    if _due(settings.logging.every, state.step) or last:
                        extra = {"lr_factor": factor, "seconds_per_step": progress.seconds_per_step}
                        extra |= {"skipped": float(state.skipped), "samples": float(self.samples)}
                        log.write(state.step, "train", meter.take() | extra)
                    if self.validation is not None and (_due(settings.logging.validate_every, state.step) or last):
                        report = self._validate()
                        log.write(state.step, "validation", report)
                        progress.say(_validation_line(state.step, report))
                    if self.sampler is not None and _due(settings.logging.sample_every, state.step):
                        self._sample_sheet(log)
                    minutes = settings.checkpoint.minutes
                    overdue = minutes > 0 and time.monotonic() - saved_at > 60 * minutes
                    if _due(settings.checkpoint.every, state.step) or overdue or last:
                        self.save()
                        self.export(self.folder / "model")
                        saved_at = time.monotonic()
                    if last or _due(settings.logging.validate_every, state.step) or overdue:
                        progress.restart_clock()
            if self._stop:
                self.save()
                self.export(self.folder / "model")
                progress.say(f"stopped at step {state.step}; run the same command to go on")
            elif not (self.folder / "model").exists():  # a finished run whose export was deleted
                self.export(self.folder / "model")
        finally:
            progress.close()
            log.close()
        return report

    def _step(self, factor: float) -> StepReport:
        config, first = self.config, self.samples
        torch.manual_seed((config.seed * 1_000_003 + self.state.step) & 0x7FFFFFFFFFFFFFFF)  # dropout inside the model
        batches = [
            self.mixer.batch(first + number * config.batch_size, config.batch_size).to(self.device)
            for number in range(config.accumulate)
        ]
        self.samples += config.rows_per_step
        return train_step(self.state, batches, factor)

    def _guard(self, step: StepReport) -> None:
        if not step.finite and self.state.bad_steps >= self.config.max_bad_steps:
            raise TrainingAborted(
                f"{self.state.bad_steps} steps in a row had a loss or gradient that is not finite (step {self.state.step}); "
                "lower optimiser.lr and run again: it continues from the last checkpoint"
            )

    def _validate(self) -> dict[str, float]:
        assert self.validation is not None
        config, state = self.config, self.state
        rows = min(config.data.validation_rows, self.validation.rows or config.data.validation_rows)
        with state.ema.applied():
            return validate(
                state.model, state.hidden, self.validation, rows, config.logging.validation_draws,
                min(config.batch_size, rows * config.logging.validation_draws), state.bf16, state.chunk,
            )  # fmt: skip

    def _sample_sheet(self, log: RunLog) -> None:
        assert self.sampler is not None
        was_training = self.model.training
        self.model.eval()
        with self.state.ema.applied(), torch.no_grad():
            sheet = self.sampler(self.model, self.state.step)
        self.model.train(was_training)
        log.image(self.state.step, "samples", sheet)

    def _request_stop(self) -> None:
        self._stop = True

    def save(self) -> Path:
        """Write a checkpoint of this very state."""
        state = self.state
        plain: dict[str, Any] = {
            "step": state.step,
            "samples": self.samples,
            "ema_updates": state.ema.updates,
            "bad_steps": state.bad_steps,
            "skipped": state.skipped,
            "config": asdict(self.config),
        }
        content = Checkpoint(dict(state.model.state_dict()), state.ema.average, state.optimisers.state(), plain)
        return save_checkpoint(self.checkpoints, content, self.config.checkpoint.keep)

    def _resume(self) -> bool:
        if not self.config.checkpoint.resume:
            if latest_name(self.checkpoints) is not None:
                raise ValueError(
                    f"{self.checkpoints} already holds a run; choose another output=, or checkpoint.resume=true to continue it"
                )
            return False
        found = load_checkpoint(self.checkpoints)
        if found is None:
            return False
        state = self.state
        try:
            state.model.load_state_dict(found.model)
            state.ema.load(found.ema, found.state["ema_updates"])
            state.optimisers.load_state(found.optimiser)
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"{self.checkpoints} is of another model or optimiser; choose another output= ({reason})"
            ) from error
        state.step, self.samples = found.state["step"], found.state["samples"]
        state.bad_steps, state.skipped = found.state["bad_steps"], found.state["skipped"]
        return True

    def export(self, folder: Path) -> None:
        """Write the averaged weights as a folder for `MaskedTransformer.from_pretrained`, with `vocabulary.json`."""
        model = copy.deepcopy(self.model).eval()
        dtype = getattr(torch, self.config.checkpoint.export_dtype)
        for name, parameter in model.named_parameters():
            parameter.data = self.state.ema.average[name].to(dtype)
        with replacing_folder(folder) as temporary:
            model.save_pretrained(temporary)
            write_atomic(temporary / "vocabulary.json", json.dumps(self.source.vocabulary.to_dict(), indent=1))


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _validation_line(step: int, report: dict[str, float]) -> str:
    shown = ("joint_nelbo", "joint_nelbo_text", "joint_nelbo_image", "t2i_nelbo", "caption_nelbo", "vqa_nelbo")
    return f"step {step} validation  " + "  ".join(f"{k} {report[k]:.3f}" for k in shown if k in report)
