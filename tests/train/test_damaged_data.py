"""Damaged data: runs train to the end, and OUTPUT/skipped.json counts exactly what was planted."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from forked_runs import RECIPE, forked
from shard_samples import MeanColourTokenizer, truncate, write_samples
from tiny_pipeline import tiny_parts
from train_fixtures import TINY, tiny_config

from unidiff.data import report
from unidiff.data.encode import EncodeSettings, encode_shards
from unidiff.data.members import IMAGE_TYPES
from unidiff.tokens.image_vq import VQImageTokenizer
from unidiff.tokens.text import TextTokenizer
from unidiff.train.account import DataAccount
from unidiff.train.config import ParallelConfig
from unidiff.train.datasets import open_sources
from unidiff.train.distributed import Parallel
from unidiff.train.shard_source import open_shards
from unidiff.train.trainer import Trainer

pytestmark = pytest.mark.training
PER_SHARD, SHARDS = 20, 10
BROKEN = set(range(3, 200, 20))  # 5 % of the pictures are truncated
NO_TEXT, NO_JSON = {21, 58, 99, 140}, {30, 133}  # captions and questions that are not UTF-8
NO_CAPTION, NO_IMAGE = {5, 77, 120}, {41, 155}
VANISHED, CUT = 4, 8  # shards: samples 80-99; samples 160-179, cut through 170
GONE = {*range(80, 100), *range(170, 180)}


def damaged_shards(folder: Path) -> str:
    def change(number: int, members: dict) -> dict:
        kind = next(name for name in IMAGE_TYPES if name in members)
        if number in BROKEN:
            members[kind] = members[kind][: len(members[kind]) // 2]
        if number in NO_TEXT:
            members["txt"] = b"caption \xff\xfe 1"
        if number in NO_JSON:
            members["json"] = b'{"qa": [["which?", "\xff"]]}'
        if number in NO_CAPTION:
            del members["txt"]
        if number in NO_IMAGE:
            del members[kind]
        return members

    write_samples(folder, PER_SHARD * SHARDS, PER_SHARD, change)
    (folder / f"{VANISHED:05d}.tar").unlink()
    cut = folder / f"{CUT:05d}.tar"
    truncate(cut, cut.read_bytes().index(b"000170.txt") // 512 * 512 + 512 + 4)
    (folder / f"{SHARDS:05d}.tar").write_bytes(b"")
    return str(folder / f"{{00000..{SHARDS:05d}}}.tar")


def pretrain(*arguments: object) -> int:
    spec = importlib.util.spec_from_file_location("pretrain_recipe", RECIPE)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    return recipe.main([str(a) for a in arguments])


def test_raw_shards_with_every_damage_train_to_the_end(tmp_path):
    pattern = damaged_shards(tmp_path / "raw")
    _, image, text, _ = tiny_parts()
    VQImageTokenizer(image).save_pretrained(tmp_path / "codes")
    text.save_pretrained(tmp_path / "words")
    (tmp_path / "empty.yaml").write_text("seed: 3\n")
    command = [tmp_path / "empty.yaml", *TINY, f"data.train={pattern}", f"output={tmp_path / 'run'}", "steps=30"]
    command += ["data.image_size=16", "data.text_length=10", "logging.every=10"]
    assert pretrain(*command, f"tokenizer.image={tmp_path / 'codes'}", f"tokenizer.text={tmp_path / 'words'}") == 0
    named = {
        report.CORRUPT_IMAGE: BROKEN - GONE - NO_IMAGE,
        report.BAD_CAPTION: NO_TEXT - GONE,
        report.BAD_JSON: NO_JSON - GONE,
        report.MISSING_MEMBER: (NO_CAPTION | NO_IMAGE) - GONE,
        report.TRUNCATED_SHARD: {170},
    }
    counts = {reason: len(numbers) for reason, numbers in named.items()}
    counts |= {report.MISSING_SHARD: 1, report.UNREADABLE_SHARD: 1}
    skipped = json.loads((tmp_path / "run" / "skipped.json").read_text())
    assert skipped["counts"] == counts == {
        "corrupt_image": 9, "bad_caption": 3, "bad_json": 2, "missing_member": 5, "truncated_shard": 1, "missing_shard": 1,
        "unreadable_shard": 1,
    }  # fmt: skip
    for reason, numbers in named.items():
        assert {int(key) for _, key, _ in skipped["encoding"]["examples"][reason]} == numbers, reason
    assert skipped["reading"] == []
    manifest = json.loads((tmp_path / "run" / "tokens" / "train" / "set0" / "tokens.json").read_text())
    damaged = set().union(*(named[reason] for reason in named), GONE)
    assert sum(manifest["shards"].values()) == PER_SHARD * SHARDS - len(damaged)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["data_skipped"] for line in lines if line["kind"] == "train"] == [sum(counts.values())] * 3
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
    early = json.loads(first.account.path.read_text())["counts"]
    assert sum(early.values()) < 3 and early.items() <= LOST.items()
    second = run("steps=12")
    assert second.resumed and second.account.counts() == early
    second.train()
    third = run("steps=12")  # has read nothing
    assert third.account.counts() == LOST and not third.source.report.counts
    content = json.loads(third.account.path.read_text())
    assert content["counts"] == LOST and {entry[0] for entry in content["reading"]} == set(LOST)
    assert "skipped 3 of the data (1 bad_array, 1 missing_shard, 1 truncated_shard)" in third.account.line()


def test_what_several_processes_meet_counts_once(tmp_path, token_shards):
    accounts = [DataAccount(tmp_path / str(n), [open_shards(str(token_shards)), None]) for n in range(3)]
    for account, rows in zip(accounts, (torch.arange(40), torch.arange(40, 80), torch.arange(80)), strict=True):
        account._shards[0].fetch(rows)
    parts = [sum(account.counts().values()) for account in accounts]
    assert parts[2] == 3 <= parts[0] + parts[1]
    texts = []
    parallel = Parallel(torch.device("cpu"), ParallelConfig())
    parallel.collect = lambda text: [*texts, text]
    for account in accounts[1:]:
        parallel.rank = 1
        account.save(parallel)
        assert not account.path.exists()  # rank 0 writes
    texts = [json.dumps([[s.reason, s.shard, s.key, s.detail] for s in account._own()]) for account in accounts[1:]]
    parallel.rank = 0
    accounts[0].save(parallel)
    assert json.loads(accounts[0].path.read_text())["counts"] == LOST


@pytest.mark.slow
def test_two_ranks_report_what_both_met(tmp_path, token_shards):
    common = [*TINY, f"data.train={token_shards}", "data.validation_rows=0", f"output={tmp_path / 'run'}", "steps=12"]
    forked(tmp_path / "driver", [{"arguments": [*common, "parallel.mode=ddp"], "ranks": 2}])
    assert json.loads((tmp_path / "run" / "skipped.json").read_text())["counts"] == LOST
