"""What `inference/benchmark.py` can run: shapes of models, decodes, caches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from unidiff.decoding.cache.bounds import Schedule, Segment
from unidiff.decoding.cache.config import CacheConfig
from unidiff.tokens import Modality, Vocabulary

POLICIES: dict[str, CacheConfig] = {
    "none": CacheConfig("none"),
    "prefix": CacheConfig("prefix"),
    "dual": CacheConfig("dual"),
    "vicinity": CacheConfig("vicinity"),
    "interval": CacheConfig("interval"),
    "adaptive": CacheConfig("adaptive"),
    "max-logit": CacheConfig("max-logit"),
    "adaptive-upstream": CacheConfig("adaptive", {"compat": "upstream"}),
    "max-logit-upstream": CacheConfig("max-logit", {"compat": "upstream"}),
}
"""By the names of `--only`; `upstream` counts as the papers' reference implementations do."""

MAIN = ("none", "prefix", "dual", "adaptive", "max-logit")


@dataclass(frozen=True)
class Workload:
    """A decode with random tokens and a fixed quota.

    Args:
        text: text tokens. grid: image codes as (height, width), or None.
        block: tokens per block. passes: passes per block.
        dtype: of the weights. batch: rows.
    """

    text: int
    grid: tuple[int, int] | None
    block: int
    passes: int
    dtype: str
    batch: int = 1

    @property
    def image(self) -> int:
        """Image tokens."""
        return 0 if self.grid is None else self.grid[0] * self.grid[1]

    @property
    def shape(self) -> str:
        """Text and image tokens, as `128+1024`."""
        return f"{self.text}+{self.image}"

    @property
    def total_blocks(self) -> int:
        return -(-self.text // self.block) - (-self.image // self.block)

    def schedule(self, vocabulary: Vocabulary, blocks: int | None = None, passes: int | None = None) -> Schedule:
        """Everything is decoded, or `blocks` blocks, evenly spread over the row, with the rest given."""
        chosen = spread(self.total_blocks, blocks)
        segments: list[Segment] = []
        number = 0
        for modality, tokens, ids in (
            (Modality.TEXT, self.text, vocabulary.text_size),
            (Modality.IMAGE, self.image, vocabulary.image_size),
        ):
            for start in range(0, tokens, self.block):
                size = min(self.block, tokens - start)
                segments.append(Segment(size, ids, modality, given=number not in chosen))
                number += 1
        return Schedule(tuple(_joined(segments)), self.block, passes or self.passes)


@dataclass(frozen=True)
class Suite:
    """Random weights of a realistic shape, and what is decoded with them.

    Args:
        model: arguments of `MaskedTransformer` besides `vocab_size`.
        text_ids, image_ids: sizes of the two slices of the vocabulary.
        workloads: one after the other.
        policies: names in `POLICIES`, compared with each other.
        device: "cpu" or "cuda".
        runs: paired runs of each.
        peak_size: n of the n x n products that give the matmul peak.
        copy_bytes: what is copied to measure the bandwidth of the memory.
        about: one line for people.
    """

    model: Mapping[str, Any]
    text_ids: int
    image_ids: int
    workloads: tuple[Workload, ...]
    policies: tuple[str, ...] = MAIN
    device: str = "cpu"
    runs: int = 3
    peak_size: int = 2048
    copy_bytes: int = 2**28
    about: str = ""

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary.unified(self.text_ids, self.image_ids)


def _workloads(
    passes: tuple[int, ...],
    dtypes: tuple[str, ...],
    blocks: tuple[int, ...] = (64,),
    batches: tuple[int, ...] = (1,),
) -> tuple[Workload, ...]:
    """128 text tokens with a 32 x 32 image, and 512 text tokens alone."""
    return tuple(
        Workload(text, grid, block, n, dtype, batch)
        for dtype in dtypes
        for text, grid in ((128, (32, 32)), (512, None))
        for block in blocks
        for n in passes
        for batch in batches
    )


_PLAIN = dict(hidden_size=512, num_layers=8, num_heads=8)
_UNIDISC = dict(qk_norm="head", activation="gelu_tanh", time_conditioning=True, sandwich_norm=True)
SUITES: dict[str, Suite] = {
    "smoke": Suite(
        dict(hidden_size=32, num_layers=2, num_heads=2),
        50,
        40,
        (Workload(8, (4, 4), 4, 2, "float32"), Workload(8, None, 4, 4, "bfloat16", 2)),
        ("none", "prefix", "dual", "vicinity", "adaptive", "max-logit"),
        runs=2,
        peak_size=64,
        copy_bytes=2**20,
        about="seconds; shows that everything runs",
    ),
    "cpu-25m": Suite(
        _PLAIN, 8192, 8192, _workloads((8, 16, 64), ("float32", "bfloat16")), about="8 layers, d = 512, on a CPU"
    ),
    "unidisc-small": Suite(
        dict(hidden_size=768, num_layers=12, num_heads=12, ffn_size=3072, **_UNIDISC),
        32000,
        16384,
        _workloads((16,), ("float32", "bfloat16"), blocks=(32, 64)),
        about="12 layers, d = 768, as UniDisc small, on a CPU",
    ),
    "gpu-1.4b": Suite(
        dict(hidden_size=2048, num_layers=24, num_heads=16, ffn_size=8192, **_UNIDISC),
        32000,
        16384,
        _workloads((16, 64), ("bfloat16",), blocks=(32, 64), batches=(1, 8)),
        device="cuda",
        runs=5,
        peak_size=8192,
        about="24 layers, d = 2048, as UniDisc 1.4B",
    ),
    "gpu-8b": Suite(
        dict(hidden_size=4096, num_layers=32, num_heads=32, ffn_size=12288, rope="1d", modality_embedding=False),
        126349,
        8192,
        _workloads((16, 64), ("bfloat16",), blocks=(32, 64), batches=(1, 8)),
        device="cuda",
        runs=3,
        peak_size=8192,
        about="32 layers, d = 4096, as LLaDA 8B and MMaDA",
    ),
}
EMBEDDED = "emoji"
NAMES = (*SUITES, EMBEDDED)


def spread(total: int, count: int | None) -> frozenset[int]:
    """`count` of the numbers 0 ... total - 1, evenly spread; all for None.

    Raises:
        ValueError: fewer than one.
    """
    if count is None or count >= total:
        return frozenset(range(total))
    if count < 1:
        raise ValueError(f"blocks is {count}; expected at least 1")
    return frozenset(int((i + 0.5) * total / count) for i in range(count))


def _joined(segments: list[Segment]) -> list[Segment]:
    """Neighbours of the same modality that are both given or both not become one."""
    out: list[Segment] = []
    for s in segments:
        if out and (out[-1].modality, out[-1].given) == (s.modality, s.given):
            s = Segment(out.pop().tokens + s.tokens, s.ids, s.modality, s.given)
        out.append(s)
    return out
