"""A run from settings to an exported model: build, resume, loop, validate, save."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from unidiff.config import dump_config
from unidiff.files import replace_text, replacing_folder
from unidiff.models.trained_on import TASKS, TrainedOn
from unidiff.models.transformer import MaskedTransformer
from unidiff.pipelines.owned import check_replaceable, others_in_model
from unidiff.process import pick_device
from unidiff.train.build import add_adapters, check_start, export_adapter, merge_adapters, set_up_blocks
from unidiff.train.config import TrainConfig, check_config
from unidiff.train.data.datasets import DataLosses, open_documents, open_sources
from unidiff.train.data.samples import sheet_sampler
from unidiff.train.data.shard_source import DocumentTokens
from unidiff.train.data.source import TokenSource
from unidiff.train.data.tasks import TaskMixer
from unidiff.train.meters import SpeedMeter, TaskMeter
from unidiff.train.networks import NETWORKS, Network
from unidiff.train.optim import learning_rate_factor
from unidiff.train.run.checkpoint import CheckpointSaver, RunCheckpoint, pointed_name, score_of, settle
from unidiff.train.run.distributed import Parallel, launch_of, lost_peer, whole
from unidiff.train.run.logs import Progress, RunLog, stop_on_signals
from unidiff.train.run.resume import MARK, check_run_folder, facts_of, position, resume, scored_as
from unidiff.train.step import StepReport, TrainState, train_step

_LOWER = "run again with a lower optimiser.lr and checkpoint.changed=allow: it continues from the last checkpoint"


class _Step(NamedTuple):
    """A step that was taken; what came of it may still be on the device."""

    number: int
    samples: int  # position in the data after it
    report: StepReport
    seconds: float
    waited: float
    tokens: int | None


class TrainingAborted(RuntimeError):
    """The run cannot go on: too many steps without a finite loss."""


class Trainer:
    """One run in `config.output`. `train` returns when the last step is done or SIGTERM / Ctrl-C arrived, both saved.

    Args:
        source: training tokens. validation: held-out ones, or None to train without validation.
        sampler: called as `sampler(model, step) -> uint8 [3, H, W]` every `logging.sample_every` steps (by rank 0).
        parallel: the processes that share the run, all of which make a `Trainer`; None for this one alone.
        documents: take `data.document_share` of the samples.

    Raises:
        ValueError: settings that do not fit each other, the data, the number of processes or the checkpoint.
    """

    def __init__(
        self,
        config: TrainConfig,
        source: TokenSource,
        validation: TokenSource | None = None,
        sampler: Callable[[MaskedTransformer, int], torch.Tensor] | None = None,
        parallel: Parallel | None = None,
        documents: DocumentTokens | None = None,
    ) -> None:
        check_config(config)
        check_run_folder(Path(config.output), "output", config.checkpoint.init_from)
        self.config, self.source, self.validation, self.sampler = config, source, validation, sampler
        if config.threads:
            torch.set_num_threads(config.threads)
        self.parallel = parallel or Parallel(pick_device(config.device), config.parallel)
        self.parallel.check(config)
        self.folder = Path(config.output)
        self.checkpoints = self.folder / "checkpoints"
        data, self.block_length = config.data, int(config.model.get("block_length") or 0)
        self.mixer = TaskMixer(
            source, config.tasks, config.objective, config.seed, data.crop_fill, self.block_length, documents,
            data.document_share, data.pack,
        )  # fmt: skip
        check_start(config.checkpoint.init_from, source)
        self.network: Network = NETWORKS[config.network]
        model = self.network.build(config, source)
        set_up_blocks(model, config.activation_checkpointing, config.compile)
        self.parallel.prepare(model)
        self.state = TrainState.of(self.network.loss(model, source.vocabulary, config), config, self.parallel)
        self._documents = documents is not None
        self.speed = SpeedMeter(config, source, self.parallel.size)
        self.data_losses = DataLosses(self.folder, [source, validation, documents])
        own = json.dumps(facts_of(config, source, documents)) if self.parallel.main else ""
        self.facts: dict[str, Any] = json.loads(self.parallel.collect(own)[0])
        known = (
            self.network.report_names(validation, self.block_length) if validation and self._validation_rows else set()
        )
        best = self.network.judged_by(config, known)
        self._judged_by, self._scored = best, scored_as(config, best, validation)
        self._choice = resume(self.state, self.checkpoints, config, self.facts)
        settings = config.checkpoint
        self.saver = CheckpointSaver(self.checkpoints, settings.keep, settings.background, self.parallel)
        self.best = score_of(self.checkpoints, self._scored)
        self._score: tuple[int, float] | None = None  # of the last validation, and its step
        self._saved_at = time.monotonic()
        self._unread: list[_Step] = []

    @property
    def resumed(self) -> bool:
        return self._choice is not None

    @property
    def model(self) -> MaskedTransformer:
        return self.state.model

    def train(self) -> dict[str, float]:
        """Run to `config.steps`. Returns the last validation report (empty without one).

        Raises:
            TrainingAborted: `max_bad_steps` consecutive steps had no finite loss, or the weights are no longer finite; the
                last good checkpoint stays.
            ValueError: another run works in the folder, or weights that cannot be exported.
            OSError: a full or read-only disk and the like, with the name of the file; the last checkpoint stays.
        """
        settings, state, report = self.config, self.state, {}
        meter = TaskMeter(state.model.settings.num_experts, self.network.drawn)
        overdue, stopped, began, said = False, False, state.step, ""
        with ExitStack() as stack:
            stack.enter_context(self.parallel.locked(self.folder, "training"))
            log, progress = self._open_logs(stack)
            asked = stack.enter_context(stop_on_signals())
            name = self._choice.name if self._choice else ""
            if self.parallel.agree(name == pointed_name(self.checkpoints, "best"))[0]:  # killed before it was exported?
                self.export(self.folder / "model-best")
            while state.step < settings.steps and not stopped:
                # 1. a step
                factor = learning_rate_factor(settings.schedule, state.step, settings.steps)
                step = self.step(factor)
                # 2. what is due now, on all ranks alike
                last = state.step == settings.steps
                waited, most = time.monotonic() - self._saved_at, 60 * settings.checkpoint.minutes
                stopped, overdue = self.parallel.agree(bool(asked), 0 < most < waited)
                validating = self._validation_rows > 0 and (_due(settings.logging.validate_every, state.step) or last)
                logging = _due(settings.logging.every, state.step) or last
                saving = _due(settings.checkpoint.every, state.step) or overdue or last or stopped
                gives_up = state.bad_steps + len(self._unread) >= settings.max_bad_steps  # if all of these were skipped
                if logging or validating or saving or gives_up or self.parallel.device.type == "cpu":
                    self.settle(meter, log)
                    said = f"loss {step.loss:.4f}  "
                progress.step(state.step, f"{said}lr x{factor:.3f}")
                if logging:
                    extra = {"lr_factor": factor, "seconds_per_step": progress.seconds_per_step}
                    extra |= {"skipped": float(state.skipped), "samples": float(self.state.samples)}
                    extra["data_skipped"] = float(sum(self.data_losses.counts().values()))
                    log.write(state.step, "train", meter.take() | self.speed.take() | extra)
                better = False
                if validating:
                    report = self.validate()
                    better = self.judge(report)
                    log.write(state.step, "validation", report)
                    progress.say(_validation_line(state.step, report))
                drawing = _due(settings.logging.sample_every, state.step) or (
                    last and settings.logging.sample_every > 0
                )
                sampler = self.sampler if drawing else None
                if sampler is not None and (model := self.averaged()) is not None:
                    with torch.no_grad():
                        log.image(state.step, "samples", sampler(model, state.step))
                # 3. save
                if saving or better:
                    log.flush()
                    self.save()
                    self.export(self.folder / "model")
                    if better:
                        self.export(self.folder / "model-best")
                    self._saved_at = time.monotonic()
                else:
                    self.saver.poll()
                if last or validating or overdue:
                    progress.restart_clock()
            self.saver.wait()
            if lost := self.data_losses.line():
                progress.say(lost)
            if stopped:
                progress.say(f"stopped at step {state.step}; run the same command to go on")
            if state.step == began:  # a finished run, whose export may be missing, of an earlier step or another dtype
                self.export(self.folder / "model")
        return report

    def _open_logs(self, stack: ExitStack) -> tuple[RunLog, Progress]:
        config, main = self.config, self.parallel.main
        length = self.source.text_length + self.source.grid[0] * self.source.grid[1]
        if main and self._choice is not None:
            settle(self.checkpoints, self._choice)
        if main:
            replace_text(self.folder / "config.yaml", MARK + dump_config(config))
        names, project = config.logging.trackers, config.logging.project
        log = RunLog(self.folder, self.state.step, names, project, asdict(config), not main, config.logging.report)
        stack.enter_context(closing(log))
        tokens, shown = config.rows_per_step * length, config.logging.progress and main
        progress = Progress(config.steps, self.state.step, tokens, config.logging.every, shown)
        stack.enter_context(closing(progress))
        if self.resumed:
            progress.say(f"resumed at step {self.state.step} from {self.checkpoints}")
        return log, progress

    def step(self, factor: float) -> StepReport:
        """The next step, with `factor` on the peak learning rate; `settle` takes note of it."""
        config, state, parallel, began = self.config, self.state, self.parallel, time.perf_counter()
        # dropout inside the model; ranks must not repeat each other's
        torch.manual_seed((config.seed * 1_000_003 + state.step + (parallel.rank << 40)) & 0x7FFFFFFFFFFFFFFF)
        firsts = range(state.samples, state.samples + config.rows_per_step, config.batch_size)
        slices = [parallel.rows(first, config.batch_size) for first in firsts]
        batches = [self.mixer.batch(first, count) for first, count in slices]
        state.samples += config.rows_per_step
        waited = time.perf_counter() - began
        report = train_step(state, batches, factor)
        tokens = parallel.size * sum(int(b.batch.valid.sum()) for b in batches) if self._documents else None
        self._unread.append(_Step(state.step, state.samples, report, time.perf_counter() - began, waited, tokens))
        return report

    def judge(self, report: dict[str, float]) -> bool:
        """Whether a validation is the best so far, by the number that `checkpoint.best` names."""
        if not (name := self._judged_by):
            return False
        self._score = self.state.step, report[name]
        better = report[name] < self.best
        self.best = min(self.best, report[name])
        return better

    def settle(self, meter: TaskMeter | None = None, log: RunLog | None = None) -> None:
        """Take note of the steps since the last call; the host waits once, for all of them.

        Raises:
            TrainingAborted: `max_bad_steps` consecutive steps were skipped.
        """
        steps, self._unread, began = self._unread, [], time.perf_counter()
        if not steps:
            return
        StepReport.read([step.report for step in steps])
        steps[-1] = steps[-1]._replace(seconds=steps[-1].seconds + time.perf_counter() - began)
        state, rows = self.state, self.config.rows_per_step
        for number, samples, report, seconds, waited, tokens in steps:
            state.count(report)
            self.speed.add(report, seconds, waited, tokens)
            if meter is not None:
                meter.add(report)
            if report.taken:
                continue
            # the samples' numbers are their keys: the source gives the same rows for them again
            lost = {"first_sample": float(samples - rows), "sample_count": float(rows), "spike": float(report.spike)}
            if log is not None:
                log.write(number, "skipped", lost | {"loss": report.loss, "grad_norm": report.grad_norm})
            if state.bad_steps >= self.config.max_bad_steps:
                self.saver.wait()
                raise TrainingAborted(
                    f"{state.bad_steps} steps in a row had a loss or gradient that is not finite, or a loss spike "
                    f"(step {number}); {_LOWER}"
                )

    @property
    def _validation_rows(self) -> int:
        wanted = self.config.data.validation_rows
        return 0 if self.validation is None else min(wanted, self.validation.rows or wanted)

    def validate(self) -> dict[str, float]:
        """The report of `validate` on the averaged weights."""
        assert self.validation is not None
        draws, rows = self.config.logging.validation_draws, self._validation_rows
        with self.state.ema.applied():
            size = (rows, draws, min(self.config.batch_size, rows * draws))
            report = self.network.validate(self.state.token_nll, self.validation, *size, self.parallel)
            self.parallel.rest()
        return report

    def save(self) -> None:
        """Write a checkpoint of this very state; several processes may still be writing when this returns.
        Raises TrainingAborted where the weights are not finite, OSError for a full or read-only disk and the like."""
        self.settle()
        state = self.state
        if self.parallel.agree(not state.finite())[0]:
            raise TrainingAborted(f"the weights are no longer finite at step {state.step}; {_LOWER}")
        plain = position(state) | {"config": asdict(self.config), "facts": self.facts}
        if self._score is not None and self._score[0] == state.step and math.isfinite(self._score[1]):
            plain |= {"score": self._score[1], "scored": self._scored}
        self.data_losses.save(self.parallel)
        self.parallel.rest()
        content = RunCheckpoint(dict(state.model.state_dict()), state.ema.average, state.optimisers.state(), plain)
        self.saver.save(content)

    def averaged(
        self, dtype: torch.dtype = torch.float32, device: torch.device | None = None, adapter: Path | None = None
    ) -> MaskedTransformer | None:
        """The averaged weights as a whole model in evaluation mode, on rank 0; None on the others, which must call it too.
        `device` None is the run's. `adapter`: where to write adapters, if there are any, before they are folded in."""
        average, adapted = {}, self.config.lora.rank > 0
        for name, value in self.state.ema.average.items():
            full, kept = whole(value), torch.float32 if adapted else dtype
            if self.parallel.main:  # a copy where adapters will be folded in, which changes weights in place
                average[name] = full.to(device or full.device, kept, copy=adapted)
        if not self.parallel.main:
            return None
        with torch.device("meta"):  # neither memory nor random draws
            model = type(self.model).from_config(dict(self.model.config))
            add_adapters(model, self.config.lora)
        fixed = {n: x.to(device or x.device) for n, x in self.model.named_buffers() if n in model.state_dict()}
        model.load_state_dict(average | fixed, assign=True)
        if adapted and adapter is not None:
            export_adapter(model, adapter)
        merge_adapters(model)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        return model.eval()

    def export(self, folder: Path) -> None:
        """Write the averaged weights as a folder for `MaskedTransformer.from_pretrained`, which appears whole or not at all;
        adapters beside it as well, as a folder of peft (`adapter` beside `model`).

        Rank 0 writes; all ranks must call it. Raises ValueError for weights that are not finite, or a folder that holds
        something else than an export.
        """
        settings, source = self.config.checkpoint, self.source
        adapter = folder.with_name(folder.name.replace("model", "adapter"))
        model = self.averaged(getattr(torch, settings.export_dtype), torch.device("cpu"), adapter)
        if model is None:
            return
        for name, value in model.state_dict().items():
            if not torch.isfinite(value).all():
                hint = "set checkpoint.export_dtype=bfloat16, or " if value.dtype == torch.float16 else ""
                raise ValueError(
                    f"the averaged weights {name} are not finite in {settings.export_dtype}, so nothing is exported; "
                    f"{hint}lower optimiser.lr"
                )
        own = self.config.tasks
        tasks = tuple(t for t in TASKS if getattr(own, t).weight > 0 or (t == "generate" and self._documents))
        trained = TrainedOn((source.grid[0], source.grid[1]), source.text_length, tasks)
        check_replaceable(folder, others_in_model, "model")
        with replacing_folder(folder) as temporary:
            model.save_pretrained(temporary)
            words = json.dumps(source.vocabulary.to_dict(), indent=1)
            (temporary / "vocabulary.json").write_text(words, encoding="utf-8")
            trained.save(temporary, started_from=settings.init_from or None)


