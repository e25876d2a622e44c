"""What a run measures between two log lines: losses by task and by mask rate, speed, and what it waits for."""

from __future__ import annotations

from statistics import fmean

import torch

from unidiff.models.trained_on import TASKS
from unidiff.train.config import TrainConfig
from unidiff.train.cost.plan import TrainingRow, block_causal_pairs, model_size, row_flops
from unidiff.train.data.source import TokenSource
from unidiff.train.step import TIME_BUCKETS, StepReport


class TaskMeter:
    """Sums step reports between two log lines; per task and modality apart."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._sums = torch.zeros(2, len(TASKS), 2, dtype=torch.float64)
        self._rows = torch.zeros(len(TASKS), dtype=torch.float64)
        self._by_time = torch.zeros(TIME_BUCKETS, 2, dtype=torch.float64)
        self._losses: list[float] = []
        self._norms: list[float] = []

    def add(self, report: StepReport) -> None:
        if not report.taken:
            return
        self._sums += torch.stack([report.nll, report.hidden]).double()
        self._rows += report.rows.double()
        self._by_time += report.by_time.double()
        self._losses.append(report.loss)
        self._norms.append(report.grad_norm)

    def take(self) -> dict[str, float]:
        """Means since the last call: `loss`, `grad_norm`, `share/<task>`, and nats per hidden token:
        `nll/<task>/<modality>`, and `nll_at/<from>-<to>` by mask rate."""
        if not self._losses:
            return {}
        out = {"loss": fmean(self._losses), "grad_norm": fmean(self._norms)}
        for number, task in enumerate(TASKS):
            if self._rows[number] > 0:
                out[f"share/{task}"] = float(self._rows[number] / self._rows.sum())
            for column, modality in enumerate(("text", "image")):
                nll, count = self._sums[:, number, column].tolist()
                if count > 0:
                    out[f"nll/{task}/{modality}"] = nll / count
        for number, (nll, count) in enumerate(self._by_time.tolist()):
            if count > 0:
                out[f"nll_at/{number / TIME_BUCKETS:.1f}-{(number + 1) / TIME_BUCKETS:.1f}"] = nll / count
        self._reset()
        return out


class SpeedMeter:
    """How fast a run goes between two log lines, and what it waits for.

    Args:
        config: model, batch and `logging.peak_tflops`.
        source: token counts of a row.
        processes: how many share the run.
    """

    def __init__(self, config: TrainConfig, source: TokenSource, processes: int) -> None:
        text, image = source.text_length, source.grid[0] * source.grid[1]
        vocabulary, size = source.vocabulary, model_size(config.model, source.vocabulary.size)
        block = config.model.get("block_length")
        pairs = block_causal_pairs(text + image, block) if block else None
        row = TrainingRow(text, image, vocabulary.text_size, vocabulary.image_size, 0.0, pairs)
        self._row_flops = row_flops(size, row).total  # without the head, whose share the masks decide
        self._token_flops = tuple(6.0 * size.hidden_size * n for n in (vocabulary.text_size, vocabulary.image_size))
        self._tokens, self._rows = config.rows_per_step * (text + image), config.rows_per_step
        self._peak = config.logging.peak_tflops * 1e12 * processes
        self._reset()

    def _reset(self) -> None:
        self._seconds, self._waited, self._scored = 0.0, 0.0, torch.zeros(2, dtype=torch.float64)
        self._done = 0  # tokens

    def add(self, report: StepReport, seconds: float, waited: float, tokens: int | None = None) -> None:
        """A step that took `seconds`, `waited` of them for its data.

        Args:
            tokens: of the step, over all processes, where rows have other lengths than pairs; attention is then counted as in
                as many tokens of pairs.
        """
        self._done += self._tokens if tokens is None else tokens
        self._seconds, self._waited = self._seconds + seconds, self._waited + waited
        self._scored += report.hidden.double().sum(0)

    def take(self) -> dict[str, float]:
        """Since the last call: `tokens_per_second`; `data_wait`, the share of time without data; `tflops`, useful
        10^12 operations per second of all processes; `mfu`, their share of the peak where `logging.peak_tflops` says it."""
        if not self._done:
            return {}
        scored = sum(n * f for n, f in zip(self._scored.tolist(), self._token_flops, strict=True))
        flops = (self._done / self._tokens * self._rows * self._row_flops + scored) / self._seconds
        out = {"tokens_per_second": self._done / self._seconds, "tflops": flops / 1e12}
        out["data_wait"] = self._waited / self._seconds
        if self._peak:
            out["mfu"] = flops / self._peak
        self._reset()
        return out
