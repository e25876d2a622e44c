"""`fit_score` against numbers worked out by hand on a tabular model."""

from __future__ import annotations

import math

import pytest
import torch
from toy_model import TableModel, joint_tensor

from unidiff.diffusion.likelihood import fit_score, model_scorer

JOINT = {"00": 0.4, "01": 0.1, "10": 0.2, "11": 0.3}


def tabular() -> TableModel:
    return TableModel.from_joint(joint_tensor({s: str(p) for s, p in JOINT.items()}, 2))


def conditional(string: str, place: int) -> float:
    """p(token at `place` | the other token)."""
    both = sum(p for s, p in JOINT.items() if s[1 - place] == string[1 - place])
    return JOINT[string] / both


def test_mean_of_all_hidden_and_each_part_hidden() -> None:
    model = tabular()
    batch = model.request(4)
    batch = batch.replace(ids=torch.tensor([[int(c) for c in s] for s in JOINT]))
    score = fit_score(model_scorer(model, model.vocabulary), model.vocabulary, batch, batch.targets)
    first, second = {"0": 0.5, "1": 0.5}, {"0": 0.6, "1": 0.4}
    for row, string in enumerate(JOINT):
        alone = math.log(first[string[0]]) + math.log(second[string[1]])
        together = math.log(conditional(string, 0)) + math.log(conditional(string, 1))
        assert float(score[row]) == pytest.approx(0.5 * (alone + together), abs=1e-5)
    assert model.calls == 3


def test_only_wanted_positions_count_and_rows_do_not_mix() -> None:
    model = tabular()
    batch = model.request(2).replace(ids=torch.tensor([[0, 0], [1, 0]]))
    wanted = torch.tensor([[True, False], [False, False]])
    score = fit_score(model_scorer(model, model.vocabulary), model.vocabulary, batch, wanted)
    assert float(score[0]) == pytest.approx(math.log(conditional("00", 0)), abs=1e-5)
    assert float(score[1]) == 0
    assert batch.ids.tolist() == [[0, 0], [1, 0]]


def test_parts_below_two_are_refused() -> None:
    model = tabular()
    batch = model.request(1)
    with pytest.raises(ValueError, match="parts is 1"):
        fit_score(model_scorer(model, model.vocabulary), model.vocabulary, batch, batch.targets, parts=1)
