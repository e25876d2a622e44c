import pytest

from unidiff.data.rows import TEXT_PREFIX, caption_row, qa_pairs, question_row, task_tokens
from unidiff.tokens.text import TextTokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer.train(["what is it? a red car", "two cars"] * 4, 300)


def test_caption_rows(tokenizer):
    words = tokenizer.encode("two cars")
    row = caption_row(tokenizer, "  two cars\n", 12)
    assert row.ids == [tokenizer.special("caption"), *words] + [tokenizer.eos_id] * (12 - 1 - len(words))
    assert not row.cut and TEXT_PREFIX == 1
    exact = caption_row(tokenizer, "two cars", 1 + len(words))
    assert exact.ids[1:] == words and not exact.cut
    cut = caption_row(tokenizer, "two cars", len(words))
    assert cut.ids[1:] == words[:-1] and cut.cut
    empty = caption_row(tokenizer, "", 4)
    assert empty.ids == [tokenizer.special("caption")] + [tokenizer.eos_id] * 3


def test_a_typed_special_does_not_end_the_caption(tokenizer):
    row = caption_row(tokenizer, "<|eos|> car", 40)
    end = row.ids.index(tokenizer.eos_id)
    assert tokenizer.decode(row.ids[1:end]) == "<|eos|> car"


def test_question_rows(tokenizer):
    question, answer = tokenizer.encode("what is it?"), tokenizer.encode("a red car")
    row = question_row(tokenizer, "what is it?", "a red car", 40)
    assert row.answer_start == len(question) + 2
    assert row.ids[: row.answer_start] == [tokenizer.special("question"), *question, tokenizer.special("answer")]
    assert row.ids[row.answer_start :][: len(answer)] == answer
    assert row.ids[row.answer_start + len(answer) :] == [tokenizer.eos_id] * (40 - row.answer_start - len(answer))
    needed = row.answer_start + len(answer) + 1
    assert question_row(tokenizer, "what is it?", "a red car", needed).ids == row.ids[:needed]
    assert question_row(tokenizer, "what is it?", "a red car", needed - 1) is None


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"qa": [["a", "b"], ["c", "d"]]}, ([("a", "b"), ("c", "d")], 0)),
        ({"qa": [["a"], ["", "b"], ["a", 3], "ab", ["a", "b", "c"], ["q", "r"]]}, ([("q", "r")], 5)),
        ({"qa": "ab"}, ([], 1)),
        ({"qa": None}, ([], 0)),
        ({}, ([], 0)),
        (None, ([], 0)),
        ([["a", "b"]], ([], 0)),
    ],
)
def test_qa_pairs(metadata, expected):
    assert qa_pairs(metadata) == expected


def test_missing_task_tokens_are_named(tokenizer):
    task_tokens(tokenizer)
    with pytest.raises(ValueError, match="no special token 'caption'"):
        task_tokens(TextTokenizer.train(["x"], 300, ("eos",)))
