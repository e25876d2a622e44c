"""One process with a process group against one without: DDP, FSDP2, checkpoints of both kinds, slices, refusals."""

from __future__ import annotations

import json
import math
import socket

import pytest
import torch
from torch.distributed.tensor import DTensor
from train_fixtures import MIXED, tiny_config, tiny_table

from unidiff.train.config import ParallelConfig, read_config
from unidiff.train.run.checkpoint import pointed_name
from unidiff.train.run.distributed import Launch, Parallel, local, placed_like, whole
from unidiff.train.trainer import Trainer

CPU = torch.device("cpu")


@pytest.fixture
def group():
    """Opens process groups of this one process."""
    opened = []

    def start(**settings) -> Parallel:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        opened.append(Parallel(CPU, ParallelConfig(**settings), Launch(0, 1, 0, "127.0.0.1", port)))
        return opened[-1]

    yield start
    for parallel in opened:
        parallel.close()


def trainer(folder, *overrides, parallel=None):
    config = tiny_config(folder, *MIXED, "precision=fp32", "steps=8", "accumulate=2", *overrides)
    table, held_out = tiny_table(72).split(8)
    return Trainer(config, table.seeded(config.seed), held_out, parallel=parallel)


def average(run: Trainer) -> dict[str, torch.Tensor]:
    return {name: whole(value) for name, value in run.state.ema.average.items()}


def largest_difference(a: Trainer, b: Trainer) -> float:
    first, second = average(a), average(b)
    assert set(first) == set(second)
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def test_a_process_alone_changes_nothing():
    alone, value = Parallel(CPU, ParallelConfig(mode="fsdp")), torch.arange(3.0)
    assert alone.rows(40, 8) == (40, 8) and alone.main and not alone.grouped
    assert alone.sum(value) is value and alone.gather(value) is value
    assert alone.agree(True, False) == (True, False)
    assert whole(value) is value and local(value) is value and placed_like(value, value) is value


def test_slices_tile_the_global_batch():
    slices = []
    for rank in range(4):
        parallel = Parallel(CPU, ParallelConfig())
        parallel.rank, parallel.size = rank, 4
        first, count = parallel.rows(24, 8)
        slices += range(first, first + count)
    assert slices == list(range(24, 32))


@pytest.mark.parametrize(
    ("size", "overrides", "message"),
    [
        (3, ["batch_size=8"], "batch_size = 8 must be a multiple of the 3 processes"),
        (4, ["parallel.mode=fsdp", "parallel.replicas=3"], "parallel.replicas = 3 must divide"),
    ],
)
def test_settings_that_do_not_fit_the_ranks_are_refused(size, overrides, message):
    config = read_config(None, overrides)
    parallel = Parallel(CPU, config.parallel)
    parallel.size = size
    with pytest.raises(ValueError, match=message):
        parallel.check(config)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parallel.mode=zero", "parallel.mode is 'zero'"),
        ("parallel.replicas=2", "needs parallel.mode=fsdp"),
        ("parallel.param_dtype=float16", "parallel.param_dtype is 'float16'"),
        ("activation_checkpointing=some", "activation_checkpointing is 'some'"),
    ],
)
def test_unknown_settings_are_refused(override, message):
    with pytest.raises(ValueError, match=message):
        read_config(None, [override])


@pytest.mark.training
@pytest.mark.parametrize(
    ("settings", "overrides"),
    [
        ({"mode": "ddp"}, []),
        ({"mode": "fsdp"}, ["activation_checkpointing=full"]),
        ({"mode": "fsdp", "reshard": False}, ["model.tie_head=true", "model.time_conditioning=true"]),
    ],
)
def test_a_group_of_one_trains_as_a_process_alone(tmp_path, group, settings, overrides):
    alone = trainer(tmp_path / "alone", *overrides)
    expected = alone.train()
    run = trainer(tmp_path / "group", *overrides, parallel=group(**settings))
    sharded = [p for p in run.model.parameters() if isinstance(p, DTensor)]
    assert len(sharded) == (0 if settings["mode"] == "ddp" else len(list(alone.model.parameters())))
    report = run.train()
    assert largest_difference(alone, run) < 1e-6
    assert report["joint_nelbo"] == pytest.approx(expected["joint_nelbo"], abs=1e-5)
    for folder in ("alone", "group"):
        lines = [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]
        assert lines[-1]["kind"] == "validation"


