"""Arguments of constructors against what they declare: every wrong type for every argument of every model."""

from __future__ import annotations

import inspect
import typing
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unidiff.models.config import TransformerConfig
from unidiff.models.mmdit import MMDiT
from unidiff.models.transformer import MaskedTransformer
from unidiff.schema import Between, Depth, Width, check_arguments, check_value, field_types
from unidiff.tokens import Vocabulary
from unidiff.tokens.image.conv import ConvVQModel, LFQModel
from unidiff.tokens.image.vq import CellVQModel

MODELS = {
    MaskedTransformer: {"vocab_size": 12, "hidden_size": 16, "num_layers": 1, "num_heads": 2},
    MMDiT: {"num_layers": 0, "num_single_layers": 0, "num_heads": 2, "text_vocab_size": 8},
    CellVQModel: {},
    ConvVQModel: {},
    LFQModel: {},
}
HINTS = {MaskedTransformer: field_types(TransformerConfig)}
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.text(max_size=3),
    st.sampled_from(
        [float("nan"), float("inf"), -1, -1.5, 1e300, 2**40, 10**30, {}, {"a": 1}, [[]], ["x"], [None], b"x"]
    ),
)


@settings(max_examples=150)
@given(st.sampled_from(list(MODELS)), st.data())
def test_a_wrong_argument_is_one_sentence(model: Any, data: Any):
    parameters = [name for name in inspect.signature(model.__init__).parameters if name != "self"]
    name, value = data.draw(st.sampled_from(parameters)), data.draw(ODD)
    hints = HINTS.get(model) or typing.get_type_hints(model.__init__, include_extras=True)
    try:
        with torch.device("meta"):
            made = model(**{**MODELS[model], name: value})
    except ValueError as error:
        assert "\n" not in str(error)
        return
    check_value(value, hints[name], name)  # taken, so it was a fine one
    assert made.config[name] == value or value is None


def test_bounds_and_lists():
    def function(size: Width, depth: Depth | None = None, shape: tuple[int, ...] = (), flag=False) -> None: ...

    check_arguments(function, {"size": 3, "depth": None, "shape": [1, 2], "flag": True, "other": object()}, "f")
    for name, value, said in (
        ("size", 0, "f size is 0; expected a whole number from 1 to"),
        ("size", 2**20 + 1, "expected a whole number from 1 to"),
        ("depth", 1025, "or nothing"),
        ("shape", [1, "x"], "f shape"),
        ("flag", 1, "expected true or false"),
        ("flag", None, "expected true or false"),
    ):
        with pytest.raises(ValueError, match=said):
            check_arguments(function, {name: value}, "f")
    check_value(2.5, typing.Annotated[float, Between(2, 3)], "x")
    for value in (1.9, 3.1, float("nan"), True):
        with pytest.raises(ValueError, match=r"x is .*; expected a finite number from 2 to 3"):
            check_value(value, typing.Annotated[float, Between(2, 3)], "x")


@settings(max_examples=150)
@given(st.sampled_from(["size", "text", "image", "mask_id", "image_mask_id", "specials"]), ODD)
def test_vocabularies_take_plain_numbers_only(name: str, value: Any):
    good = Vocabulary.unified(5, 4, {"eos": 0}).to_dict()
    try:
        Vocabulary.from_dict({**good, name: value})
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert (name, value) in (("image_mask_id", None), ("specials", {}), ("specials", {"a": 1}))
    for wrong in (None, [], "x", 3, {**good, "more": 1}, {k: v for k, v in good.items() if k != "size"}):
        with pytest.raises(ValueError, match="vocabulary"):
            Vocabulary.from_dict(wrong)
