"""AdamW with 8-bit moments: bytes, agreement with 32 bits, checkpoints of either kind, refusals."""

from __future__ import annotations

import shutil
import socket
import sys
from contextlib import nullcontext

import pytest
import torch
from train_fixtures import MIXED, tiny_config, tiny_table

from unidiff.train import optim
from unidiff.train.config import OptimiserConfig, ParallelConfig
from unidiff.train.optim import Optimisers, learning_rate_factor
from unidiff.train.run.distributed import Launch, Parallel
from unidiff.train.trainer import Trainer

pytestmark = pytest.mark.training
WIDE = "model={hidden_size: 256, num_layers: 1, num_heads: 4, qk_norm: head, dropout: 0.1}"


@pytest.fixture
def group():
    """Opens process groups of this one process; the one before is closed."""
    opened = []

    def start(**settings) -> Parallel:
        end()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        opened.append(Parallel(torch.device("cpu"), ParallelConfig(**settings), Launch(0, 1, 0, "127.0.0.1", port)))
        return opened[-1]

    def end() -> None:
        for parallel in opened:
            parallel.close()

    yield start
    end()


@pytest.fixture
def torchao():
    return pytest.importorskip("torchao", reason="the extra `quantise` (torchao) is not installed")


def trainer(folder, bits, *overrides, parallel=None):
    config = tiny_config(folder, *MIXED, WIDE, "precision=fp32", "steps=6", f"optimiser.state_bits={bits}", *overrides)
    return Trainer(config, tiny_table(72).seeded(config.seed), parallel=parallel)


def held_bytes(run: Trainer) -> int:
    """Of all that the optimisers keep, in torchao's tensors too."""
    total = 0
    for optimiser in run.state.optimisers.optimisers.values():
        for value in (v for entry in optimiser.state.values() for v in entry.values()):
            inner = value.__tensor_flatten__()[0] if type(value) is not torch.Tensor else None
            total += value.nbytes if inner is None else sum(getattr(value, name).nbytes for name in inner)
    return total


def saved_bytes(run: Trainer) -> int:
    run.save()
    return next(run.checkpoints.glob("step-*/optimiser.safetensors")).stat().st_size


def moved(run: Trainer, start: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([(p.detach() - q).flatten() for p, q in zip(run.model.parameters(), start, strict=True)])


def held(run: Trainer) -> dict[str, torch.Tensor]:
    """Weights, averages and optimiser state."""
    parts = {"model": run.model.state_dict(), "ema": run.state.ema.average, "optimiser": run.state.optimisers.state()}
    return {f"{part}.{name}": value.clone() for part, tensors in parts.items() for name, value in tensors.items()}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert set(first) == set(second)
    assert not [name for name, value in first.items() if not torch.equal(value, second[name])]


@pytest.mark.usefixtures("torchao")
def test_a_quarter_of_the_bytes_trains_nearly_alike(tmp_path):
    runs = {bits: trainer(tmp_path / str(bits), bits, "optimiser.clip=0.5") for bits in (32, 8)}
    start = [p.detach().clone() for p in runs[8].model.parameters()]
    reports = {bits: [run.step(1.0) for _ in range(12)] for bits, run in runs.items()}
    assert all(report.grad_norm > 0.5 for report in reports[8])  # clipping had something to do
    assert held_bytes(runs[8]) < 0.265 * held_bytes(runs[32])  # 0.257 measured
    assert saved_bytes(runs[8]) < 0.265 * saved_bytes(runs[32])  # 0.256 measured
    for eight, full in zip(reports[8], reports[32], strict=True):
        assert eight.loss == pytest.approx(full.loss, rel=1e-3)  # 5e-5 measured
    ways = [moved(runs[bits], start) for bits in (8, 32)]
    assert 0 < float((ways[0] - ways[1]).norm() / ways[1].norm()) < 0.05  # 0.023 measured


@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
@pytest.mark.parametrize("grouped", [False, True])
def test_saved_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path, optimiser, grouped, group):
    name = f"optimiser.name={optimiser}"
    whole = trainer(tmp_path / "whole", 8, name)
    whole.train()
    codes = [k for k in whole.state.optimisers.state() if k.endswith("exp_avg_sq.codes")]
    owned = [p for g in whole.state.optimisers.optimisers["adamw"].param_groups for p in g["params"]]
    assert len(codes) == sum(p.numel() >= 4096 for p in owned) > 0
    first = trainer(tmp_path / "cut", 8, name, parallel=group() if grouped else None)
    for step in range(3):
        first.step(learning_rate_factor(first.config.schedule, step, first.config.steps))
    first.save()
    if first.saver is not None:
        first.saver.wait()
    second = trainer(tmp_path / "cut", 8, name, parallel=group() if grouped else None)
    assert second.resumed and second.state.step == 3
    assert_same(held(second), held(first))
    second.train()
    assert_same(held(second), held(whole))


@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize(("saved", "wanted"), [(8, 32), (32, 8)])
def test_a_state_of_other_bits_is_refused(tmp_path, saved, wanted):
    run = trainer(tmp_path, saved)
    run.step(1.0)
    run.save()
    with pytest.raises(ValueError, match=f"set optimiser.state_bits={saved}"):
        trainer(tmp_path, wanted, "checkpoint.changed=allow")


@pytest.mark.usefixtures("torchao")
def test_sharded_parameters_are_refused(tmp_path, group):
    with pytest.raises(ValueError, match="does not go with parallel"):
        trainer(tmp_path, 8, parallel=group(mode="fsdp"))


def test_a_missing_torchao_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(ValueError, match=r"needs torchao; run pip install 'unidiff\[quantise\]'"):
        trainer(tmp_path, 8)


def test_other_bits_do_not_exist(tmp_path):
    with pytest.raises(ValueError, match=r"state_bits is 4; expected one of 8, 32"):
        tiny_config(tmp_path, "optimiser.state_bits=4")


@pytest.mark.slow
@pytest.mark.usefixtures("torchao")
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_updates_are_the_same_and_follow_the_rate(monkeypatch):
    def updated() -> Optimisers:
        layer = torch.nn.Linear(128, 64)
        with torch.no_grad():
            for p in layer.parameters():
                p.copy_(torch.linspace(-1, 1, p.numel()).view_as(p))
        optimisers = Optimisers(layer, OptimiserConfig(state_bits=8))
        for number, factor in enumerate((1.0, 0.5, 0.1)):
            generator = torch.Generator().manual_seed(number)
            for p in layer.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            optimisers.set_rate(factor)
            optimisers.step()
        return optimisers

    plain = updated()
    monkeypatch.setattr(optim, "uncompiled", lambda parameters: nullcontext())
    compiled = updated()
    for p, q in zip(plain.parameters, compiled.parameters, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
    first, second = plain.state(), compiled.state()
    assert torch.equal(first["adamw.0.exp_avg.codes"], second["adamw.0.exp_avg.codes"])


@pytest.mark.gpu
@pytest.mark.usefixtures("torchao")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_compiled_updates_on_a_gpu_follow_the_rate(tmp_path):
    runs = {bits: trainer(tmp_path / str(bits), bits, "device=cuda") for bits in (32, 8)}
    for factor in (1.0, 0.5, 0.25):
        reports = {bits: run.step(factor) for bits, run in runs.items()}
        assert reports[8].loss == pytest.approx(reports[32].loss, rel=1e-2)
    held = [p.detach().clone() for p in runs[8].model.parameters()]
    runs[8].step(0.0)
    assert all(torch.equal(p, q) for p, q in zip(runs[8].model.parameters(), held, strict=True))
