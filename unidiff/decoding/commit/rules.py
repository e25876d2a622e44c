"""Commit rules of one's own: what the sampler asks of them, and what it makes sure of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from unidiff.decoding.commit.choose import ranking_slack, take_best
from unidiff.decoding.config import ModalityDecoding
from unidiff.schema import check_value
from unidiff.tokens import Modality


class CommitRule(Protocol):
    """Which candidates of a pass are filled, in place of `ModalityDecoding.rule`.

    Rows must not depend on each other, and the same arguments must give the same answer.
    """

    def __call__(self, confidence: Tensor, score: Tensor, live: Tensor, count: Tensor, index: Tensor) -> Tensor:
        """bool `[B, n]`, the candidates to fill; entries that are not live do not matter.

        Args:
            confidence: float64 `[B, n]`, how sure the model is of the token it chose.
            score: float64 `[B, n]`, the same with the choice noise of the settings.
            live: bool `[B, n]`, real candidates; the others are padding.
            count: int64 `[B]`, how many the settings would fill: their quota, or all that is left of the block.
            index: int64 `[B, n]`, positions in the row, ascending over the live ones.
        """
        ...


def check_rules(rules: Mapping[Modality, CommitRule] | None) -> dict[Modality, CommitRule]:
    """The rules by modality; raises `ValueError` for other keys, or what cannot be called."""
    check_value(rules, Mapping[Any, Any] | None, "rules")
    if wrong := [rule for rule in (rules or {}).values() if not callable(rule)]:
        raise ValueError(f"rules has {wrong[0]!r} as a rule; expected a function, see `CommitRule`")
    if rules and (unknown := [key for key in rules if not isinstance(key, Modality)]):
        raise ValueError(f"rules has the key {unknown[0]!r}; expected Modality.TEXT or Modality.IMAGE")
    return dict(rules or {})


def guarded(rule: CommitRule, settings: ModalityDecoding) -> Callable[..., Tensor]:
    """The rule with two promises: live candidates only, and at least the best one of every row that has any.

    It gets copies, so that writing in its arguments does not reach the decode.

    Raises (when called):
        ValueError: the rule returns no bool `[B, n]`.
    """

    def decide(confidence: Tensor, score: Tensor, live: Tensor, count: Tensor, index: Tensor) -> Tensor:
        pick = rule(confidence.clone(), score.clone(), live.clone(), count.clone(), index.clone())
        if not isinstance(pick, Tensor) or pick.shape != live.shape or pick.dtype != torch.bool:
            found = f"{pick.dtype} {tuple(pick.shape)}" if isinstance(pick, Tensor) else type(pick).__name__
            raise ValueError(f"the commit rule returned {found}; expected bool {tuple(live.shape)}")
        pick = pick.to(live.device) & live
        none = ~pick.any(1)
        return pick | take_best(score, live, none.long(), ranking_slack(settings))

    return decide
