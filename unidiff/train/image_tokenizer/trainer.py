"""The image tokenizer's training run: data, schedule, spike guard, checkpoints, best weights, report and picture sheet.

On one machine's CPU a run that was stopped or killed and started again ends with the weights of an uninterrupted one, bit
for bit.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.optim import AdamW

from unidiff.config import dump_config, flat
from unidiff.errors import read_json
from unidiff.files import file_stamp, replace_text, replacing_folder
from unidiff.pipelines.owned import check_replaceable, others_in_model
from unidiff.pipelines.sheet import save_image
from unidiff.process import free_memory, pick_device
from unidiff.schema import check_same, from_data
from unidiff.tokens.batch import moved
from unidiff.tokens.image.protocols import TrainableTokenizer
from unidiff.tokens.image.vq import VQImageTokenizer, coder_of
from unidiff.train.config import ParallelConfig, ScheduleConfig
from unidiff.train.image_tokenizer.config import ImageTokenizerConfig, new_network
from unidiff.train.image_tokenizer.data import Pictures, open_pictures
from unidiff.train.image_tokenizer.losses import (
    CellTrainer,
    CodebookAverage,
    measure,
    place_codes,
    psnr,
    reconstruction_sheet,
    vq_forward,
)
from unidiff.train.optim import learning_rate_factor
from unidiff.train.run.checkpoint import RunCheckpoint, holds_checkpoints, load_checkpoint
from unidiff.train.run.distributed import Parallel, launch_of, lost_peer
from unidiff.train.run.logs import Progress, RunLog, begin, take_steps
from unidiff.train.run.resume import MARK, SETTINGS, check_run_folder, fitting, rate_notes
from unidiff.world import WORLDS

_MOST_CELLS = 2**24  # of a batch; torch draws from no more
_EVERY = ("log_every", "validate_every", "checkpoint_every")
_FREE = ("out", "steps", "device", "threads", *_EVERY, "fallback", "trackers", "project")
"""Settings that may be others when a run goes on."""


def train_image_tokenizer(config: ImageTokenizerConfig, environment: Mapping[str, str] | None = None) -> dict:
    """Train, or go on where the run in `config.out` stopped; returns the report that is also in `<out>/report.json`.

    `<out>/model` is the model with the best PSNR on the held-out pictures. SIGTERM and Ctrl-C end the run after the step,
    with a checkpoint. Processes that `torchrun` started, as `environment` says, share every batch: but for rounding,
    their weights are those of one process.

    Raises:
        ValueError: a setting that cannot work, too few pictures, a folder of another run or in use, or a damaged checkpoint.
        FileNotFoundError: `init_from` or a shard does not exist.
        OSError: a full or read-only disk.
    """
    out = Path(config.out)
    start = None if holds_checkpoints(out / "checkpoints") else config.init_from
    check_run_folder(out, "out", start, (SETTINGS, "model", "report.json", "reconstructions.png"))
    if config.threads:
        torch.set_num_threads(config.threads)
    parallel = Parallel(pick_device(config.device), ParallelConfig(), launch_of(environment or {}))
    try:
        return _train(config, out, parallel)
    except RuntimeError as error:
        if parallel.size > 1 and lost_peer(error):
            raise ValueError("another process of this run has ended; it says why") from error
        raise
    finally:
        parallel.close()


def _train(config: ImageTokenizerConfig, out: Path, parallel: Parallel) -> dict:
    if config.batch_size % parallel.size:
        raise ValueError(f"batch_size={config.batch_size} must be a multiple of the {parallel.size} processes")
    torch.manual_seed(config.seed)  # initial weights
    model, average = _build(config, parallel.device)
    pictures = open_pictures(config.data, config.seed, VQImageTokenizer(model).factor)
    _check_batch(config, pictures.held_out.shape[-2:], VQImageTokenizer(model).factor)
    with parallel.locked(out, "training"):
        return _TokenizerRun(config, out, model.train(), average, pictures, parallel).go()


@dataclass
class SpikeGuard:
    """Leaves out steps whose error jumps or is not a number: one such step once threw a run from 20 dB to 0.5."""

    allowed: int = 50
    skipped: int = 0
    level: float = math.inf  # moving average of the mean squared error

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


@dataclass(frozen=True)
class TokenizerRunState:
    """Plain data of a checkpoint."""

    step: int  # taken so far, those of the encoder alone (`cells.steps`) included
    settings: dict[str, Any]  # by dotted name
    facts: dict[str, Any]  # about the data and the first weights
    position: dict[str, Any]  # in the pictures
    random: str  # state of the generator, in hexadecimal
    level: float | None  # of the spike guard, None before its first step
    skipped: int  # steps that it left out
    best: float | None  # PSNR of the kept model, None before the first
    found: dict[str, Any]  # about the codes of single cells
    seconds: float  # of work
    sums: str = ""  # named by checkpoints themselves


class _TokenizerRun:
    """Everything that changes from step to step. Steps of the encoder alone come first and count, too."""

    def __init__(
        self, config: ImageTokenizerConfig, out: Path, model: Any, average: CodebookAverage | None, pictures: Pictures,
        parallel: Parallel,
    ) -> None:  # fmt: skip
        self.parallel = parallel
        self.config, self.out, self.model, self.average, self.pictures = config, out, model, average, pictures
        self.device, self.codebook_size = next(model.parameters()).device, VQImageTokenizer(model).codebook_size
        self.generator = torch.Generator().manual_seed(config.seed)
        self.guard, self.step, self.total = SpikeGuard(), 0, config.cells.steps + config.steps
        self.schedule = ScheduleConfig(warmup=config.warmup_steps, floor=0.02)
        self.best, self.before, self.start = -math.inf, 0.0, time.monotonic()
        self.found: dict[str, Any] = {}
        weights = sorted(Path(config.init_from).glob("*.safetensors")) if config.init_from else []
        self.facts = {"init_from": {path.name: file_stamp(path)["hash"] for path in weights}, **pictures.facts}
        self.cells: CellTrainer | None = None
        if config.cells.steps:
            world = WORLDS.get_or_refuse(config.data.world, "data.world")
            shown, ground = world.cells(config.data.profile, int(model.config.factor))
            self.cells = CellTrainer(model, shown, ground, config.cells, config.bf16, self.generator)
            self.optimiser = self.cells.optimiser
        else:
            self._start_main()

    def go(self) -> dict:
        """To the last step or the next signal; the report of what was kept."""
        self._resume()
        self.stream = self.pictures.stream()
        main, config = self.parallel.main, self.config
        if main:
            replace_text(self.out / SETTINGS, MARK + dump_config(config))
        log = RunLog(self.out, self.step, config.trackers, config.project, asdict(config), silent=not main)
        side = self.pictures.held_out.shape[-1]
        codes = self.config.batch_size * (side // VQImageTokenizer(self.model).factor) ** 2
        self.model.train()
        progress = Progress(self.total, self.step, codes, config.log_every, main)
        take_steps(self, self.total, self.out, config.checkpoint_every, log, progress, self.parallel)
        if not main:
            return {}
        if (path := self.out / "report.json").is_file():
            return read_json(path, "the report of an image tokenizer")
        if self.step < self.total:
            return {"stopped": self.step}
        raise ValueError(
            "no validation gave a number, so no model was kept; raise steps where the checkpoint is past them already, "
            "else lower learning_rate"
        )

    def advance(self, log: RunLog, progress: Progress) -> None:
        """One step, and what is due after it."""
        values, factor = ({"loss": float(self.cells.step(self.step))}, 1.0) if self.cells else self._main_step()
        self.step += 1
        progress.step(self.step, f"loss {values.get('loss', math.nan):.4f}  lr x{factor:.3f}")
        if self.step % self.config.log_every == 0 or self.step == self.total:
            log.write(self.step, "train", {**values, "seconds": self._seconds()})
        if self.cells is not None and self.step == self.config.cells.steps:
            self.found = place_codes(self.model, self.cells.cells, self.cells.flat)
            log.write(self.step, "cells", self.found)
            self._start_main()
        self._validate(log, progress)

    def _start_main(self) -> None:
        """The whole tokenizer from now on; after steps of the encoder alone, the codes stay as they are."""
        if self.cells is not None:
            self.cells = None
            self.model.encoder.requires_grad_(False)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        rate = self.config.learning_rate
        self.optimiser = AdamW(self.parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.01)

    def _main_step(self) -> tuple[dict[str, float], float]:
        """One step of the whole tokenizer: values for the log, and the factor on the learning rate."""
        config, step = self.config, self.step - self.config.cells.steps
        # 1. reconstruct a batch, and the gradient of the loss
        batch = list(
            islice(self.stream, config.batch_size)
        )  # every process draws all of it, so that all know the position
        own = len(batch) // self.parallel.size
        images = torch.stack(batch[self.parallel.rank * own : (self.parallel.rank + 1) * own])  # [B, 3, H, W]
        images = moved(images, self.device).contiguous(memory_format=torch.channels_last)
        factor = learning_rate_factor(self.schedule, step, config.steps)
        for group in self.optimiser.param_groups:
            group["lr"] = config.learning_rate * factor
        result = vq_forward(self.model, images, config.loss, config.bf16, self.parallel.mean)
        self.optimiser.zero_grad(set_to_none=True)
        result.loss.backward()
        loss, mse = self._share(result.loss.detach(), result.mse)
        gradient = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        chosen = self.parallel.gather(result.codes)
        used = torch.zeros(self.codebook_size, device=self.device).index_fill_(0, chosen.flatten(), 1.0).sum()
        numbers = torch.stack([x.double() for x in (loss, mse, gradient, used)])
        said, error, norm, codes = numbers.tolist()  # the one wait of a step
        if not self.guard.accepts(error, self.step, norm):
            return {}, factor
        # 2. weights, then the codebook
        self.optimiser.step()
        revived = 0
        if self.average is not None and result.latents is not None:
            revive = step % 10 == 0 and step < config.revive_until * config.steps
            latents = self.parallel.gather(result.latents)
            revived = self.average.update(chosen, latents, self.generator, revive)
        values = {"loss": said, "psnr": psnr(self.guard.level), "revived": revived}
        return values | {"codes": int(codes), "grad_norm": norm}, factor

    def _share(self, loss: Tensor, mse: Tensor) -> tuple[Tensor, Tensor]:
        """Means of the gradients, the loss and the squared error over all processes."""
        if self.parallel.size > 1:
            parts = [p.grad for p in self.parameters if p.grad is not None]
            numbers = torch.cat([*(part.flatten() for part in parts), loss.float()[None], mse.float()[None]])
            numbers = self.parallel.sum(numbers) / self.parallel.size
            for part, mean in zip(parts, numbers[:-2].split([part.numel() for part in parts]), strict=True):
                part.copy_(mean.view_as(part))
            loss, mse = numbers[-2], numbers[-1]
        return loss, mse

    def _validate(self, log: RunLog, progress: Progress) -> None:
        """Measure on the held-out pictures when it is time, and keep the best weights."""
        step = self.step - self.config.cells.steps
        due = step >= 1 and (step % self.config.validate_every == 0 or self.step == self.total)
        if not (due and self.parallel.main):
            return
        report = measure(self.model, self.pictures.held_out)
        self.model.train()
        log.write(self.step, "validation", report)
        progress.say(f"step {self.step} validation  " + "  ".join(f"{k} {v}" for k, v in report.items()))
        sheet = reconstruction_sheet(self.model, self.pictures.held_out)
        self.model.train()
        save_image(sheet, self.out / "samples" / f"step-{self.step:08d}.png")
        log.image(self.step, "samples", torch.from_numpy(np.array(sheet)).permute(2, 0, 1))
        if report["psnr"] > self.best:
            self.best = report["psnr"]
            report |= self.found | {"step": step, "skipped_steps": self.guard.skipped, "seconds": self._seconds()}
            self._save(report, sheet)
        progress.restart_clock()

    def _save(self, report: dict, sheet: Image.Image) -> None:
        """Replace `<out>/model` as a whole, then the sheet and the report."""
        if not all(bool(value.isfinite().all()) for value in self.model.state_dict().values()):
            raise ValueError(f"weights are no numbers any more after step {self.step}; lower learning_rate")
        check_replaceable(self.out / "model", others_in_model, "model")
        with replacing_folder(self.out / "model") as temporary:
            self.model.save_pretrained(temporary)
        save_image(sheet, self.out / "reconstructions.png")
        replace_text(self.out / "report.json", json.dumps(report, indent=1) + "\n")

    def _seconds(self) -> float:
        return round(self.before + time.monotonic() - self.start, 1)

    def checkpoint(self) -> RunCheckpoint:
        """All of it."""
        state = TokenizerRunState(
            step=self.step, settings=flat(asdict(self.config)), facts=self.facts,
            position=self.pictures.source.state_dict(), random=self.generator.get_state().numpy().tobytes().hex(),
            found=self.found, seconds=self._seconds(), skipped=self.guard.skipped,
            level=None if math.isinf(self.guard.level) else self.guard.level,
            best=None if math.isinf(self.best) else self.best,
        )  # fmt: skip
        codebook = self.average.state() if self.average else {}
        return RunCheckpoint(dict(self.model.state_dict()), codebook, adamw_state(self.optimiser), asdict(state))

    def _resume(self) -> None:
        """Go on from the newest checkpoint, if there is one."""
        config, folder = self.config, self.out / "checkpoints"
        found = load_checkpoint(folder, "settings", config.fallback, "fallback=true")
        self.parallel.agree(False)  # all have looked before one writes
        if found is None and not self.parallel.main:
            return
        if found is None:
            begin(self, self.out)  # a run that is killed early knows its own files again
            return
        state = from_data(TokenizerRunState, found.state, f"the state in {folder}")
        old = state.settings | {f"the content of {name}": value for name, value in state.facts.items()}
        new = flat(asdict(config)) | {f"the content of {name}": value for name, value in self.facts.items()}
        check_same(
            old, new, self.out, "out= (with init_from= to train its model on)", sorted(set(new) - set(_FREE))
        )  # settings that are no more changed nothing
        if state.best is not None and not ((self.out / "model").is_dir() and (self.out / "report.json").is_file()):
            raise ValueError(
                f"{str(self.out)!r} lacks the model or report.json that its run has kept; bring them back, or name another out="
            )
        if self.cells is not None and state.step >= config.cells.steps:
            self._start_main()
        with fitting(folder, "out="):
            self.model.load_state_dict(found.model)
            load_adamw_state(self.optimiser, found.optimiser)
            if self.average is not None:
                self.average.load(found.ema)
            self.generator.set_state(torch.frombuffer(bytearray.fromhex(state.random), dtype=torch.uint8))
            self.pictures.source.load_state_dict(state.position)
        self.step, self.found, self.before = state.step, state.found, state.seconds
        self.guard.skipped, self.guard.level = state.skipped, math.inf if state.level is None else state.level
        self.best = -math.inf if state.best is None else state.best
        if not self.parallel.main:
            return
        print(f"resumed at step {self.step} from {folder}", flush=True)
        done, before = self.step - config.cells.steps, state.settings.get("steps")
        for note in rate_notes(self.schedule, config.learning_rate, done, before, config.steps) if done > 0 else []:
            print(note, flush=True)


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


def adamw_state(optimiser: AdamW) -> dict[str, Tensor]:
    """Every state tensor, named `parameter number.field`."""
    state = optimiser.state_dict()["state"]
    return {f"{n}.{key}": torch.as_tensor(value) for n, entry in state.items() for key, value in entry.items()}


def load_adamw_state(optimiser: AdamW, flat: Mapping[str, Tensor]) -> None:
    """Inverse of `adamw_state`; ValueError or LookupError for other parameters. Moments get their parameters' strides, with
    which they were computed."""
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    expected = {f"{name.partition('.')[0]}.{key}" for name in flat for key in ("exp_avg", "exp_avg_sq", "step")}
    if set(flat) != expected:
        raise ValueError("the checkpoint holds no state of AdamW")
    for name, value in flat.items():
        number, _, key = name.partition(".")
        parameter = parameters[int(number)]
        if key != "step" and value.shape != parameter.shape:
            raise ValueError("the checkpoint holds AdamW's state of another model")
        kept = value.clone() if key == "step" else torch.empty_like(parameter).copy_(value)
        optimiser.state[parameter][key] = kept.detach()
