"""Token tables: the file format, determinism, epochs, curriculum, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from train_fixtures import VOCABULARY, tiny_table

from unidiff.train.data.source import TokenTable


def test_file_round_trip_keeps_every_row(tmp_path):
    table = tiny_table()
    table.save(tmp_path / "t.safetensors")
    again = TokenTable.load(tmp_path / "t.safetensors")
    assert again.vocabulary == table.vocabulary and again.text_prefix == 1
    index = torch.arange(150)
    for a, b in zip(vars(table.fetch(index)).values(), vars(again.fetch(index)).values(), strict=True):
        assert torch.equal(a, b)
    assert again.tensors["codes"].dtype == torch.int16
    assert not list(tmp_path.glob(".*"))


def test_every_epoch_holds_every_row_once_in_another_order():
    table = tiny_table(20)
    table.tensors["codes"][:, 0, 0] = torch.arange(20) % 16
    table.tensors["codes"][:, 0, 1] = torch.arange(20) // 16
    seen = table.fetch(torch.arange(60)).codes[:, 0, :2].tolist()
    rows = [c + 16 * d for c, d in seen]
    epochs = [rows[:20], rows[20:40], rows[40:]]
    assert all(sorted(e) == list(range(20)) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_sample_does_not_depend_on_the_batch_it_is_in():
    table = tiny_table()
    together = table.fetch(torch.arange(200))
    for i in (0, 63, 64, 199):
        alone = table.fetch(torch.tensor([i]))
        assert torch.equal(alone.captions[0], together.captions[i])
        assert torch.equal(alone.codes[0], together.codes[i])
    backwards = table.fetch(torch.arange(200).flip(0))
    assert torch.equal(backwards.captions.flip(0), together.captions)


def test_both_paraphrases_are_used():
    third = tiny_table().fetch(torch.arange(400)).captions[:, 2]
    assert 0.4 < (third == 20).float().mean() < 0.6


def test_curriculum_limits_levels_by_sample_index():
    table = tiny_table(64).seeded(0, ((0, 0), (100, 1)))
    words = table.fetch(torch.arange(300)).captions[:, 1] - 8
    assert (words[:100] < 4).all()
    assert (words[100:] >= 4).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": torch.full((64, 3, 3), 16)}, "codes has ids 16..16"),
        ({"captions": torch.full((64, 2, 6), 40)}, "captions has ids"),
        ({"codes": torch.zeros(10, 3, 3, dtype=torch.long)}, "rows disagree"),
        ({"colours": torch.zeros(64)}, "unknown tensors"),
        ({"codes": torch.zeros(64, 3, 3)}, "codes .* of torch.float32; expected whole numbers in 3 dimensions"),
        ({"codes": torch.zeros(64, 3, 3, dtype=torch.bool)}, "expected whole numbers"),
        ({"codes": torch.tensor(3)}, "expected whole numbers in 3 dimensions"),
        ({"captions": torch.zeros(64, 2, 0, dtype=torch.long)}, "at least one number"),
        ({"levels": torch.zeros(64, 2, dtype=torch.long)}, "levels .* in 1 dimensions"),
        ({"questions": torch.zeros(64, 2, 6).long(), "answer_start": torch.full((64, 2), 6)}, "answer_start has ids"),
        ({"questions": torch.zeros(64, 2, 6).long(), "answer_start": torch.zeros(64, 3).long()}, "for every question"),
    ],
)
def test_a_bad_table_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        TokenTable(tiny_table().tensors | change, VOCABULARY)


def test_bad_files_are_refused_with_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        TokenTable.load(tmp_path / "none.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(b"not a table")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        TokenTable.load(tmp_path / "junk.safetensors")
    with pytest.raises(ValueError, match="no `levels`"):
        tensors = {k: v for k, v in tiny_table().tensors.items() if k != "levels"}
        TokenTable(tensors, VOCABULARY, phases=((0, 1),))


@pytest.mark.parametrize(
    "metadata",
    [{"vocabulary": "["}, {"vocabulary": "null"}, {"vocabulary": "{}"}, {"text_prefix": "x"}, {"text_prefix": "-1"}],
)
def test_bad_metadata_names_the_file(tmp_path, metadata):
    path = tmp_path / "table.safetensors"
    good = {"vocabulary": json.dumps(VOCABULARY.to_dict()), "text_prefix": "1"}
    save_file({k: v.contiguous() for k, v in tiny_table().tensors.items()}, path, good | metadata)
    with pytest.raises(ValueError, match=r"table\.safetensors"):
        TokenTable.load(path)