def train(
    config: TrainConfig,
    environment: Mapping[str, str],
    check: Callable[[TokenSource], None] | None = None,
    finish: Callable[[], None] | None = None,
) -> int:
    """A run of `config` on its data, by this process and those that `torchrun` started with it; see `Trainer`.

    Args:
        check: sees the training tokens first, and raises ValueError for those that do not fit.
        finish: called by one process when the run is at its end or was stopped.

    Returns:
        0, or 1 after one line when the run had to be aborted.
    """
    check_config(config)
    check_run_folder(Path(config.output), "output", config.checkpoint.init_from)
    parallel = Parallel(pick_device(config.device), config.parallel, launch_of(environment))
    try:
        with parallel.locked(Path(config.output), "training"):  # before anything is written or read there
            with parallel.main_first():  # raw shards are encoded once
                source, validation = open_sources(config)
            if check is not None:
                check(source)
            documents = open_documents(config)
            Trainer(config, source, validation, sheet_sampler(config, source, validation), parallel, documents).train()
            if finish is not None and parallel.main:
                finish()
    except TrainingAborted as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if parallel.size > 1 and lost_peer(error):
            raise ValueError("another process of this run has ended; it says why") from error
        raise
    finally:
        parallel.close()
    return 0


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _validation_line(step: int, report: dict[str, float]) -> str:
    shown = [name for name in report if name.endswith(("_nelbo", "_nelbo_text", "_nelbo_image", "flow_loss"))]
    return f"step {step} validation  " + "  ".join(f"{name} {report[name]:.3f}" for name in shown)
