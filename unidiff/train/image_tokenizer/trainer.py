"""The image tokenizer's training run: data, schedule, spike guard, checkpoints, best weights, report and picture sheet.

On one machine's CPU a run that was stopped or killed and started again ends with the weights of an uninterrupted one, bit
for bit.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from unidiff.errors import read_json
from unidiff.files import locked, replace_text, replacing, replacing_folder
from unidiff.process import free_memory
from unidiff.schema import check_fields, from_data
from unidiff.tokens.image.quantized import TrainableTokenizer
from unidiff.tokens.image.vq import VQImageTokenizer, coder_of, network_settings, new_network
from unidiff.train.build import pick_device
from unidiff.train.image_tokenizer.cell_codes import CellCodes, CellTrainer, place_codes
from unidiff.train.image_tokenizer.data import ImageData, Pictures, open_pictures
from unidiff.train.image_tokenizer.losses import CodebookAverage, VQLossWeights, psnr, vq_forward
from unidiff.train.image_tokenizer.report import measure, reconstruction_sheet, ssim
from unidiff.train.image_tokenizer.state import (
    RunState,
    adamw_state,
    check_same,
    flat_settings,
    load_adamw_state,
    weights_stamp,
)
from unidiff.train.run.checkpoint import RunCheckpoint, check_kind, load_checkpoint, save_checkpoint
from unidiff.train.run.logs import Progress, RunLog
from unidiff.train.run.loop import StopOnSignals
from unidiff.train.run.run_folder import check_output, check_replaceable, holds_something
from unidiff.world import WORLDS

__all__ = ["ImageData", "ImageTokenizerConfig", "SpikeGuard", "ssim", "train_image_tokenizer"]
_KEPT = 2  # checkpoints
_KEPT_FILES = {"model": "a model", "report.json": "report.json", "reconstructions.png": "reconstructions.png"}
_MOST_CELLS = 2**24  # of a batch; torch draws from no more


@dataclass(frozen=True)
class ImageTokenizerConfig:
    """One tokenizer run; see `configs/emoji_tokenizer.yaml`. `steps` counts optimiser steps of `batch_size` images.

    `decoder_only` (with `init_from`) sharpens the decoder of a `CellVQModel` and leaves its codes as they are, so that
    a transformer trained on these codes stays valid. With `cells.steps` the encoder learns first, alone, to give the
    objects' cells the same codes on every background (`train_cell_codes`), and then the decoder with these codes.

    `model` holds `kind` (`cell` for a `CellVQModel`, `vqmodel` for diffusers' `VQModel`, or another of `IMAGE_TOKENIZERS` that
    can be trained) and the settings of that network; those left out are its defaults.

    `device` is auto, cpu or cuda, `threads` those of the CPU (0: all). A checkpoint is written every `checkpoint_every`
    steps, at the end, and on SIGTERM or Ctrl-C; `fallback` goes on from the one before where the newest is damaged.
    """

    out: str = "runs/image_tokenizer"
    init_from: str | None = None
    decoder_only: bool = False
    cells: CellCodes = field(default_factory=CellCodes)
    data: ImageData = field(default_factory=ImageData)
    model: dict[str, Any] = field(default_factory=dict)
    loss: VQLossWeights = field(default_factory=VQLossWeights)
    steps: int = 4000
    batch_size: int = 64
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    revive_until: float = 0.6
    bf16: bool = True
    log_every: int = 50
    validate_every: int = 500
    checkpoint_every: int = 500
    fallback: bool = False
    device: str = "auto"
    threads: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self, "")
        object.__setattr__(self, "model", network_settings(self.model))
        for name in ("steps", "batch_size", "log_every", "validate_every", "checkpoint_every"):
            if not 1 <= getattr(self, name) <= 2**40:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        bounds = {"warmup_steps": (0, 2**40), "revive_until": (0, 1), "threads": (0, 1024), "seed": (0, 2**62)}
        for name, (low, high) in bounds.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a number from {low} to {high}")
        if not 0 < self.learning_rate <= 1e3:
            raise ValueError(f"learning_rate is {self.learning_rate}; expected a number above 0 and at most 1000")
        if not self.out.strip():
            raise ValueError("out is empty; name a folder")


def train_image_tokenizer(config: ImageTokenizerConfig) -> dict:
    """Train, or go on where the run in `config.out` stopped; returns the report that is also in `<out>/report.json`.

    `<out>/model` is the model with the best PSNR on the held-out pictures. SIGTERM and Ctrl-C end the run after the step,
    with a checkpoint.

    Raises:
        ValueError: a setting that cannot work, too few pictures, a folder of another run or in use, or a damaged checkpoint.
        FileNotFoundError: `init_from` or a shard does not exist.
        OSError: a full or read-only disk.
    """
    out = Path(config.out)
    check_output(out, "out", None)
    if config.threads:
        torch.set_num_threads(config.threads)
    device = pick_device(config.device)
    torch.manual_seed(config.seed)  # initial weights
    model, average = _build(config, device)
    pictures = open_pictures(config.data, config.seed, VQImageTokenizer(model).factor)
    _check_batch(config, pictures.held_out.shape[-2:], VQImageTokenizer(model).factor)
    check_replaceable(out / "model")
    with locked(out, "training"):
        return _Run(config, out, model.train(), average, pictures).go()


class SpikeGuard:
    """Leaves out steps whose error jumps or is not a number: one such step once threw a run from 20 dB to 0.5."""

    def __init__(self, allowed: int = 50) -> None:
        self.allowed, self.skipped = allowed, 0
        self.level: float = math.inf  # moving average of the mean squared error

    def accepts(self, mse: float, step: int, norm: float = 0.0) -> bool:
        """Whether to take a step with this error and gradient. Raises ValueError after too many refusals."""
        if not math.isfinite(mse) or not math.isfinite(norm) or mse > 8 * self.level + 0.02:
            self.skipped += 1
            if self.skipped > self.allowed:
                raise ValueError(
                    f"more than {self.allowed} steps diverged, the last at step {step}; lower learning_rate"
                )
            return False
        self.level = mse if math.isinf(self.level) else 0.98 * self.level + 0.02 * mse
        return True


class _Run:
    """Everything that changes from step to step. Steps of the encoder alone come first and count, too."""

    def __init__(
        self, config: ImageTokenizerConfig, out: Path, model: Any, average: CodebookAverage | None, pictures: Pictures
    ) -> None:
        self.config, self.out, self.model, self.average, self.pictures = config, out, model, average, pictures
        self.device = next(model.parameters()).device
        self.generator = torch.Generator().manual_seed(config.seed)
        self.guard, self.step, self.total = SpikeGuard(), 0, config.cells.steps + config.steps
        self.best, self.before, self.start = -math.inf, 0.0, time.monotonic()
        self.found: dict[str, Any] = {}
        self.facts = {"init_from": weights_stamp(config.init_from), **pictures.facts}
        self.cells: CellTrainer | None = None
        if config.cells.steps:
            shown, flat = WORLDS[config.data.world or ""].cells(config.data.profile, int(model.config.factor))
            self.cells = CellTrainer(model, shown, flat, config.cells, config.bf16, self.generator)
        else:
            self._start_main()

    def go(self) -> dict:
        """To the last step or the next signal."""
        self._resume()
        log = RunLog(self.out, self.step)
        side = self.pictures.held_out.shape[-1]
        codes = self.config.batch_size * (side // VQImageTokenizer(self.model).factor) ** 2
        self.model.train()
        progress = Progress(self.total, self.step, codes, self.config.log_every, True)
        stopped: list[bool] = []
        try:
            with StopOnSignals(lambda: stopped.append(True)):
                stream = iter(self.pictures.stream)
                while self.step < self.total and not stopped:
                    values, factor = self._cell_step() if self.cells else self._main_step(stream)
                    self.step += 1
                    progress.step(self.step, f"loss {values.get('loss', math.nan):.4f}  lr x{factor:.3f}")
                    if self.step % self.config.log_every == 0 or self.step == self.total:
                        log.write(self.step, "train", {**values, "seconds": self._seconds()})
                    self._finish_cells(log)
                    self._validate(log, progress)
                    if self.step % self.config.checkpoint_every == 0 or self.step == self.total or stopped:
                        save_checkpoint(self.out / "checkpoints", self._checkpoint(), _KEPT)
        finally:
            progress.close()
            log.close()
        if stopped and self.step < self.total:
            progress.say(f"stopped at step {self.step}; run the same command to go on")
        return self._report()

    def _cell_step(self) -> tuple[dict[str, float], float]:
        assert self.cells is not None
        return {"loss": float(self.cells.step(self.step))}, 1.0

    def _finish_cells(self, log: RunLog) -> None:
        """After the last step of the encoder alone: the codebook, which then stays as it is."""
        if self.cells is not None and self.step == self.config.cells.steps:
            self.found = place_codes(self.model, self.cells.cells, self.cells.flat)
            log.write(self.step, "cells", self.found)
            self._start_main()

    def _start_main(self) -> None:
        if self.cells is not None:
            self.cells = None
            self.model.encoder.requires_grad_(False)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        rate = self.config.learning_rate
        self.optimiser = torch.optim.AdamW(self.parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.01)

    def _main_step(self, stream: Any) -> tuple[dict[str, float], float]:
        """One step of the whole tokenizer: values for the log, and the factor on the learning rate."""
        config, step = self.config, self.step - self.config.cells.steps
        # 1. reconstruct a batch, and the gradient of the loss
        images = torch.stack(list(islice(stream, config.batch_size))).to(self.device, memory_format=torch.channels_last)
        factor = _schedule(step, config.warmup_steps, config.steps)
        for group in self.optimiser.param_groups:
            group["lr"] = config.learning_rate * factor
        result, latents = vq_forward(self.model, images, config.loss, config.bf16)
        self.optimiser.zero_grad(set_to_none=True)
        result.loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, 1.0))
        if not self.guard.accepts(float(result.mse), self.step, norm):
            return {}, factor
        # 2. weights, then the codebook
        self.optimiser.step()
        revived = 0
        if self.average is not None and latents is not None:
            revive = step % 10 == 0 and step < config.revive_until * config.steps
            revived = self.average.update(result.codes, latents, self.generator, revive)
        values = {"loss": result.loss.item(), "psnr": psnr(self.guard.level), "revived": revived}
        return values | {"codes": int(result.codes.unique().numel()), "grad_norm": norm}, factor

    def _validate(self, log: RunLog, progress: Progress) -> None:
        """Measure on the held-out pictures when it is time, and keep the best weights."""
        step = self.step - self.config.cells.steps
        if step < 1 or (step % self.config.validate_every and self.step < self.total):
            return
        report = measure(self.model, self.pictures.held_out)
        self.model.train()
        log.write(self.step, "validation", report)
        progress.say(f"step {self.step} validation  " + "  ".join(f"{k} {v}" for k, v in report.items()))
        if report["psnr"] > self.best:
            self.best = report["psnr"]
            report |= self.found | {"step": step, "skipped_steps": self.guard.skipped, "seconds": self._seconds()}
            self._save(report)
        progress.restart_clock()

    def _save(self, report: dict) -> None:
        """Replace `<out>/model` as a whole, then the sheet and the report."""
        if not all(bool(value.isfinite().all()) for value in self.model.state_dict().values()):
            raise ValueError(f"weights are no numbers any more after step {self.step}; lower learning_rate")
        check_replaceable(self.out / "model")
        with replacing_folder(self.out / "model") as temporary:
            self.model.save_pretrained(temporary)
        sheet = reconstruction_sheet(self.model, self.pictures.held_out)
        self.model.train()
        with replacing(self.out / "reconstructions.png") as temporary:
            sheet.save(temporary, format="PNG")
        replace_text(self.out / "report.json", json.dumps(report, indent=1) + "\n")

    def _report(self) -> dict:
        path = self.out / "report.json"
        if path.is_file():
            return read_json(path, "the report of an image tokenizer")
        if self.step < self.total:
            return {"stopped": self.step}
        raise ValueError(
            "no validation gave a number, so no model was kept; raise steps where the checkpoint is past them already, "
            "else lower learning_rate"
        )

    def _seconds(self) -> float:
        return round(self.before + time.monotonic() - self.start, 1)

    def _checkpoint(self) -> RunCheckpoint:
        optimiser = self.cells.optimiser if self.cells else self.optimiser
        state = RunState(
            step=self.step, settings=flat_settings(self.config), facts=self.facts, position=self.pictures.stream.state(),
            random=self.generator.get_state().numpy().tobytes().hex(), found=self.found, seconds=self._seconds(),
            level=None if math.isinf(self.guard.level) else self.guard.level, skipped=self.guard.skipped,
            best=None if math.isinf(self.best) else self.best,
        )  # fmt: skip
        codebook = self.average.state() if self.average else {}
        return RunCheckpoint(dict(self.model.state_dict()), codebook, adamw_state(optimiser), asdict(state))

    def _resume(self) -> None:
        """Go on from the newest checkpoint, if there is one."""
        folder = self.out / "checkpoints"
        found = load_checkpoint(folder, self.config.fallback, "fallback=true")
        if found is None:
            check_output(self.out, "out", self.config.init_from)
            if kept := [said for name, said in _KEPT_FILES.items() if holds_something(self.out / name)]:
                raise ValueError(
                    f"{str(self.out)!r} holds {kept[0]} and no checkpoint to go on from; name another out= (it would be "
                    "replaced)"
                )
            save_checkpoint(folder, self._checkpoint(), _KEPT)  # a run that is killed early knows its own files again
            return
        check_kind(found.state, "settings", folder)
        state = from_data(RunState, found.state, f"the state in {folder}")
        settings = flat_settings(self.config)
        check_same(state, settings, self.facts, self.out)
        if state.best is not None and not ((self.out / "model").is_dir() and (self.out / "report.json").is_file()):
            raise ValueError(
                f"{str(self.out)!r} lacks the model or report.json that its run has kept; bring them back, or name another out="
            )
        if self.cells is not None and state.step >= self.config.cells.steps:
            self._start_main()
        try:
            self.model.load_state_dict(found.model)
            load_adamw_state(self.cells.optimiser if self.cells else self.optimiser, found.optimiser)
            if self.average is not None:
                self.average.load(found.ema)
            random = bytearray.fromhex(state.random)
            self.generator.set_state(torch.frombuffer(random, dtype=torch.uint8))
            self.pictures.stream.load(state.position)
        except (RuntimeError, ValueError, TypeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"the checkpoint in {str(folder)!r} does not fit this run ({reason}); name another out="
            ) from error
        self.step, self.found, self.before = state.step, state.found, state.seconds
        self.guard.skipped, self.guard.level = state.skipped, math.inf if state.level is None else state.level
        self.best = -math.inf if state.best is None else state.best
        print(f"resumed at step {self.step} from {folder}", flush=True)
        self._say_rate(state.settings.get("steps"))

    def _say_rate(self, steps: Any) -> None:
        """A run that becomes longer or shorter changes its schedule."""
        done, now = self.step - self.config.cells.steps, self.config.steps
        if type(steps) is int and steps != now and done > 0:
            before, after = (
                _schedule(done, self.config.warmup_steps, n) * self.config.learning_rate for n in (steps, now)
            )
            print(f"steps {steps} -> {now}: the learning rate goes from {before:.3g} to {after:.3g}", flush=True)


def _build(config: ImageTokenizerConfig, device: torch.device) -> tuple[Any, CodebookAverage | None]:
    """The model to train, and the moving averages of its codebook where it learns one that way."""
    loaded = VQImageTokenizer.from_pretrained(config.init_from).model if config.init_from else None
    if loaded is not None and (bad := [n for n, v in loaded.state_dict().items() if not bool(v.isfinite().all())]):
        raise ValueError(f"init_from={config.init_from!r} holds NaN or infinity in {bad[0]}; name other weights")
    model: Any = (loaded or new_network(config.model)).float().to(device).train().to(memory_format=torch.channels_last)
    coder = coder_of(model)
    if not isinstance(coder, TrainableTokenizer) or not coder.kind:
        raise ValueError(
            f"init_from={config.init_from!r} holds a {type(model).__name__}, which this recipe cannot train"
        )
    cell = coder.has_cell_codes
    if config.loss.cycle and not cell:
        raise ValueError(f"loss.cycle {config.loss.cycle} needs a CellVQModel; set it to 0 or model.kind to 'cell'")
    if config.decoder_only:
        if not (cell and config.init_from):
            raise ValueError("decoder_only needs init_from with a CellVQModel; set init_from or turn decoder_only off")
        model.encoder.requires_grad_(False)
    if config.cells.steps and not (cell and config.data.world and not config.decoder_only):
        raise ValueError("cells.steps needs model.kind cell, data.world and decoder_only off; or set it to 0")
    frozen = config.decoder_only or config.cells.steps > 0
    average = CodebookAverage(model) if cell and not frozen else None
    if average is not None and config.init_from:
        average.started = True
    return model, average


def _check_batch(config: ImageTokenizerConfig, sides: tuple[int, ...], factor: int) -> None:
    """Raise `ValueError` for a batch that cannot be held."""
    pixels = config.batch_size * math.prod(sides)
    free = free_memory()
    if pixels // factor**2 > _MOST_CELLS or (free is not None and 12 * pixels > free / 4):
        had = "" if free is None else f" with {free / 2**30:.1f} GiB of memory free"
        raise ValueError(
            f"batch_size={config.batch_size} pictures of {sides[0]} x {sides[1]} pixels are too many{had}; lower it"
        )


def _schedule(step: int, warmup: int, total: int) -> float:
    """Linear warm-up, then cosine to 2 %."""
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))
