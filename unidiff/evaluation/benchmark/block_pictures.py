"""A guided picture by a block-causal mixture of experts, block after block: the exact cache beside the ways of LLaDA2.0-Uni's program."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Annotated, Any, NamedTuple

import torch
from rich.table import Table
from torch import nn

from unidiff.decoding import Guidance, ModalityDecoding, RefreshPolicy, Sampler, SamplerConfig
from unidiff.decoding.cache import BlockCausalCache, SprintCache
from unidiff.evaluation.benchmark.against import spent as seconds_of
from unidiff.evaluation.report import table_of
from unidiff.models.experts import mixtures
from unidiff.models.transformer import MaskedTransformer
from unidiff.schema import Between, check_fields
from unidiff.tokens import Modality, Span, TokenBatch, Vocabulary

Count = Annotated[int, Between(1, 2**20)]
REDUCED: dict[str, Any] = {
    **dict(hidden_size=256, num_layers=20, num_heads=4, num_kv_heads=1, ffn_size=640, rope="1d", rope_share=0.5),
    **dict(num_experts=64, experts_per_token=8, expert_size=64, shared_expert_size=64, dense_layers=(0,)),
    **dict(router="sigmoid", router_bias="selection", router_groups=8, router_top_groups=4, router_scale=2.5),
    **dict(router_normalised=True, qk_norm="head", modality_embedding=False, attention="block_causal"),
}
"""LLaDA2.0-Uni's network with an eighth of its width and a quarter of its experts."""
VOCABULARY = Vocabulary.unified(4096, 4096)


@dataclass(frozen=True)
class BlockPicture:
    """What is drawn.

    Args:
        side: rows and columns of codes. words, away: tokens of the prompt, and of the unconditional one.
        block: positions of a block of attention. passes: of each block. guidance: its scale.
        layers: of the network.
    """

    side: Count = 32
    words: Count = 192
    away: Count = 6
    block: Count = 32
    passes: Count = 8
    guidance: float = 2.0
    layers: Count = 20

    def __post_init__(self) -> None:
        check_fields(self, "block picture")
        if self.away > self.words:
            raise ValueError(f"away is {self.away}; expected no more than words, {self.words}")

    def network(self, seed: int = 0) -> MaskedTransformer:
        """`REDUCED` with random weights that let every position differ."""
        torch.manual_seed(seed)
        shape = {**REDUCED, "num_layers": self.layers, "block_length": self.block}
        model = MaskedTransformer(VOCABULARY.size, **shape).eval().requires_grad_(False)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        for mixture in mixtures(model):
            mixture.reset_experts(silent=False)
        return model

    def rows(self, seed: int = 0) -> tuple[TokenBatch, TokenBatch]:
        """The conditional and the unconditional row."""
        generator = torch.Generator().manual_seed(seed)
        picture = [Span.masked_image((self.side, self.side), VOCABULARY)]
        if rest := -(self.words + self.side**2) % self.block:
            picture.append(Span.masked_image((1, rest), VOCABULARY))
        words, none = (
            Span.text(torch.randint(*VOCABULARY.text, (n,), generator=generator), True) for n in (self.words, self.away)
        )
        masks = torch.full((self.words - self.away,), VOCABULARY.mask_id)
        before = [Span(masks, Modality.TEXT, True, exists=False)] if len(masks) else []
        first, second = [words, *picture], [*before, none, *picture]
        return TokenBatch.from_spans([first]), TokenBatch.from_spans([second])

    def config(self) -> SamplerConfig:
        """A quota in every pass, so that all ways make as many passes."""
        image = ModalityDecoding(
            rule="at_least", threshold=1.0, temperature=0.0, block_length=self.block, block_order="aligned",
            block_steps=self.passes,
        )  # fmt: skip
        return SamplerConfig(image=image, guidance=Guidance(self.guidance))

    def ways(self) -> dict[str, RefreshPolicy]:
        """The program's loop, which computes everything up to the end of the block in every pass, its "Sprint" with one and
        with two such passes for each block, and the exact cache."""
        return {
            "upstream": SprintCache(warmup=self.passes + 1),
            "sprint, 2 warm-up passes": SprintCache(),
            "sprint, 1 warm-up pass": SprintCache(warmup=1),
            "block-causal": BlockCausalCache(),
        }


class TimedPicture(NamedTuple):
    """A way: median seconds, those of each run, tokens through the layers, and network evaluations."""

    seconds: float
    every: tuple[float, ...]
    tokens: int
    evaluations: int


def measure_block_picture(
    picture: BlockPicture, device: torch.device, runs: int = 3, only: tuple[str, ...] = ()
) -> dict[str, TimedPicture]:
    """All ways, run after run in turn, behind a picture of one block of each to warm up. The first is the program's loop. On a CPU
    the processor's seconds, which other programs disturb less than a clock.

    Args:
        only: ways besides the first; all when empty. `ValueError` for one that is not known.
    """
    names = list(picture.ways())
    if unknown := [name for name in only if name not in names]:
        raise ValueError(f"unknown way {unknown[0]!r}; expected some of {', '.join(names)}")
    ways = {name: policy for name, policy in picture.ways().items() if not only or name in (names[0], *only)}
    model, config = picture.network().to(device), picture.config()
    batch, other = (rows.to(device) for rows in picture.rows())
    seeds = torch.zeros(1, dtype=torch.long)
    spent: dict[str, list[float]] = {name: [] for name in ways}
    stats: dict[str, Any] = {}
    small = BlockPicture(1, picture.words, picture.away, picture.block, 2, picture.guidance, picture.layers)
    warm, beside = (rows.to(device) for rows in small.rows())
    for policy in ways.values():
        Sampler(model, VOCABULARY, small.config(), policy)(warm, seeds, unconditional=beside)
    for _ in range(runs):
        for name, policy in ways.items():
            sampler, done = Sampler(model, VOCABULARY, config, policy), list[Any]()
            draw = partial(sampler, batch, seeds, unconditional=other)
            spent[name].append(seconds_of(lambda: done.append(draw()), device))  # noqa: B023
            stats[name] = done[0].stats
    return {
        name: TimedPicture(median(own), tuple(own), stats[name].model_tokens, stats[name].evaluations)
        for name, own in spent.items()
    }


def picture_table(picture: BlockPicture, found: dict[str, TimedPicture], about: str) -> Table:
    """A line for each way, beside the program's loop."""
    first = next(iter(found.values()))
    title = f"{picture.side} x {picture.side} codes behind {picture.words} words, blocks of {picture.block}, {picture.passes} passes each ({about})"
    table = table_of(title, "way", "evaluations", "tokens", "fewer", "seconds", "faster")
    for name, own in found.items():
        ratios = [a / b for a, b in zip(first.every, own.every, strict=True)]
        numbers = f"{own.evaluations:,}", f"{own.tokens:,}", f"{first.tokens / own.tokens:.1f}"
        table.add_row(name, *numbers, f"{own.seconds:.3g}", f"{median(ratios):.1f}")
    return table
