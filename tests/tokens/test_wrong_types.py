"""Public classes of tokens and tokenizers against wrong types: one sentence each, no error of a library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tiny_pipeline import tiny_pipeline

from unidiff import Span, TextTokenizer, TokenBatch, UniDiffPipeline, VQImageTokenizer
from unidiff.pipelines.options import whole

WRONG: tuple[Any, ...] = (
    *(None, 1.5, float("nan"), "x", b"x", {"a": 1}, {1}, object(), int, len, 1 + 2j, Exception("x")),
    *([None], [[1], 2], [1.5], torch.tensor([1.5]), torch.tensor([True]), torch.zeros(0, 2, 3), np.float32(2)),
)


@pytest.fixture(scope="module")
def calls() -> dict[str, Callable[[Any], Any]]:
    pipe = tiny_pipeline()
    vocabulary, row = pipe.settings.vocabulary, [Span.text([1, 2])]
    return {
        "text": Span.text,
        "image": Span.image,
        "masked text": lambda value: Span.masked_text(value, vocabulary),
        "masked image": lambda value: Span.masked_image(value, vocabulary),
        "vocabulary": lambda value: Span.masked_text(2, value),
        "rows": TokenBatch.from_spans,
        "batches": TokenBatch.cat,
        "pad_id": lambda value: TokenBatch.from_spans([row], pad_id=value),
        "pad_to": TokenBatch.from_spans([row]).pad_to,
        "encode images": pipe.images.encode,
        "decode codes": pipe.images.decode,
        "special": pipe.texts.special,
        "vocab_size": lambda value: TextTokenizer.train(["a b"], value),
        "image tokenizer": VQImageTokenizer,
        "text tokenizer": TextTokenizer,
        "transformer": lambda value: UniDiffPipeline(**{**pipe.components, "transformer": value}),
        "image tokenizer of a pipeline": lambda value: UniDiffPipeline(**{**pipe.components, "image_tokenizer": value}),
        "text tokenizer of a pipeline": lambda value: UniDiffPipeline(**{**pipe.components, "text_tokenizer": value}),
        "negative ids": lambda value: Span.masked_image((value, -1), vocabulary),
        "more than Python writes": lambda value: whole(10**5000, "steps", 1, 10),
    }


@pytest.mark.parametrize("value", WRONG, ids=lambda value: repr(value)[:20])
def test_wrong_types_are_refused(calls, value) -> None:
    for name, call in calls.items():
        with pytest.raises(ValueError, match=r"expected|give|has no special|must be|outside|cannot pad") as caught:
            call(value)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400, name


@pytest.mark.parametrize(
    "place", [None, 5, 1.5, b"x", [], {}, torch.zeros(2), object()], ids=lambda value: repr(value)[:20]
)
def test_paths_are_text_or_paths(place) -> None:
    pipe = tiny_pipeline()
    for call in (
        pipe.save_pretrained,
        pipe.transformer.save_pretrained,
        pipe.images.save_pretrained,
        pipe.texts.save_pretrained,
        VQImageTokenizer.from_pretrained,
        TextTokenizer.from_pretrained,
    ):
        with pytest.raises(ValueError, match="expected"):
            call(place)
    for name in ("safe_serialization", "variant", "push_to_hub"):
        with pytest.raises(ValueError, match="variant is" if name == "variant" else f"cannot take {name}"):
            pipe.save_pretrained("nowhere", **{name: 5 if place is None else place})


def test_a_text_is_decoded_from_whole_numbers() -> None:
    texts = tiny_pipeline().texts
    for ids in (None, 5, "x", [None], [1.5], ["1"], [[1]], {"a": 1}, torch.tensor([1.0])):
        with pytest.raises(ValueError, match="expected whole numbers"):
            texts.decode(ids)
    ids = texts.encode("a dog")
    assert texts.decode(iter(ids)) == texts.decode(torch.tensor(ids)) == texts.decode(np.array(ids)) == "a dog"


def test_ids_are_whole_numbers_of_every_kind() -> None:
    for ids in ([1, 2], (1, 2), range(1, 3), np.array([1, 2], np.int16), torch.tensor([1, 2], dtype=torch.uint8)):
        assert Span.text(ids).ids.tolist() == [1, 2] and Span.text(ids).ids.dtype == torch.int64
    assert Span.text([]).ids.shape == (0,)
    assert Span.image([[1, 2]]).ids.shape == (1, 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"given has shape \(3,\)"):
        Span.text([1, 2], torch.tensor([True, False, True]))
