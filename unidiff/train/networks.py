"""What a run can train: a masked transformer over text and image codes, or a dual model of masked text and image latents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from unidiff.models.trained_on import TASKS
from unidiff.tokens import Vocabulary
from unidiff.train.build import build_model
from unidiff.train.config import TrainConfig
from unidiff.train.cost.dual import plan_dual
from unidiff.train.cost.plan import Plan, make_plan
from unidiff.train.data.source import TokenSource
from unidiff.train.dual import DualNLL, build_dual, dual_report_names, validate_dual
from unidiff.train.step import TokenNLL, report_names, validate


class Network(NamedTuple):
    """How one kind of network is trained; each function has the arguments of that of the masked transformer.

    `fallback`: the number of the validation report that a run is judged by, if it is there; otherwise the NELBO of what is trained.
    `drawn`: what the loss of image positions is called in logs.
    `plan`: what a run on so many GPUs would cost.
    """

    build: Callable[[TrainConfig, TokenSource], Any]
    loss: Callable[[Any, Vocabulary, TrainConfig], TokenNLL]
    report_names: Callable[[TokenSource, int], set[str]]
    validate: Callable[..., dict[str, float]]
    plan: Callable[[TrainConfig, int], Plan]
    fallback: str = ""
    drawn: str = "nll"

    def judged_by(self, config: TrainConfig, known: set[str]) -> str:
        """The number of the validation report, of those that are `known`, by which the best checkpoint is chosen; "" for none.

        Raises:
            ValueError: `checkpoint.best` names another one.
        """
        best = config.checkpoint.best
        if best == "auto":
            wanted = {"generate": "joint_nelbo"} | {task: f"{task}_nelbo" for task in TASKS[1:]}
            trained = (wanted[task] for task in TASKS if getattr(config.tasks, task).weight > 0)
            return next((name for name in (self.fallback, *trained) if name in known), "")
        if best and best not in known:
            raise ValueError(f"checkpoint.best = {best!r} is not in the validation report; it has {sorted(known)}")
        return best


def _masked_loss(model: Any, vocabulary: Vocabulary, config: TrainConfig) -> TokenNLL:
    own, flex = config.objective, config.attention_kernel == "flex"
    return TokenNLL(model, vocabulary, own.chunk, config.precision == "bf16", flex, own.balance_weight)


def _dual_loss(model: Any, vocabulary: Vocabulary, config: TrainConfig) -> TokenNLL:
    own = config.objective
    return DualNLL(model, vocabulary, own.chunk, config.precision == "bf16", image_weight=own.image_weight)


NETWORKS = {
    "masked": Network(
        lambda config, source: build_model(config, source.vocabulary.size),
        _masked_loss,
        report_names,
        validate,
        make_plan,
    ),
    "dual": Network(build_dual, _dual_loss, dual_report_names, validate_dual, plan_dual, "flow_loss", "squared_error"),
}
"""By `TrainConfig.network`."""