@pytest.mark.training
def test_gradients_travel_once_per_step(tmp_path, group):
    run = trainer(tmp_path, "accumulate=4", "batch_size=4", parallel=group(mode="ddp"))
    sent = []

    def count(state, bucket):
        sent.append(bucket.index())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    run.parallel.replica.register_comm_hook(None, count)
    for _ in range(3):
        sent.clear()
        run.step(1.0)
        assert sent and len(sent) == len(set(sent))  # each bucket once, after the fourth micro-batch


@pytest.mark.training
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_a_checkpoint_of_either_kind_continues_in_the_other(tmp_path, group, mode):
    whole_run = trainer(tmp_path / "whole")
    whole_run.train()
    for name, first, second in (("a", {"mode": mode}, None), ("b", None, {"mode": mode})):
        for number, settings in enumerate((first, second)):
            run = trainer(tmp_path / name, parallel=group(**settings) if settings else None)
            assert run.resumed == (number == 1)
            if number == 0:
                for _ in range(4):
                    run.step(0.5)  # the same steps, at whatever rate
                run.save()
                if run.saver is not None:
                    run.saver.wait()
                reference = average(run)
            else:
                assert run.state.step == 4 and run.state.samples == 4 * 16 and run.state.ema.updates == 4
                assert all(torch.equal(value, reference[k]) for k, value in average(run).items())
                held = run.state.optimisers.state()
                assert {float(whole(v)) for k, v in held.items() if k.endswith("step")} == {4.0}
                run.train()
                assert run.state.step == 8
            run.parallel.close()


@pytest.mark.training
def test_a_background_save_holds_the_state_at_the_call(tmp_path, group):
    run = trainer(tmp_path, "steps=20", parallel=group(mode="fsdp"))
    run.step(1.0)
    before = {name: value.clone() for name, value in average(run).items()}
    run.save()
    assert pointed_name(run.checkpoints) is None  # nothing counts before it is complete
    for _ in range(3):
        run.step(1.0)
    run.saver.wait()
    assert pointed_name(run.checkpoints) == "step-00000001"
    run.parallel.close()
    again = trainer(tmp_path, "steps=20")
    assert again.state.step == 1
    assert all(torch.equal(value, before[name]) for name, value in average(again).items())


@pytest.mark.training
@pytest.mark.parametrize("grouped", [False, True])
def test_the_best_checkpoint_is_kept(tmp_path, group, grouped):
    overrides = ["steps=12", "checkpoint.keep=1", "checkpoint.every=2", "checkpoint.best=joint_nelbo"]
    overrides += ["logging.validate_every=3", "checkpoint.export_dtype=float32"]
    run = trainer(tmp_path, *overrides, parallel=group(mode="fsdp") if grouped else None)
    scores = iter([5.0, 4.0, math.inf, 4.5])  # at steps 3, 6, 9, 12
    run.validate = lambda: {"joint_nelbo": next(scores)}
    run.train()
    assert pointed_name(run.checkpoints) == "step-00000012"
    assert pointed_name(run.checkpoints, "best") == "step-00000006"
    assert sorted(p.name for p in run.checkpoints.glob("step-*")) == ["step-00000006", "step-00000012"]
    assert json.loads((run.checkpoints / "step-00000006" / "state.json").read_text())["score"] == 4.0
    assert (tmp_path / "model-best" / "config.json").is_file()
    run.parallel.close()
    again = trainer(tmp_path, *overrides)
    assert again.best == 4.0
    with pytest.raises(ValueError, match=r"checkpoint.best = 'nelbo' is not in the validation report"):
        trainer(tmp_path / "other", *overrides, "checkpoint.best=nelbo").judge({"joint_nelbo": 1.0})


def test_an_incomplete_sharded_checkpoint_is_refused(tmp_path):
    folder = tmp_path / "checkpoints"
    (folder / "step-00000004" / "shards").mkdir(parents=True)
    (folder / "latest").write_text("step-00000004\n")
    with pytest.raises(ValueError, match=r"lacks state\.json"):
        trainer(tmp_path)
