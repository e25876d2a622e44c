"""Settings from files and words: every field type against every odd text, and files that are no configs."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from unidiff.config import dump_config, load_config
from unidiff.schema import Between
from unidiff.train.config import TrainConfig

ODD = ["007", "1e3", "12:30", "on", "off", "Yes", "null", "None", "true", "[", "]", "{", "}", "[a, b]", "{a: 1}", "a #b",
       "#", "a: b", ": ", "- x", "&a x", "*a", "!!int 3", "| x", "> x", "%x", "@x", "`x", "'x'", '"x', "1_000", "0x10", "1.5",
       "-3", "+4", "nan", ".nan", "inf", "1e999", "9" * 30, "9" * 5000, "-0", "1e-4", "é漢🦊", "１２", "a=b", "=", "x\ty", "x\ny",
       " ", "", "2024-01-01", "<<", "$HOME", "%(x)s", "a" * 3000, "[" * 3000, "\ufeff5", "0b1", "1__0", "._", ".", "..", "5."]  # fmt: skip


@dataclass(frozen=True)
class Inner:
    name: str = "in"
    share: float = 0.5


@dataclass(frozen=True)
class Every:
    text: str = "t"
    whole: int = 1
    number: float = 1.0
    truth: bool = False
    maybe: str | None = None
    maybe_whole: Annotated[int, Between(1, 9)] | None = None
    few: Annotated[int, Between(1, 8)] = 2
    texts: list[str] = field(default_factory=list)
    numbers: list[float] = field(default_factory=list)
    pair: tuple[float, float] = (0.0, 1.0)
    inner: Inner = field(default_factory=Inner)
    free: dict[str, Any] = field(default_factory=dict)
    anything: Any = None


FIELDS = [name for name in Every.__dataclass_fields__]
TYPES = {"text": str, "whole": int, "number": (int, float), "truth": bool, "maybe": (str, type(None)),
         "maybe_whole": (int, type(None)), "texts": list, "numbers": list, "pair": tuple, "inner": Inner, "free": dict}  # fmt: skip


def plain(text: str) -> bool:
    """Texts that a text field refuses for a reason of its own."""
    return "${" not in text and "\0" not in text and not text.startswith("~") and "::~" not in text


def unquoted(text: str) -> str:
    """Without the one pair of quotes around it."""
    whole = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if whole and text[0] not in text[1:-1] and "\\" not in text else text


@given(st.sampled_from(FIELDS), st.sampled_from(ODD) | st.text(max_size=30))
def test_every_override_is_a_value_of_its_type_or_one_sentence(name: str, text: str) -> None:
    try:
        value = getattr(load_config(Every, None, [f"{name}={text}"]), name)
    except ValueError as error:
        assert str(error).startswith("override ") and "\n" not in str(error) and len(str(error)) < 900
        assert name != "text" or not plain(text)
        return
    assert isinstance(value, TYPES.get(name, object))
    if name in ("whole", "number", "maybe_whole"):
        assert value is None or isinstance(value, float) or (type(value) is int and abs(value) < 2**63)
    assert name != "text" or value == unquoted(text)
    assert name != "maybe" or value == (None if text == "null" else unquoted(text))


@given(st.sampled_from(ODD) | st.text(max_size=30))
def test_a_text_is_taken_as_typed_everywhere(text: str) -> None:
    words = [f"text={text}", f"inner.name={text}"]
    try:
        config = load_config(Every, None, words)
    except ValueError:
        assert not plain(text)
        return
    assert config.text == config.inner.name == unquoted(text)
    assert yaml.safe_load(dump_config(config))["text"] == unquoted(text)


@given(st.dictionaries(st.sampled_from(["text", "maybe"]), st.text(max_size=20).filter(plain)), st.floats(-1e9, 1e9),
       st.integers(-(2**62), 2**62), st.lists(st.text(max_size=9).filter(plain)), st.booleans())  # fmt: skip
def test_what_is_dumped_is_read_back(tmp_path_factory, texts, number, whole, listed, truth) -> None:
    config = Every(**texts, number=number, whole=whole, texts=listed, truth=truth, free={"a": "010", "b": 5, "c": None})
    path = tmp_path_factory.mktemp("dump") / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(Every, path) == config


@pytest.mark.parametrize(
    ("line", "value"),
    [("text: 007", "007"), ("text: 1e3", "1e3"), ("text: 12:30", "12:30"), ("text: on", "on"), ("text: 'null'", "null"),
     ("text: 2024-01-01", "2024-01-01"), ("whole: 010", 10), ("whole: 1e3", 1000), ("number: 1e-4", 1e-4),
     ("truth: TRUE", True), ("maybe: null", None), ("maybe:", None), ("maybe: ~", None), ("texts: [007, on]", ["007", "on"]),
     ("pair: [1, 2]", (1.0, 2.0)), ("anything: on", "on"), ("anything: 1e-3", 1e-3), ("anything: '5'", "5"),
     ("free: {a: 010, b: {c: [1, x]}}", {"a": 10, "b": {"c": [1, "x"]}})],
)  # fmt: skip
def test_files_are_read_by_the_type_of_the_field(tmp_path: Path, line: str, value: object) -> None:
    for bom in ("", "\ufeff"):
        (tmp_path / "c.yaml").write_text(f"{bom}{line}\n", encoding="utf-8")
        found = getattr(load_config(Every, tmp_path / "c.yaml"), line.partition(":")[0])
        assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("content", "words"),
    [("text: null", "line 1: text is nothing"), ("text:", "nothing (null)"), ("text: [a]", "is a list; expected a text"),
     ("text: {a: 1}", "put a text with braces in quotes"), ("truth: on", "'on'; expected true or false"),
     ("whole: 1.5", "'1.5'; expected a whole number"), ("number: .nan", "expected a finite number"),
     ("few: 9", "few is 9; expected"), ("maybe_whole: 0", "expected"), ("pair: [1]", "holds 1 values; expected 2 values"), ("inner: x", "mapping of settings (name, share)"),
     ("\n\ninner: {nam: x}", "line 3: the key 'inner.nam' is unknown; did you mean inner.name?"), ("x: 1\n", "'x' is unknown"),
     ("whole: 1\nwhole: 2", "there twice"), ("a:\n\tb: 1", "indent with spaces, not with tabs"), ("- a", "holds a list"),
     ("just words", "holds a text"), ("text: ${oc.env:SECRET_OF_MINE}", "nothing is put in for ${...}"), ("free: &a {b: *a}", "inside"),
     ("text: ~/runs", "write the whole path"), ("free: !!python/object/apply:os.system [ls]", "leave tags out"),
     ("texts: [[[", "not valid YAML"), ("free: " + "[" * 2000, "too deep"), ("? [a, b]\n: 1", "no plain text"),
     ("text: \x01", "not valid YAML"), ("a: 1\n---\nb: 2", "not valid YAML"), ("<<: {a: 1}", "unknown"),
     ("free: {" + "".join(f"k{n}: &k{n} [*k{n - 1}, *k{n - 1}], " if n else "k0: &k0 [x, x], " for n in range(30)) + "}", "values"),
     ("text: '\\ud800'\nanything: \"\\ud800\"", "characters that no text has"), ('anything: "\\U99999999"', "not valid YAML")],
)  # fmt: skip
def test_what_is_no_config_is_one_sentence_that_names_the_file(tmp_path, monkeypatch, content, words) -> None:
    monkeypatch.setenv("SECRET_OF_MINE", "hunter2")
    path = tmp_path / "c.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError) as error:
        load_config(Every, path)
    assert str(path) in str(error.value) and words in str(error.value)
    assert "\n" not in str(error.value) and "hunter2" not in str(error.value)


def test_files_of_other_kinds(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("text: é".encode("latin-1"))
    (tmp_path / "wide.yaml").write_bytes("text: a".encode("utf-16"))
    (tmp_path / "picture.yaml").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    (tmp_path / "large.yaml").write_bytes(b"# x\n" * 300_000)
    os.mkfifo(tmp_path / "fifo.yaml")
    for path in (*tmp_path.iterdir(), tmp_path, Path("/dev/zero"), Path("/dev/full")):
        with pytest.raises(ValueError, match=path.name):
            load_config(Every, path)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        load_config(Every, tmp_path / "nowhere.yaml")
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_config(Every, tmp_path / "empty.yaml") == Every()


@pytest.mark.parametrize(
    ("word", "words"),
    [("steps", "key=value"), ("=x", "key=value"), ("", "key=value"), ("lr=1", "did you mean optimiser.lr?"), ("..=1", "unknown"),
     ("modle.hidden_size=3", "did you mean model?"), ("optimizer.lr=1", "optimiser.lr"), ("a.b.c.d=1", "unknown; there are"),
     ("steps.foo=1", "write steps=..."), ("logging.prompts.0=x", "write logging.prompts=..."), ("data=5", "mapping of settings"),
     ("logging.prompts=[a] # b", "would be left out"), ("steps=[", "'['; expected a whole number"), ("steps=", "''; expected"),
     ("output=${oops", "write the value itself"), ("output=~", "whole path"), ("data.train=a@1::~/b", "whole path"),
     ("model=5", "expected a mapping"), ("model.x=[1", "not valid YAML"), ("a." * 90 + "b=1", "unknown"),
     ("model." + "b." * 90 + "b=1", "inside each other"), ("steps=" + "9" * 30, "from 1 to 1000000000000")],
)  # fmt: skip
def test_overrides_that_cannot_be(word: str, words: str) -> None:
    with pytest.raises(ValueError, match="override") as error:
        load_config(TrainConfig, None, [word])
    assert words in str(error.value)


@pytest.mark.parametrize(("old", "new"), [("joint", "generate"), ("t2i", "text_to_image"), ("vqa", "answer")])
def test_a_task_under_its_former_name_is_told_the_new_one(tmp_path: Path, old: str, new: str) -> None:
    (tmp_path / "c.yaml").write_text(f"tasks:\n  {old}: {{weight: 2}}\n")
    with pytest.raises(ValueError, match=f"line 2: the key 'tasks.{old}' has a new name: tasks.{new}$"):
        load_config(TrainConfig, tmp_path / "c.yaml")
    with pytest.raises(ValueError, match=f"the key 'tasks.{old}.weight' has a new name: tasks.{new}.weight$"):
        load_config(TrainConfig, None, [f"tasks.{old}.weight=1"])


def test_later_ones_count_and_mappings_are_merged(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("model: {hidden_size: 64, num_layers: 2}\ntasks:\n  text_to_image: {weight: 2}\n")
    words = [
        "model.num_layers=3",
        "model={dropout: 0.1}",
        "tasks.text_to_image={rate: cosine}",
        "steps=1",
        "steps=2",
        "threads= 4 ",
    ]
    config = load_config(TrainConfig, tmp_path / "c.yaml", words)
    assert config.model == {"hidden_size": 64, "num_layers": 3, "dropout": 0.1}
    assert (config.tasks.text_to_image.weight, config.tasks.text_to_image.rate, config.steps, config.threads) == (
        2,
        "cosine",
        2,
        4,
    )


@pytest.mark.parametrize(
    ("word", "value"),
    [("text=''", ""), ('text=""', ""), ("text='007'", "007"), ('text="null"', "null"), ("text='a' b 'c'", "'a' b 'c'"),
     ("text='", "'"), ("maybe='null'", "null"), ("maybe=null", None), ("maybe=''", "")],
)  # fmt: skip
def test_one_pair_of_quotes_is_taken_off(word: str, value: str | None) -> None:
    assert getattr(load_config(Every, None, [word]), word.partition("=")[0]) == value
