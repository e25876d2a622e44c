"""Caches on a trained pipeline: EmojiEval's quality beside the seconds of the decodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

from unidiff.decoding import SamplerConfig
from unidiff.evaluation.decode_benchmark import Benchmark, Options, Progress, Row, machine, thread_count, usable_device
from unidiff.evaluation.decode_benchmark_rates import MatmulRates, measure_rates, row_counts
from unidiff.evaluation.decode_benchmark_suites import MAIN, POLICIES
from unidiff.evaluation.emoji_eval import profile_of
from unidiff.evaluation.emoji_judge import EmojiEval
from unidiff.evaluation.emoji_model import PipelineModel
from unidiff.evaluation.report import Report
from unidiff.pipeline import UniDiffPipeline
from unidiff.pipelines.output import UniDiffOutput

QUALITY = {
    "text_to_image": "text_to_image",
    "caption": "caption_exact",
    "answer": "answer_accuracy",
    "inpaint": "inpainting",
}
"""Tasks, and which number of the report is their quality."""


@dataclass(frozen=True)
class Setting:
    """How the targets of a task are decoded.

    Args:
        rule: commit rule; `model`: the pipeline's own settings for the task, whatever else is said here.
        passes: of a whole modality, for quotas.
        block: tokens per block; None for all at once.
    """

    rule: str = "model"
    passes: int | None = None
    block: int | None = None

    def config(self, config: SamplerConfig) -> SamplerConfig:
        """A task's sampler with this setting for both modalities."""
        if self.rule == "model":
            return config
        steps = {} if self.passes is None else {"steps": self.passes}
        changes: dict[str, Any] = {"rule": self.rule, "block_length": self.block, **steps}
        return replace(config, text=replace(config.text, **changes), image=replace(config.image, **changes))


SETTINGS = (
    Setting(),
    *(Setting("quota", passes) for passes in (4, 8, 16, 32, 64)),
    *(Setting("quota", passes, 16) for passes in (8, 16, 64)),
    Setting("threshold", None, 16),
    Setting("factor", None, 16),
)


class Watched:
    """A pipeline whose decodes are counted: hands every call on and keeps the outputs."""

    def __init__(self, pipe: UniDiffPipeline) -> None:
        self._pipe = pipe
        self.outputs: list[UniDiffOutput] = []

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._pipe, name)
        if name not in QUALITY:
            return found

        def call(*args: Any, **options: Any) -> UniDiffOutput:
            out = found(*args, **options)
            self.outputs.append(out)
            return out

        return call


def run_emoji(
    pipe: UniDiffPipeline,
    options: Options,
    progress: Progress = lambda what: None,
    settings: Sequence[Setting] = SETTINGS,
    batches: Sequence[int] = (1, 16),
    tasks: Sequence[str] = tuple(QUALITY),
) -> Benchmark:
    """Every policy with every setting, on the same cases and seeds. The baseline of a speed-up is the same setting.

    Args:
        pipe: trained on emoji scenes.
        options: `cases` per category; `blocks` does not apply, `runs` repeats the timing.
        settings, batches, tasks: the matrix.

    Raises:
        ValueError: an unknown policy or device, or pictures of another size.
    """
    device = usable_device(options.device or "cpu")
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    names = options.policies(MAIN)
    config = pipe.transformer.config
    with thread_count(options.threads):
        about = {"model": dict(config), "what": "EmojiEval", "cases": options.cases, **machine(device)}
        result = Benchmark("emoji", about={**about, "blocks": "all", "runs": options.runs or 1})
        length = pipe.settings.text_length + pipe.settings.grid[0] * pipe.settings.grid[1]
        for batch in batches:
            rates = measure_rates(pipe.transformer, row_counts(length * batch, batch))
            for task in tasks:
                run_task(pipe, task, names, settings, batch, options, rates, result, progress)
    return result


def run_task(
    pipe: UniDiffPipeline,
    task: str,
    names: Sequence[str],
    settings: Sequence[Setting],
    batch: int,
    options: Options,
    rates: MatmulRates,
    result: Benchmark,
    progress: Progress,
) -> None:
    """All settings and policies of one task, in turn; adds to the rows of `result`."""
    for setting in settings:
        config = setting.config(pipe.settings.sampler(task))
        trials = {name: Trial(pipe, task, name, config, batch, options) for name in names}
        for trial in trials.values():  # warm-up
            trial.warm_up()
        for _ in range(options.runs or 1):
            for name, trial in trials.items():
                progress(f"{task}, {setting.rule}, {name}, {batch} rows")
                trial.run()
        result.rows += [trial.row(trials["none"], setting, rates) for trial in trials.values()]


@dataclass
class Trial:
    """One policy with one setting: runs the cases, as often as asked."""

    pipe: UniDiffPipeline
    task: str
    name: str
    config: SamplerConfig
    batch: int
    options: Options

    def __post_init__(self) -> None:
        self.seconds: list[float] = []  # per row of the decodes
        self.outputs: list[UniDiffOutput] = []
        self.report: Report | None = None

    def run(self) -> None:
        """All cases once."""
        self.report, outputs = self._evaluate(self.options.cases)
        self.outputs = outputs
        self.seconds.append(sum(out.seconds for out in outputs) / sum(len(out.texts) for out in outputs))

    def warm_up(self) -> None:
        """One case, not kept."""
        self._evaluate(1)

    def _evaluate(self, cases: int) -> tuple[Report, list[UniDiffOutput]]:
        watched = Watched(self.pipe)
        options: dict[str, Any] = {"policy": POLICIES[self.name].build(), "sampler": self.config}
        model = PipelineModel(cast(UniDiffPipeline, watched), self.batch, **options)
        return EmojiEval(model, profile_of(self.pipe), self.options.seed, cases).run([self.task]), watched.outputs

    def total(self, count: Callable[[UniDiffOutput], float]) -> float:
        """A sum over the decodes of the last run."""
        return sum(count(out) for out in self.outputs)

    def row(self, plain: Trial, setting: Setting, rates: MatmulRates) -> Row:
        """The numbers, compared with the same cases without a cache."""
        assert self.report is not None
        key = QUALITY[self.task]
        interval = self.report.intervals[key]
        flops, before = (t.total(lambda out: out.stats.flops) for t in (self, plain))
        ratios = sorted(a / b for a, b in zip(plain.seconds, self.seconds, strict=True))
        decodes = self.total(lambda out: len(out.texts))
        return Row(
            self.name,
            {"task": self.task, "block": setting.block, "passes": setting.passes, "rule": setting.rule}
            | {"dtype": str(self.pipe.transformer.dtype).removeprefix("torch."), "batch": self.batch},
            round(self.total(lambda out: out.nfe * len(out.texts)) / decodes),
            sorted(self.seconds)[len(self.seconds) // 2],
            self.seconds,
            ratios[len(ratios) // 2],
            before / flops,
            before / flops * rates(self._rows()) / rates(plain._rows()),
            quality=self.report.values[key],
            quality_low=interval.low,
            quality_high=interval.high,
            stats={"decodes": decodes, "flops": flops, "sampler": asdict(self.config)},
        )

    def _rows(self) -> int:
        """Mean number of rows in a matrix product: what the correction of a bound is for."""
        layers = self.pipe.transformer.config.num_layers
        calls = self.total(lambda out: out.stats.full_passes + out.stats.partial_passes)
        return max(1, round(self.total(lambda out: out.stats.ffn_tokens) / layers / max(calls, 1)))
