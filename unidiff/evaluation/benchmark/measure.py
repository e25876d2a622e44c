"""How fast this machine is, and measurements that are kept: one JSON file each, named by a hash of what it depends on."""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import unidiff.decoding
import unidiff.models
from unidiff.decoding.row_decode import RowDecode, RowWork
from unidiff.errors import read_json
from unidiff.evaluation.report import sources_hash
from unidiff.files import write_json
from unidiff.models.config import TransformerConfig
from unidiff.models.denoiser import CachePlan
from unidiff.models.experts import MixtureOfExperts
from unidiff.models.transformer import MaskedTransformer
from unidiff.pipeline import UniDiffPipeline
from unidiff.process import timed
from unidiff.tokens import TokenBatch

LAYERS = ("qkv", "out", "up", "down")
"""Names of the linear layers of a block."""


@dataclass(frozen=True)
class MatmulRates:
    """FLOP/s at some numbers of rows; in between by the logarithm of the number, outside as at the nearest.

    Args:
        points: (rows, FLOP/s), ascending.
    """

    points: tuple[tuple[int, float], ...]

    def __call__(self, rows: int) -> float:
        """FLOP/s at `rows` rows."""
        below = [p for p in self.points if p[0] <= rows]
        above = [p for p in self.points if p[0] >= rows]
        if not below or not above:
            return (below or above[::-1])[-1][1]
        (low, slow), (high, fast) = below[-1], above[0]
        return slow if low == high else slow + (fast - slow) * math.log(rows / low) / math.log(high / low)


@dataclass(frozen=True)
class MixtureRates:
    """FLOP/s of the experts' products in a whole mixture (router, sorting and sums take time too), and of dense products."""

    mixture: float
    dense: float

    @property
    def share(self) -> float:
        return self.mixture / self.dense


