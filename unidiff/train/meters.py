"""What is logged of steps: losses by task, modality and mask rate, the experts' loads, and how fast a run goes."""

from __future__ import annotations

import torch
from torch import Tensor

from unidiff.models.trained_on import TASKS
from unidiff.train.config import TrainConfig
from unidiff.train.cost.plan import TrainingRow, block_causal_pairs, model_size, row_flops
from unidiff.train.data.source import TokenSource
from unidiff.train.step import TIME_BUCKETS, StepReport


class TaskMeter:
    """Sums step reports between two log lines; per task and modality apart.

    Args:
        experts: how many a layer with a mixture has.
        drawn: what is measured at image positions, for the names of numbers.
    """

    def __init__(self, experts: int = 0, drawn: str = "nll") -> None:
        self._experts, self._kinds = experts, ("nll", drawn)
        self._sums: dict[str, Tensor] = {}
        self._steps = 0

    def add(self, report: StepReport) -> None:
        if report.taken:
            self._steps += 1
            for name in ("loss", "grad_norm", "nll", "hidden", "rows", "by_time", "balance", "loads"):
                value = torch.as_tensor(getattr(report, name), dtype=torch.float64)
                self._sums[name] = self._sums.get(name, 0.0) + value

    def take(self) -> dict[str, float]:
        """Means since the last call: `loss`, `grad_norm`, `share/<task>`, and nats per hidden token:
        `nll/<task>/<modality>`, and `nll_at/<from>-<to>` by mask rate. With experts, `router/balance`, the balance loss;
        `router/busiest`, tokens of the busiest expert of a layer over the mean, the largest of all layers; `router/idle`, the
        share of experts without tokens."""
        if not self._steps:
            return {}
        sums, out = self._sums, {name: float(self._sums[name]) / self._steps for name in ("loss", "grad_norm")}
        for number, task in enumerate(TASKS):
            if sums["rows"][number] > 0:
                out[f"share/{task}"] = float(sums["rows"][number] / sums["rows"].sum())
            for column, modality in enumerate(("text", "image")):
                if (count := float(sums["hidden"][number, column])) > 0:
                    out[f"{self._kinds[column]}/{task}/{modality}"] = float(sums["nll"][number, column]) / count
        for number, (nll, count) in enumerate(sums["by_time"].tolist()):
            if count > 0 and self._kinds[1] == "nll":
                out[f"nll_at/{number / TIME_BUCKETS:.1f}-{(number + 1) / TIME_BUCKETS:.1f}"] = nll / count
        if self._experts:
            loads = sums["loads"].view(-1, self._experts)
            shares = self._experts * loads / loads.sum(1, keepdim=True).clamp_min(1)
            out["router/balance"] = float(sums["balance"]) / self._steps
            out |= {"router/busiest": float(shares.max()), "router/idle": float((loads == 0).double().mean())}
        self._sums, self._steps = {}, 0
        return out


class SpeedMeter:
    """How fast a run of so many processes goes between two log lines, and what it waits for."""

    def __init__(self, config: TrainConfig, source: TokenSource, processes: int) -> None:
        text, image = source.text_length, source.grid[0] * source.grid[1]
        self._tokens, self._rows = config.rows_per_step * (text + image), config.rows_per_step
        self._row_flops, self._token_flops = 0.0, (0.0, 0.0)  # not counted for other networks
        self._peak = config.logging.peak_tflops * 1e12 * processes
        self._reset()
        if config.network != "masked":
            return
        vocabulary, size = source.vocabulary, model_size(config.model, source.vocabulary.size)
        block = config.model.get("block_length")
        pairs = block_causal_pairs(text + image, block) if block else None
        row = TrainingRow(text, image, vocabulary.text_size, vocabulary.image_size, 0.0, pairs)
        self._row_flops = row_flops(size, row).total  # without the head, whose share the masks decide
        self._token_flops = (
            6.0 * size.hidden_size * vocabulary.text_size,
            6.0 * size.hidden_size * vocabulary.image_size,
        )

    def _reset(self) -> None:
        self._seconds, self._waited, self._done = 0.0, 0.0, 0  # the last in tokens
        self._scored = torch.zeros(2, dtype=torch.float64)

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
        out = {"tokens_per_second": self._done / self._seconds}
        out |= {"tflops": flops / 1e12} if self._row_flops else {}
        out["data_wait"] = self._waited / self._seconds
        if self._peak and self._row_flops:
            out["mfu"] = flops / self._peak
        self._reset()
        return out
