"""What `inference/benchmark.py` can decode with random weights: shapes of models, rows, caches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from unidiff.decoding.cache.config import CACHES, CacheConfig
from unidiff.decoding.row_decode import RowDecode, TokenRun
from unidiff.tokens import Modality, Vocabulary

UPSTREAM = "-upstream"
"""Behind a policy's name: it counts as the paper's reference implementation does."""
MAIN = ("none", "prefix", "dual", "adaptive", "max-logit")


def cache_named(name: str) -> CacheConfig:
    """A cache by a name of `--only`, with the settings it has when none are named.

    Raises:
        ValueError: no such name.
    """
    policy = name.removesuffix(UPSTREAM)
    pick((policy,), CACHES, "policy")
    return CacheConfig(policy, {"compat": "upstream"} if policy != name else {})


def pick(asked: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raises `ValueError` for names that are not known."""
    if unknown := [name for name in asked if name not in set(known)]:
        raise ValueError(f"unknown {what} {unknown[0]!r}; expected some of {', '.join(known)}")


@dataclass(frozen=True)
class RandomDecode:
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

    def describe(self) -> str:
        """One line."""
        return (
            f"{self.dtype}, {self.text} text + {self.image} image tokens, blocks of {self.block}, "
            f"{self.passes} passes each, {self.batch} row{'s' * (self.batch > 1)}"
        )

    def schedule(self, vocabulary: Vocabulary, blocks: int | None = None, passes: int | None = None) -> RowDecode:
        """Everything is decoded, or `blocks` blocks, evenly spread over the row, with the rest given."""
        chosen, number = spread(self.total_blocks, blocks), 0
        segments: list[TokenRun] = []
        for modality, tokens, ids in (
            (Modality.TEXT, self.text, vocabulary.text_size),
            (Modality.IMAGE, self.image, vocabulary.image_size),
        ):
            for start in range(0, tokens, self.block):
                size, given = min(self.block, tokens - start), number not in chosen
                if segments and (segments[-1].modality, segments[-1].given) == (modality, given):
                    size += segments.pop().tokens  # neighbours that are alike become one
                segments.append(TokenRun(size, ids, modality, given))
                number += 1
        return RowDecode(tuple(segments), self.block, passes or self.passes)


@dataclass(frozen=True)
class ShapeSuite:
    """Random weights of a realistic shape, and what is decoded with them.

    Args:
        about: one line for people.
        model: arguments of `MaskedTransformer` besides `vocab_size`.
        text_ids, image_ids: sizes of the two slices of the vocabulary.
        workloads: one after the other.
        policies: names of `cache_named`, compared with each other.
        device: "cpu" or "cuda". runs: paired runs of each.
        peak_size: n of the n x n products that give the matmul peak.
        copy_bytes: what is copied to measure the bandwidth of the memory.
    """

    about: str
    model: Mapping[str, Any]
    text_ids: int
    image_ids: int
    workloads: tuple[RandomDecode, ...]
    policies: tuple[str, ...] = MAIN
    device: str = "cpu"
    runs: int = 3
    peak_size: int = 2048
    copy_bytes: int = 2**28

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary.unified(self.text_ids, self.image_ids)


def _shapes(
    passes: tuple[int, ...], dtypes: tuple[str, ...], blocks: tuple[int, ...] = (64,), batches: tuple[int, ...] = (1,)
) -> tuple[RandomDecode, ...]:
    """128 text tokens with a 32 x 32 image, and 512 text tokens alone."""
    every = product(dtypes, ((128, (32, 32)), (512, None)), blocks, passes, batches)
    return tuple(RandomDecode(*row, block, n, dtype, batch) for dtype, row, block, n, batch in every)


_BOTH, _BF16 = ("float32", "bfloat16"), ("bfloat16",)
_UNIDISC = dict(qk_norm="head", activation="gelu_tanh", time_conditioning=True, sandwich_norm=True)
_LLADA = dict(num_heads=32, ffn_size=12288, rope="1d", modality_embedding=False)
_GPU: dict[str, Any] = dict(device="cuda", peak_size=8192)
SUITES: dict[str, ShapeSuite] = {
    "smoke": ShapeSuite(
        "seconds; shows that everything runs",
        dict(hidden_size=32, num_layers=2, num_heads=2),
        *(50, 40, (RandomDecode(8, (4, 4), 4, 2, "float32"), RandomDecode(8, None, 4, 4, "bfloat16", 2))),
        ("none", "prefix", "dual", "vicinity", "adaptive", "max-logit"),
        runs=2,
        peak_size=64,
        copy_bytes=2**20,
    ),
    "cpu-25m": ShapeSuite(
        "8 layers, d = 512, on a CPU",
        dict(hidden_size=512, num_layers=8, num_heads=8),
        *(8192, 8192, _shapes((8, 16, 64), _BOTH)),
    ),
    "unidisc-small": ShapeSuite(
        "12 layers, d = 768, as UniDisc small, on a CPU",
        dict(hidden_size=768, num_layers=12, num_heads=12, ffn_size=3072, **_UNIDISC),
        *(32000, 16384, _shapes((16,), _BOTH, (32, 64))),
    ),
    "gpu-1.4b": ShapeSuite(
        "24 layers, d = 2048, as UniDisc 1.4B",
        dict(hidden_size=2048, num_layers=24, num_heads=16, ffn_size=8192, **_UNIDISC),
        *(32000, 16384, _shapes((16, 64), _BF16, (32, 64), (1, 8))),
        runs=5,
        **_GPU,
    ),
    "gpu-8b": ShapeSuite(
        "32 layers, d = 4096, as LLaDA 8B and MMaDA",
        dict(hidden_size=4096, num_layers=32, **_LLADA),
        *(126349, 8192, _shapes((16, 64), _BF16, (32, 64), (1, 8))),
        **_GPU,
    ),
}


def spread(total: int, count: int | None) -> frozenset[int]:
    """`count` of the numbers 0 ... total - 1, evenly spread; all for None."""
    if count is None or count >= total:
        return frozenset(range(total))
    return frozenset(int((i + 0.5) * total / count) for i in range(count))
