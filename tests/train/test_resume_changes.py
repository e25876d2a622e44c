"""What may change when a run goes on: settings of a table with reasons; every other one is refused by name."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from shard_samples import MeanColourTokenizer, write_samples
from train_fixtures import MIXED, VOCABULARY, tiny_config, tiny_table

from unidiff.data.encode import EncodeSettings, encode_shards
from unidiff.schema import Between
from unidiff.tokens import Vocabulary
from unidiff.tokens.text import TextTokenizer
from unidiff.train.config import TrainConfig, check_config, leaves
from unidiff.train.data.shard_source import open_shards
from unidiff.train.data.source import TokenTable
from unidiff.train.run.resume import FIXED, FREE, compare, facts_of
from unidiff.train.trainer import Trainer

pytestmark = pytest.mark.training
TYPES = {name: annotation for name, _, annotation in leaves(TrainConfig())}
NAMES = list(TYPES)
CHOICES = {name: get_args(kind) for name, kind in TYPES.items() if get_origin(kind) is Literal}
RANGES: dict[str, Between] = {n: get_args(kind)[1] for n, kind in TYPES.items() if get_origin(kind) is Annotated}
WHERE = Path("run/checkpoints/step-00000005")


def changed(config: Any, name: str, value: Any) -> Any:
    """`config` with one setting replaced."""
    head, _, rest = name.partition(".")
    return replace(config, **{head: changed(getattr(config, head), rest, value) if rest else value})


def value_of(config: Any, name: str) -> Any:
    for key in name.split("."):
        config = getattr(config, key)
    return config


def other_value(name: str, old: Any) -> Any:
    """Another value of the same type that makes sense by itself."""
    if name in CHOICES:
        return next(value for value in CHOICES[name] if value != old)
    if isinstance(old, bool):
        return not old
    if isinstance(old, int | float):
        number = next(
            n for n in (old + 1, old / 2, old - 1, 0.25) if RANGES[name].low <= n <= RANGES[name].high and n != old
        )
        return type(old)(number)
    return {"model": {"hidden_size": 64}, "lora.targets": ["qkv"], "data.curriculum": [[0, 1]]}.get(name, f"{old}x")


def state_of(config: TrainConfig, step: int = 5, **facts: Any) -> dict[str, Any]:
    return json.loads(json.dumps({"step": step, "config": asdict(config), "facts": facts}))


def test_every_setting_is_fixed_unless_there_is_a_reason():
    assert sorted(NAMES) == sorted([*FREE, *FIXED])
    assert all(reason.strip() for reason in FREE.values())


def test_every_number_has_a_range_and_every_range_a_number():
    numbers = {
        n for n, value, _ in leaves(TrainConfig()) if isinstance(value, int | float) and not isinstance(value, bool)
    }
    assert numbers == {*RANGES, "optimiser.state_bits"}
    for name in RANGES:
        assert RANGES[name].low <= value_of(TrainConfig(), name) <= RANGES[name].high
        for bad in (
            float("nan"),
            float("inf"),
            -float("inf"),
            RANGES[name].high * 2 + 1,
            RANGES[name].low - 1,
            None,
            "3",
            True,
        ):
            with pytest.raises(ValueError, match=name.replace(".", r"\.")):
                check_config(changed(TrainConfig(), name, bad))


@pytest.mark.parametrize("name", NAMES)
def test_a_setting_of_another_type_is_refused_by_name(name):
    default = value_of(TrainConfig(), name)
    for bad in (None, 5, 2.5, True, "x\0y", [1], (1,), {"a": 1}, {1: 2}, object(), b"x"):
        number = isinstance(bad, int | float) and not isinstance(bad, bool)
        fits = (isinstance(default, float) and number) or (
            type(bad) is type(default) and bad not in ("x\0y", [1], {1: 2})
        )
        if not fits:
            with pytest.raises(ValueError, match=name.replace(".", r"\.")):
                check_config(changed(TrainConfig(), name, bad))


@pytest.mark.parametrize("name", sorted(FIXED))
def test_what_decides_what_is_learnt_is_refused_with_both_values(name):
    old = TrainConfig(model={"hidden_size": 32})
    before = value_of(old, name)
    after = other_value(name, before)
    new = changed(old, name, after)
    assert compare(state_of(old), old, {}, WHERE) == []
    with pytest.raises(ValueError, match=r"checkpoint\.changed=allow") as error:
        compare(state_of(old), new, {}, WHERE)
    said, key = str(error.value), "model.hidden_size" if name == "model" else name
    if name == "model":
        before, after = 32, 64
    assert f"{key} = {json.dumps(before)}, here {json.dumps(after)}" in said and str(WHERE) in said and "\n" not in said
    allowed = changed(new, "checkpoint.changed", "allow")
    assert any(f"{key} = {json.dumps(before)}, here" in note for note in compare(state_of(old), allowed, {}, WHERE))


@pytest.mark.parametrize("name", sorted(set(FREE) - {"steps"}))
def test_what_changes_nothing_may_change(name):
    old = TrainConfig()
    new = changed(old, name, other_value(name, value_of(old, name)))
    assert new != old and compare(state_of(old), new, {}, WHERE) == []


@given(names=st.lists(st.sampled_from(sorted(set(NAMES) - {"steps", "model", "checkpoint.changed"})), unique=True))
def test_of_several_changes_those_are_named_that_matter(names):
    old = new = TrainConfig()
    for name in names:
        new = changed(new, name, other_value(name, value_of(old, name)))
    fixed = [name for name in names if name in FIXED]
    if not fixed:
        assert compare(state_of(old), new, {}, WHERE) == []
        return
    with pytest.raises(ValueError) as error:
        compare(state_of(old), new, {}, WHERE)
    named = [name for name in fixed if f" {name} = " in str(error.value)]
    assert len(named) == min(8, len(fixed)) and str(error.value).count(", here ") == len(named)


def test_settings_that_mean_the_same_are_the_same():
    old = TrainConfig(model={"hidden_size": 256, "num_layers": 6})
    assert compare(state_of(old), TrainConfig(model={"num_heads": 4, "dropout": 0}), {}, WHERE) == []
    older = state_of(old)
    del older["config"]["spike_factor"], older["config"]["lora"]["dora"], older["config"]["parallel"]
    assert compare(older, old, {}, WHERE) == []  # from before there were these settings
    with pytest.raises(ValueError, match=r"spike_factor = 0\.0, here 3\.0"):
        compare(older, replace(old, spike_factor=3.0), {}, WHERE)


def test_a_longer_run_says_what_becomes_of_the_rate():
    for schedule, said in (("cosine", "from 0.0005 to 0.000854"), ("wsd", None), ("constant", None)):
        old = changed(changed(TrainConfig(steps=100), "schedule.name", schedule), "schedule.warmup", 0)
        notes = compare(state_of(old, 50), replace(old, steps=200), {}, WHERE)
        assert len(notes) == 1 and "steps was 100, here 200" in notes[0]
        assert (said in notes[0] and "at step 50" in notes[0]) if said else "rate" not in notes[0]
    done = compare(state_of(TrainConfig(steps=100), 50), TrainConfig(steps=40), {}, WHERE)
    assert len(done) == 1 and "at step 50 already, so nothing is left to do" in done[0]


def start(folder: Path, *overrides: str, source: Any = None) -> Trainer:
    trainer = Trainer(tiny_config(folder, *MIXED, "steps=2", *overrides), source or tiny_table())
    trainer.train()
    return trainer


def other_tables() -> dict[str, TokenTable]:
    table = tiny_table()
    content = {k: v.clone() for k, v in table.tensors.items()}
    content["captions"][7, 1, 3] += 1
    renamed = Vocabulary.unified(32, 16, {"eos": 0, "caption": 1, "question": 2, "answer": 4})
    codes = table.tensors | {"codes": table.tensors["codes"][:, :2]}
    return {
        "data.train rows = 64, here 56": table.split(8)[0],
        "data.train content = ": TokenTable(content, VOCABULARY),
        "data.train vocabulary = ": TokenTable(table.tensors, renamed),
        "data.train text prefix = 1, here 2": TokenTable(table.tensors, VOCABULARY, text_prefix=2),
        "data.train grid = \\[3, 3\\], here \\[2, 3\\]": TokenTable(codes, VOCABULARY),
    }


@pytest.mark.parametrize("said", list(other_tables()))
def test_other_data_under_the_same_name_are_refused(tmp_path, said):
    start(tmp_path)
    tensors = {k: v.to(torch.int16) for k, v in tiny_table().tensors.items()}
    assert start(tmp_path, source=TokenTable(tensors, VOCABULARY)).resumed  # the same numbers
    other = other_tables()[said]
    with pytest.raises(ValueError, match=said):
        Trainer(tiny_config(tmp_path, *MIXED, "steps=4"), other)
    if "grid" not in said and "vocabulary" not in said:
        assert start(tmp_path, "steps=4", "checkpoint.changed=allow", source=other).state.step == 4
        assert start(tmp_path, "steps=5", source=other).resumed  # from then on they are its data


def test_other_shards_under_the_same_name_are_refused(tmp_path):
    text = TextTokenizer.train([f"caption {n} which?" for n in range(90)], 300)
    layout = EncodeSettings(image_size=16, text_length=8, samples_per_shard=4)
    facts = []
    for name, count in (("a", 12), ("b", 12), ("b2", 16)):
        write_samples(tmp_path / name / "raw", count, 40)
        encode_shards(str(tmp_path / name / "raw"), MeanColourTokenizer(), text, tmp_path / name / "tokens", layout)
        source = open_shards(str(tmp_path / name / "tokens"))
        facts.append(facts_of(TrainConfig(), source, None))
        assert facts[-1] == facts_of(TrainConfig(), open_shards(str(tmp_path / name / "tokens")), None)
        assert facts[-1] != facts_of(TrainConfig(), source.split(4)[0], None)
    assert facts[1] != facts[2] and facts[1]["data.train rows"] == 12


def test_other_starting_weights_are_refused_wherever_they_lie(tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        start(tmp_path / name, f"seed={seed}", "checkpoint.export_dtype=float32")
    (tmp_path / "moved").symlink_to(tmp_path / "a" / "model")
    first = f"checkpoint.init_from={tmp_path / 'a' / 'model'}"
    start(tmp_path / "run", first)
    assert start(tmp_path / "run", f"checkpoint.init_from={tmp_path / 'moved'}").resumed
    for overrides in ([f"checkpoint.init_from={tmp_path / 'b' / 'model'}"], []):
        with pytest.raises(ValueError, match=r"checkpoint\.init_from content = "):
            start(tmp_path / "run", *overrides)
    (path,) = (tmp_path / "a" / "model").glob("*.safetensors")
    weights = load_file(path)
    weights["blocks.0.feed_forward.up.weight"][3, 3] += 1e-3
    save_file(weights, path)
    with pytest.raises(ValueError, match=r"checkpoint\.init_from content = "):
        start(tmp_path / "run", first)
    trainer = start(tmp_path / "run", first, "checkpoint.changed=allow", "steps=3")
    assert trainer.state.step == 3 and start(tmp_path / "run", first, "steps=3").resumed


def test_a_checkpoint_with_former_names_of_tasks_is_the_same_run(tmp_path):
    config = tiny_config(tmp_path)
    old = asdict(config)
    former = {"generate": "joint", "text_to_image": "t2i", "answer": "vqa"}
    old["tasks"] = {former.get(name, name): value for name, value in old["tasks"].items()}
    assert compare({"config": old, "facts": {}, "step": 0}, config, {}, WHERE) == []


def test_notes_reach_the_person(tmp_path, caplog):
    start(tmp_path, "schedule.warmup=0")
    start(tmp_path, "schedule.warmup=0", "steps=4")
    assert "steps was 2, here 4: the rate of the cosine schedule goes from 0 to 0.0005 at step 2" in caplog.text
    caplog.clear()
    start(tmp_path, "schedule.warmup=0", "steps=4", "tasks.text_to_image.weight=3", "checkpoint.changed=allow")
    assert "which was made with tasks.text_to_image.weight = 2.0, here 3.0" in caplog.text
    caplog.clear()
    start(tmp_path, "schedule.warmup=0", "steps=4")
    assert not caplog.text
