"""Damaged data: runs train to the end, and OUTPUT/skipped.json counts exactly what was planted."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from forked_runs import RECIPE, forked
from shard_samples import Damage, MeanColourTokenizer, truncate, write_samples
from tiny_pipeline import tiny_parts
from train_fixtures import TINY, tiny_config

from unidiff.data import report
from unidiff.data.encode import EncodeSettings, encode_shards
from unidiff.tokens.image.vq import VQImageTokenizer
from unidiff.tokens.text import TextTokenizer
from unidiff.train.config import ParallelConfig
from unidiff.train.data.datasets import DataLosses, open_sources
from unidiff.train.data.shard_source import open_shards
from unidiff.train.run.distributed import Parallel
from unidiff.train.trainer import Trainer

pytestmark = pytest.mark.training
COUNT = 200  # samples, 20 in each of ten shards; 80-99 and 170-179 are in the vanished and the cut one
DAMAGE = Damage(
    truncated=set(range(3, 200, 20)),  # 5 %
    bad_caption={21, 58, 99, 140},
    bad_json={30, 133},
    no_caption={5, 77, 120},
    no_image={41, 155},
    vanished=4,
    cut=170,
    empty_shard=True,
)


def pretrain(*arguments: object) -> int:
    spec = importlib.util.spec_from_file_location("pretrain_recipe", RECIPE)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    return recipe.main([str(a) for a in arguments])


def test_raw_shards_with_every_damage_train_to_the_end(tmp_path):
    damaged = DAMAGE.write(tmp_path / "raw", COUNT, 20)
    _, image, text, _ = tiny_parts()
    VQImageTokenizer(image).save_pretrained(tmp_path / "codes")
    text.save_pretrained(tmp_path / "words")
    (tmp_path / "empty.yaml").write_text("seed: 3\n")
    command = [
        tmp_path / "empty.yaml",
        *TINY,
        f"data.train={damaged.pattern}",
        f"output={tmp_path / 'run'}",
        "steps=30",
    ]
    command += ["data.image_size=16", "data.text_length=10", "logging.every=10"]
    command += [f"tokenizer.image={tmp_path / 'codes'}", f"tokenizer.text={tmp_path / 'words'}"]
    assert pretrain(*command) != 0  # a shard does not exist
    assert pretrain(*command, "data.allow_missing=true") == 0
    skipped = json.loads((tmp_path / "run" / "skipped.json").read_text())
    assert skipped["counts"] == damaged.counts == {
        "corrupt_image": 9, "bad_caption": 3, "bad_json": 2, "missing_member": 5, "truncated_shard": 1, "missing_shard": 1,
        "unreadable_shard": 1,
    }  # fmt: skip
    for reason, numbers in damaged.named.items():
        assert {int(key) for _, key, _ in skipped["encoding"]["examples"][reason]} == numbers, reason
    assert skipped["reading"] == []
    manifest = json.loads((tmp_path / "run" / "tokens" / "train" / "set0" / "tokens.json").read_text())
    assert sum(manifest["shards"].values()) == len(damaged.good)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["data_skipped"] for line in lines if line["kind"] == "train"] == [sum(damaged.counts.values())] * 3
    assert (tmp_path / "run" / "model" / "config.json").is_file()


@pytest.fixture
def token_shards(tmp_path):
    """80 rows in 20 token shards, of which one was cut, one vanished and one has an impossible code."""
    text = TextTokenizer.train([f"caption {n} which?" for n in range(90)], 300)
    write_samples(tmp_path / "raw", 80, 40)
    folder = tmp_path / "tokens"
    settings = EncodeSettings(image_size=16, text_length=8, samples_per_shard=4)
    encode_shards(str(tmp_path / "raw"), MeanColourTokenizer(), text, folder, settings)
    cut = folder / "00003.tar"
    truncate(cut, cut.stat().st_size // 2)
    (folder / "00011.tar").unlink()
    tar = folder / "00017.tar"
    data = bytearray(tar.read_bytes())
    start = data.index(b"\x93NUMPY") + 128  # the first array is the codes of the shard's first row
    data[start : start + 2] = (9999).to_bytes(2, "little")
    tar.write_bytes(data)
    return folder


LOST = {report.TRUNCATED_SHARD: 1, report.MISSING_SHARD: 1, report.BAD_ARRAY: 1}


def test_rows_lost_later_count_once_over_restarts(tmp_path, token_shards):
    def run(*overrides: str) -> Trainer:
        config = tiny_config(tmp_path / "run", f"data.train={token_shards}", "data.validation_rows=0", *overrides)
        return Trainer(config, *open_sources(config))

    first = run("steps=2")  # 16 of 80 rows: some shards have not been read
    first.train()
    early = json.loads(first.data_losses.path.read_text())["counts"]
    assert sum(early.values()) < 3 and early.items() <= LOST.items()
    second = run("steps=12")
    assert second.resumed and second.data_losses.counts() == early
    second.train()
    third = run("steps=12")  # has read nothing
    assert third.data_losses.counts() == LOST and not third.source.report.counts
    content = json.loads(third.data_losses.path.read_text())
    assert content["counts"] == LOST and {entry[0] for entry in content["reading"]} == set(LOST)
    assert "skipped 3 of the data (1 bad_array, 1 missing_shard, 1 truncated_shard)" in third.data_losses.line()


def test_what_several_processes_meet_counts_once(tmp_path, token_shards):
    sources = [open_shards(str(token_shards)) for _ in range(3)]
    accounts = [DataLosses(tmp_path / str(n), [source, None]) for n, source in enumerate(sources)]
    for source, rows in zip(sources, (torch.arange(40), torch.arange(40, 80), torch.arange(80)), strict=True):
        source.fetch(rows)
    parts = [sum(account.counts().values()) for account in accounts]
    assert parts[2] == 3 <= parts[0] + parts[1]
    texts = []
    parallel = Parallel(torch.device("cpu"), ParallelConfig())
    parallel.collect = lambda text: [*texts, text]
    for account in accounts[1:]:
        parallel.rank = 1
        account.save(parallel)
        assert not account.path.exists()  # rank 0 writes
    texts = [json.dumps([[s.reason, s.shard, s.key, s.detail] for s in account.met()]) for account in accounts[1:]]
    parallel.rank = 0
    accounts[0].save(parallel)
    assert json.loads(accounts[0].path.read_text())["counts"] == LOST


@pytest.mark.slow
def test_two_ranks_report_what_both_met(tmp_path, token_shards):
    common = [*TINY, f"data.train={token_shards}", "data.validation_rows=0", f"output={tmp_path / 'run'}", "steps=12"]
    forked(tmp_path / "driver", [{"arguments": [*common, "parallel.mode=ddp"], "ranks": 2}])
    assert json.loads((tmp_path / "run" / "skipped.json").read_text())["counts"] == LOST
