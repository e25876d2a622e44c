"""What the evaluations of all worlds share: tasks that are run one by one, their numbers, and the cases as people look at them."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch

from unidiff.diffusion.noise import keyed_bits
from unidiff.evaluation.benchmark.trials import TARGETS
from unidiff.evaluation.kept import KeptRows
from unidiff.evaluation.metrics.base import METRICS, CaptionedPictures, model_metrics
from unidiff.evaluation.report import Estimate, EvaluationReport, JudgedCase, Measure
from unidiff.pipeline import UniDiffPipeline
from unidiff.worlds.asked import PipelineModel, bytes_of, row_name


class Judging(ABC):
    """A model, its cases, and what came out. `run` calls `run_TASK` for each of `tasks`."""

    tasks: ClassVar[tuple[str, ...]]
    model: PipelineModel
    seed: int
    n: int
    progress: Callable[[str], None]
    report: EvaluationReport

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """Whatever identifies the evaluation besides seed and n."""

    @abstractmethod
    def describe(self, reading: Any) -> str:
        """What the reader saw, in words."""

    @abstractmethod
    def seed_of(self, task: str) -> int:
        """A seed of its own for each task."""

    def run(self, tasks: Sequence[str]) -> EvaluationReport:
        """Run the named parts; each adds its numbers to the report."""
        if unknown := [t for t in tasks if t not in self.tasks]:
            raise ValueError(f"unknown task {unknown[0]!r}; expected some of {', '.join(self.tasks)}")
        start = time.perf_counter()
        self.report.about |= {"seed": self.seed, "n": self.n, **self.about()}
        for task in tasks:
            getattr(self, f"run_{task}")()
        self.report.add("seconds", self.report.values.get("seconds", 0.0) + time.perf_counter() - start)
        return self.report

    def look(
        self, task: str, category: str | Sequence[str], seeds: Sequence[int], right: Sequence[bool], **shown: Any
    ) -> None:
        """Note cases as a person looks at them; `given` and `drawn` are pictures, `seen` readings, the others words."""
        shots = {word: bytes_of(shown.pop(word)).numpy() for word in ("given", "drawn") if word in shown}
        words = {name: [self.describe(v) if name == "seen" else v for v in values] for name, values in shown.items()}
        counts = Counter[str]()
        for i, seed in enumerate(seeds):
            own = category if isinstance(category, str) else category[i]
            pictures = tuple((word, shot[i]) for word, shot in shots.items())
            said = {name: values[i] for name, values in words.items()}
            case = JudgedCase(task, own, counts[own], right[i], **said, pictures=pictures, row=row_name(task, seed))
            self.report.cases.append(case)
            counts[own] += 1

    def share(self, key: str, right: Sequence[bool]) -> Estimate:
        """Add a share with its interval to the report."""
        estimate = Estimate.share(right)
        self.report.add(key, estimate)
        return estimate

    def answered(self, kinds: Sequence[str], known: Sequence[str], right: Sequence[bool]) -> None:
        """Add the shares of right answers, in all and by kind, and how far the best constant answer of each kind gets."""
        self.share("answer_accuracy", right)
        common = 0
        for kind in sorted(set(kinds)):
            of_kind = [i for i, k in enumerate(kinds) if k == kind]
            self.share(f"answers.{kind}", [right[i] for i in of_kind])
            common += Counter(known[i] for i in of_kind).most_common(1)[0][1]
        self.report.add("answer_baseline", common / len(kinds))

    def seeds(self, task: str, n: int) -> list[int]:
        """A seed for each row of a task."""
        return (keyed_bits(self.seed_of(task), torch.arange(n), 0, 1)[:, 0] >> 2).abs().tolist()


@dataclass(frozen=True)
class Examination:
    """What a world's evaluation consists of.

    Args:
        judge: (model, progress) -> who judges. tasks: of its tasks, those that ask the model to decode.
        parts: categories of the tasks that have more than one. captions: (n) -> cases of metrics.
        measure_of: (task, key) -> how a number is shown.
        usual: tasks and metrics where none are asked for. extra: further tasks, that read again what was drawn from texts.
    """

    judge: Callable[[PipelineModel, Callable[[str], None]], Any]
    tasks: tuple[str, ...]
    parts: Mapping[str, int]
    captions: Callable[[int], CaptionedPictures]
    measure_of: Callable[[str, str], Measure]
    usual: tuple[str, ...]
    extra: Mapping[str, Callable[[Any], None]] = field(default_factory=dict)


def examine(
    pipe: UniDiffPipeline,
    of: Examination,
    n: int,
    per_task: int | None,
    tasks: Sequence[str] | None,
    batch_size: int,
    tick: Callable[..., None],
    kept: KeptRows | None,
    options: Mapping[str, Any],
) -> EvaluationReport:
    """Run an evaluation; arguments as of `World.evaluate`. By default it has the usual tasks that the pipeline can do, and the report
    says which are left out. Raises ValueError: an unknown task, n or per_task below 1."""
    if per_task is not None and per_task < 1:
        raise ValueError(f"per_task is {per_task}; an evaluation needs at least one case")
    metrics, kept = model_metrics(), kept or KeptRows()
    usual = usual_tasks(pipe, of.usual)
    left_out = [task for task in of.usual if task not in usual and tasks is None]
    tasks = usual if tasks is None else tasks
    hidden_bar = getattr(pipe, "_progress_bar_config", {})
    cases = lambda task: n if per_task is None else -(-per_task // of.parts.get(task, 1))  # noqa: E731
    measured = [task for task in tasks if task in metrics]
    total = sum(of.parts.get(task, 1) * cases(task) for task in of.tasks if task in tasks)
    total += sum(METRICS[name].rounds * cases(name) for name in measured)
    progress = lambda what: tick(0, total, what)  # noqa: E731
    model = PipelineModel(pipe, batch_size, kept=kept, tick=lambda more: tick(more, total), **options)
    judge = of.judge(model, progress)
    known = (*judge.tasks, *of.extra, *metrics)
    if unknown := [task for task in tasks if task not in known]:
        raise ValueError(f"unknown task {unknown[0]!r}; expected some of {', '.join(known)}")
    start, report = time.perf_counter(), judge.report
    report.about |= {"seed": judge.seed, **judge.about()}  # also of metrics alone
    report.about |= {"left_out": ", ".join(left_out)} if left_out else {}
    pipe.set_progress_bar_config(**{**hidden_bar, "disable": True})
    try:
        for task in (*(t for t in judge.tasks if t in tasks), *(t for t in tasks if t in of.extra), *measured):
            before = set(report.values)
            if task in judge.tasks:
                judge.n = cases(task)
                judge.run([task])
            elif task in of.extra:
                of.extra[task](judge)
            else:
                progress(task)
                finished = kept.known(task)
                folder = None if kept.folder is None else kept.folder / task
                more: dict[str, Any] = {"tick": tick, "options": options, "folder": folder}
                given = replace(of.captions(cases(task)), **more)
                for key, value in kept.numbers(task, partial(metrics[task], pipe, given)).items():
                    report.add(key, value)
                tick(METRICS[task].rounds * cases(task) if finished else 0)
            report.measures |= {key: of.measure_of(task, key) for key in report.values.keys() - before - {"seconds"}}
    finally:
        pipe.set_progress_bar_config(**hidden_bar)
    report.about |= {"n": n} if per_task is None else {"n": None, "per_task": per_task}
    report.about |= {name: value for name, value in options.items() if isinstance(value, int | float | str)}
    networks = torch.nn.ModuleList([pipe.transformer, *pipe.layout.modules.values()])
    report.about["parameters"] = sum(p.numel() for p in networks.parameters())
    report.add("seconds", time.perf_counter() - start)
    return report


def usual_tasks(pipe: UniDiffPipeline, every: Sequence[str]) -> tuple[str, ...]:
    """Those that a pipeline can do: what its layout offers, what reads drawn pictures again, and likelihoods of pictures that
    are codes."""
    known = pipe.layout.tasks
    able = {"reader": True, "likelihood": not pipe.layout.latents, **{task: task in known for task in TARGETS}}
    return tuple(task for task in every if able.get(task, "text_to_image" in known))