def seconds_of(work: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Median time of a call, after one that does not count."""
    return median([timed(work, device)[1] for _ in range(repeats + 1)][1:])


def row_counts(length: int, block: int) -> list[int]:
    """Where to measure: powers of 4 up to the row, the block and the whole row."""
    powers = [4**i for i in range(1 + int(math.log(length, 4)))]
    return sorted({n for n in (*powers, block, length) if n <= length})


@torch.no_grad()
def measure_rates(model: MaskedTransformer, rows: Sequence[int]) -> MatmulRates:
    """Rates of the dense linear layers of all blocks, one after the other as in a pass, for ascending numbers of rows."""
    named = (module for name, module in model.blocks.named_modules() if name.rpartition(".")[2] in LAYERS)
    weights = [module.weight for module in named if isinstance(module, nn.Linear)]
    points = []
    for n in rows:
        inputs = {w.shape[1]: torch.randn(n, w.shape[1], dtype=w.dtype, device=w.device) for w in weights}
        seconds = seconds_of(lambda: [F.linear(inputs[w.shape[1]], w) for w in weights], model.device)  # noqa: B023
        points.append((n, 2 * n * sum(w.numel() for w in weights) / seconds))
    return MatmulRates(tuple(points))


@torch.no_grad()
def measure_mixture(
    config: TransformerConfig, tokens: int, dtype: torch.dtype, device: torch.device, runs: int = 5
) -> MixtureRates:
    """A mixture of experts on random tokens beside dense products of as many operations, in turn.

    Args:
        config: with experts. runs: of each; the median counts, after one that does not.
    """
    with torch.device(device):
        mixture, x = MixtureOfExperts(config), torch.randn(tokens, config.hidden_size)
    mixture.reset_experts(silent=False)
    nn.init.normal_(mixture.router.weight, std=config.hidden_size**-0.5)
    mixture, x = mixture.to(dtype), x.to(dtype)
    inner = config.experts_per_token * (config.expert_size or 0) + config.shared_expert_size
    up, down = (
        torch.randn(*shape, device=device).to(dtype) for shape in ((2 * inner, x.shape[1]), (x.shape[1], inner))
    )
    between = torch.randn(tokens, inner, device=device).to(dtype)
    works = lambda: mixture(x), lambda: (F.linear(x, up), F.linear(between, down))
    seconds = [[timed(work, device)[1] for work in works] for _ in range(runs + 1)][1:]
    flops = 6 * tokens * inner * x.shape[1]  # without the router
    return MixtureRates(*(flops / median(own) for own in zip(*seconds, strict=True)))


@torch.no_grad()
def matmul_peak(size: int, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a product of two `size x size` matrices."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / seconds_of(lambda: a @ b, device)


@torch.no_grad()
def copy_bandwidth(size: int, device: torch.device) -> float:
    """Bytes per second that a copy of `size` bytes moves, reading and writing counted."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds_of(lambda: target.copy_(source), device)


@torch.no_grad()
def measure_steps(
    model: MaskedTransformer, batch: TokenBatch, schedule: RowDecode, peak: float, bandwidth: float
) -> dict[str, dict[str, float]]:
    """A full pass, and a cached one that recomputes the first block, of all rows, without the head.

    Args:
        batch: the rows that `schedule` describes. peak: FLOP/s. bandwidth: bytes per second.

    Returns:
        `full` and `cached`, each with its median `seconds`, its `roofline` (FLOPs over the matmul peak, or bytes of
        weights and stored keys and values over the bandwidth, whichever is longer) and the `share` of it that was reached.
    """
    start, size, _ = schedule.blocks[0]
    query = torch.zeros_like(batch.given)
    query[:, start : start + size] = True
    time, store = torch.ones(len(batch.ids), device=batch.ids.device), model.make_store(batch)
    moved = store.key.nbytes + store.value.nbytes + sum(p.nbytes for p in model.blocks.parameters())
    traits, found = model.traits, {}
    for name, plan, queries in (
        ("full", CachePlan(), schedule.length),
        ("cached", CachePlan(query, query, full=False, width=size), size),
    ):
        seconds = seconds_of(partial(model.partial, batch.ids, plan, store, time), model.device)
        flops = len(batch.ids) * RowWork.even(len(traits.layers), queries, schedule.length).flops(traits)
        roofline = max(flops / peak, moved / bandwidth)
        found[name] = {"seconds": seconds, "roofline": roofline, "share": roofline / seconds}
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    about = {"torch": torch.__version__, "device": name, "threads": torch.get_num_threads()}
    return about | {"cpu_capability": torch.backends.cpu.get_cpu_capability()}


@contextmanager
def thread_count(count: int | None) -> Iterator[None]:
    """Torch's number of CPU threads inside the block; None leaves it alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Cells:
    """A folder of finished measurements, made when the first is saved."""

    folder: Path

    def path(self, name: str, key: Mapping[str, Any]) -> Path:
        """Where a measurement lies that depends on `key`."""
        return self.folder / f"{name}-{_hash(key)[:12]}.json"

    def load(self, name: str, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """A finished measurement, or None. Raises `ValueError`: a file that is none."""
        path = self.path(name, key)
        if not path.is_file():
            return None
        data = read_json(path, "a kept measurement")
        found, same = data.get("found"), data.get("key") == json.loads(json.dumps(key))
        if not same or not isinstance(found, dict) or data.get("sum") != _hash(found)[:16]:
            raise ValueError(f"{str(path)!r} is not the measurement that its name says; remove it")
        return found

    def measured(self, name: str, key: Mapping[str, Any], measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """What is kept, else what `measure` finds, which is kept from now on."""
        if (kept := self.load(name, key)) is not None:
            return kept
        found = json.loads(json.dumps(measure()))
        # the sum: a file that was changed is noticed
        write_json(self.path(name, key), {"key": key, "found": found, "sum": _hash(found)[:16]})
        return found


def _hash(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def model_hash(pipe: UniDiffPipeline) -> str:
    """SHA-256 over weights, words and layout of a pipeline, without its sampler settings.

    Weights that are not plain numbers in memory (offloaded, quantised) count by name and shape alone.
    """
    digest = hashlib.sha256()
    for part in (pipe.transformer, pipe.image_tokenizer, *pipe.layout.modules.values()):
        for name, tensor in sorted(part.state_dict().items()) if part is not None else ():
            digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
            if not tensor.is_meta and type(tensor) in (torch.Tensor, nn.Parameter):
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    how = ("samplers", "num_candidates")
    own = pipe.settings.to_dict() if hasattr(pipe, "settings") else {"family": pipe.layout.family}
    layout = {name: value for name, value in own.items() if name not in how}
    kept = pipe.transformer.config if hasattr(pipe.transformer, "config") else {}
    config = {name: v for name, v in dict(kept).items() if not name.startswith("_")}  # not its folder
    words = sorted(pipe.text_tokenizer.get_vocab().items())
    digest.update(json.dumps([layout, config, words], sort_keys=True, default=str).encode())
    return digest.hexdigest()


def code_hash() -> str:
    """SHA-256 over the sampler, its caches and the transformer: measurements of different code are not quite comparable."""
    folders = [Path(str(package.__file__)).parent for package in (unidiff.decoding, unidiff.models)]
    return sources_hash(sorted(path for folder in folders for path in folder.rglob("*.py")))
