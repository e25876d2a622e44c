import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from unidiff.tokens.text import TextTokenizer, special_token

CORPUS = [
    "two red apples on a blue background",
    "a car is left of a tree",
    "three apples, a car and a tree <|eos|> in the corner",
    "Ein Bär läuft über die Straße",
] * 3


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer.train(CORPUS, vocab_size=400)


@pytest.fixture(scope="module")
def reloaded(tokenizer, tmp_path_factory) -> TextTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return TextTokenizer.from_pretrained(folder)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
@example("")
@example(" leading and trailing ")
@example("\n\t\r\n  \u00a0\u2003\u200b")
@example("<|eos|><|caption|> <|question|>")
@example("e\u0301 is not \u00e9, \ufb01 is not fi, \u212b is not \u00c5")
@example("\x00\x01\x7f\ufffd\ufeff\U0010ffff")
@example("\U0001f468\u200d\U0001f469\u200d\U0001f467 don't 'S ,x . y ! n't")
def test_any_unicode_text_round_trips(reloaded, text):
    ids = reloaded.encode(text)
    assert reloaded.decode(ids) == text
    assert reloaded.decode(ids, keep_specials=True) == text
    assert all(0 <= i < reloaded.size for i in ids)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.sampled_from("<|>eoscaptionquestionanswer "), max_size=40))
def test_typed_specials_are_plain_text(reloaded, text):
    control = set(reloaded.specials().values())
    assert not control & set(reloaded.encode(text + "<|eos|>" + text))


def test_saving_and_loading_changes_nothing(tokenizer, reloaded):
    for text in (*CORPUS, "<|eos|> ü 😀"):
        assert tokenizer.encode(text) == reloaded.encode(text)
    assert tokenizer.specials() == reloaded.specials()
    assert isinstance(reloaded.tokenizer, PreTrainedTokenizerFast)


def test_plain_auto_tokenizer_gives_the_same_ids(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    plain = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    text = " two apples <|eos|> "
    assert plain.encode(text, add_special_tokens=False) == tokenizer.encode(text)
    assert plain.eos_token_id == tokenizer.eos_id


def test_training_merges_frequent_words_and_is_deterministic(tokenizer):
    assert len(tokenizer.encode(" apples")) == 1
    assert len(tokenizer.encode(" apples")) < len(tokenizer.encode(" qzxwvk"))
    again = TextTokenizer.train(CORPUS, vocab_size=400)
    assert again.tokenizer.get_vocab() == tokenizer.tokenizer.get_vocab()


def test_specials_have_the_first_ids_and_their_names(tokenizer):
    assert [tokenizer.special(n) for n in ("eos", "caption", "question", "answer")] == [0, 1, 2, 3]
    assert tokenizer.eos_id == 0
    assert tokenizer.special("<|caption|>") == 1
    assert special_token("caption") == "<|caption|>"
    assert tokenizer.specials() == {"eos": 0, "caption": 1, "question": 2, "answer": 3}
    with pytest.raises(ValueError, match="no special token 'apples'"):
        tokenizer.special("apples")
    other = TextTokenizer.train(CORPUS, 300, specials=("bos", "eos"))
    assert other.eos_id == 1 and other.special("bos") == 0


def test_decode_drops_specials_unless_asked(tokenizer):
    ids = [1, *tokenizer.encode("a car"), 0, 0]
    assert tokenizer.decode(ids) == "a car"
    assert tokenizer.decode(ids, keep_specials=True) == "<|caption|>a car<|eos|><|eos|>"


def test_size_bounds_all_ids(tokenizer):
    assert tokenizer.size == max(tokenizer.tokenizer.get_vocab().values()) + 1 <= 400
    with pytest.raises(ValueError, match="outside"):
        tokenizer.decode([tokenizer.size])
    with pytest.raises(ValueError, match="outside"):
        tokenizer.decode([-1])


def test_broken_bytes_decode_to_the_replacement_character(tokenizer):
    first_byte = tokenizer.encode("😀")[:1]
    assert tokenizer.decode(first_byte) == "\ufffd"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocab_size": 259}, "need at least 260"),
        ({"specials": ("caption",)}, "include 'eos'"),
        ({"specials": ("eos", "eos")}, "distinct"),
        ({"texts": []}, "no text"),
        ({"texts": ["", ""]}, "no text"),
        ({"texts": ["fine", "\ud800"]}, "surrogate"),
    ],
)
def test_training_refuses(arguments, message):
    values = {"texts": CORPUS, "vocab_size": 300} | arguments
    with pytest.raises(ValueError, match=message):
        TextTokenizer.train(**values)


def test_smallest_vocabulary_still_round_trips():
    smallest = TextTokenizer.train(["x"], 260)
    assert smallest.size == 260
    assert smallest.decode(smallest.encode("für 😀")) == "für 😀"


def test_encode_refuses_what_is_not_text(tokenizer):
    with pytest.raises(ValueError, match="lone surrogate"):
        tokenizer.encode("a\udc80")
    with pytest.raises(ValueError, match="bytes"):
        tokenizer.encode(b"a")  # type: ignore[arg-type]


def test_loading_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        TextTokenizer.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no text tokenizer"):
        TextTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{broken")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read as settings of a text tokenizer") as caught:
        TextTokenizer.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_saving_leaves_no_temporary_files(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "deep" / "folder")
    tokenizer.save_pretrained(tmp_path / "deep" / "folder")
    names = {p.name for p in (tmp_path / "deep" / "folder").iterdir()}
    assert names == {"tokenizer.json", "tokenizer_config.json"}
    json.loads((tmp_path / "deep" / "folder" / "tokenizer.json").read_text(encoding="utf-8"))


def test_a_name_of_the_hub_is_downloaded_without_weights_or_code_and_then_a_folder(tmp_path, monkeypatch):
    TextTokenizer.train(["a b c"], 270).save_pretrained(tmp_path / "hub" / "words")
    asked = []

    def download(name, wanted, what, **options):
        asked.append((name, what, options))
        assert not any(Path(file).match(pattern) for pattern in wanted for file in ("m.safetensors", "m.bin", "tok.py"))
        return tmp_path / "hub"

    monkeypatch.setattr("unidiff.hub.download", download)
    found = TextTokenizer.from_pretrained("owner/name", revision="main", subfolder="words")
    assert found.decode(found.encode("a b c")) == "a b c"
    assert asked == [("owner/name", "tokenizer", {"revision": "main"})]
    with pytest.raises(FileNotFoundError, match="holds no text tokenizer"):
        TextTokenizer.from_pretrained("gpt2")
