"""Random sampler cases: a model, settings, a cache and mixed rows, all from one number; and what must hold of their decode."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

import torch
from torch import Tensor

from unidiff.decoding import Guidance, ModalityDecoding, NoCache, RefreshPolicy, Sampler, SamplerConfig
from unidiff.decoding.cache import (
    AdaptiveCache,
    BlockCausalCache,
    CacheByRow,
    DualCache,
    HeldGuidance,
    IntervalCache,
    MaxLogitCache,
    ModalityCache,
    PrefixCache,
    SegmentCache,
    VicinityCache,
)
from unidiff.decoding.config import BLOCK_ORDERS, CONFIDENCES, ORDERS, RULES
from unidiff.diffusion.schedules import SCHEDULES
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Modality, Span, TokenBatch, Vocabulary

EOS = 2
VOCABULARY = Vocabulary.unified(13, 9, {"eos": EOS})
PERTURBED, ROUNDING = 12, 5e-6  # relative changes of the weights: what is decided by less lies within rounding
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "foreign": {},  # behind an interface of its own: whole rows only
    "shared keys": dict(num_heads=4, num_kv_heads=2, qk_norm="head"),
    "one axis": dict(rope="1d", modality_embedding=False, tie_head=True),
    "timed": dict(time_conditioning=True, cond_dim=8, rope="1d"),
    "timed pictures": dict(time_conditioning=True, cond_dim=8, time_tokens="image", sandwich_norm=True),
    "shifted": dict(shift=True, head_bias=True, rope="1d"),
    "block-causal": dict(attention="block_causal", block_length=4, head_bias=True),
    "timed block-causal": dict(attention="block_causal", block_length=3, time_conditioning=True, cond_dim=8),
}


class Foreign(torch.nn.Module):
    """A denoiser that is no `MaskedTransformer`."""

    def __init__(self, inner: MaskedTransformer) -> None:
        super().__init__()
        self.inner = inner

    def hidden(self, *inputs: Any, **named: Any) -> Tensor:
        return self.inner.hidden(*inputs, **named)

    def head(self, hidden: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        return self.inner.head(hidden, start, stop) * 1.5


@cache
def model_of(name: str) -> torch.nn.Module:
    torch.manual_seed(sorted(MODELS).index(name))
    settings = dict(hidden_size=16, num_layers=2, num_heads=2, ffn_size=24) | MODELS[name]
    model = MaskedTransformer(VOCABULARY.size, **settings).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.35)
        if model.output_bias is not None:
            model.output_bias[EOS] += 1.5
    return Foreign(model) if name == "foreign" else model


@cache
def perturbed(name: str, number: int) -> torch.nn.Module:
    model = copy.deepcopy(model_of(name))
    noise = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + ROUNDING * torch.randn(p.shape, generator=noise))
    return model


@cache
def exact(name: str) -> torch.nn.Module:
    return copy.deepcopy(model_of(name)).double()


@dataclass(frozen=True)
class Case:
    """rows: `[1, n]` each, unpadded, with their unconditional streams and hidden conditions; policies: of each row."""

    number: int
    model: str
    config: SamplerConfig
    policies: tuple[RefreshPolicy, ...]
    rows: tuple[TokenBatch, ...]
    seeds: tuple[int, ...]
    others: tuple[tuple[TokenBatch, ...], ...]
    conditions: tuple[Tensor, ...] | None

    def decode(
        self, model: Any, order: list[int], pads: list[int], length: int, watch: Any = None, device: Any = "cpu"
    ) -> list[Tensor]:
        """Ids of the rows in `order`, `[n]` each without padding; row i has `pads[i]` places on its left."""
        batch = TokenBatch.cat([placed(self.rows[i], pads[i], length) for i in order]).to(device)
        others = [
            TokenBatch.cat([placed(self.others[i][k], pads[i], length) for i in order]).to(device)
            for k in self._streams
        ]
        condition = None
        if self.conditions is not None:
            condition = torch.zeros(batch.shape, dtype=torch.bool)
            for at, i in enumerate(order):
                condition[at, pads[i] : pads[i] + self.rows[i].shape[1]] = self.conditions[i][0]
        kinds = {id(p): p for p in self.policies}
        policy = self.policies[order[0]]
        if len(kinds) > 1 and len(order) > 1:
            policy = CacheByRow(list(kinds.values()), [list(kinds).index(id(self.policies[i])) for i in order])
        sampler = Sampler(model, VOCABULARY, self.config, policy)
        seeds = torch.tensor([self.seeds[i] for i in order]).to(device)
        condition = None if condition is None else condition.to(device)
        out = sampler(batch, seeds, condition, watch, unconditional=others or None)
        return [out.batch.ids[at, pads[i] : pads[i] + self.rows[i].shape[1]] for at, i in enumerate(order)]

    @property
    def _streams(self) -> range:
        return range(len(self.others[0]))


def placed(row: TokenBatch, left: int, length: int) -> TokenBatch:
    """A row `[1, n]` in `length` places, `left` of them before it."""
    n = row.shape[1]
    wide = row.pad_to(length)
    order = torch.cat([torch.arange(n, n + left), torch.arange(n), torch.arange(n + left, length)])
    return wide.each(lambda x: x[:, order])


def case_of(number: int) -> Case:
    """The case of a number, from 0."""
    r = Random(number)
    name = r.choice(sorted(MODELS))
    rows = tuple(row_of(r) for _ in range(r.randint(2, 4)))
    ways = r.choice([0, 0, 1, 2]) if r.random() < 0.3 else 0  # unconditional rows of their own
    config = config_of(r, ways)
    conditions = None
    if not ways and r.random() < 0.2:
        conditions = tuple(torch.tensor([[r.random() < 0.6 for _ in range(row.shape[1])]]) for row in rows)
    held = r.random() < 0.4
    kinds = [policy_of(r, name, held) for _ in range(2 if r.random() < 0.2 else 1)]
    try:
        CacheByRow(kinds, [])
    except ValueError:  # they do not go together
        kinds = kinds[:1]
    policies = tuple(r.choice(kinds) for _ in rows)
    seeds = tuple(r.randrange(1 << 60) for _ in rows)
    others = tuple(tuple(away(row, r) for _ in range(ways)) for row in rows)
    return Case(number, name, config, policies, rows, seeds, others, conditions)


def row_of(r: Random) -> TokenBatch:
    """Text, pictures or both, of which all, some or nothing is hidden; sometimes two packed samples."""
    return TokenBatch.from_packed([[spans_of(r) for _ in range(2 if r.random() < 0.15 else 1)]])


def spans_of(r: Random) -> list[Span]:
    kind = r.choice(["text", "image", "both", "both", "described", "drawn", "known", "nothing given"])

    def known(chance: float, *shape: int) -> Tensor:
        return torch.tensor([r.random() < chance for _ in range(torch.Size(shape).numel())]).view(shape)

    def text(chance: float) -> Span:
        n = r.randint(1, 9)
        ids = torch.tensor([r.choice([i for i in range(13) if i != EOS]) for _ in range(n)])
        return Span.text(ids, known(chance, n))

    def image(chance: float) -> Span:
        shape = (r.randint(1, 3), r.randint(1, 4))
        start = VOCABULARY.image[0]
        ids = torch.tensor([start + r.randrange(8) for _ in range(shape[0] * shape[1])]).view(shape)
        return Span.image(ids, known(chance, *shape))

    share = r.choice([0.2, 0.5, 0.8])
    spans = {
        "text": lambda: [text(share)],
        "image": lambda: [image(share)],
        "both": lambda: [text(share), image(share)],
        "described": lambda: [image(1), text(0.2)],
        "drawn": lambda: [text(1), image(0.1)],
        "known": lambda: [text(1), image(1)],
        "nothing given": lambda: r.choice([[text(0)], [image(0)], [text(0), image(0)]]),
    }[kind]()
    return spans[::-1] if r.random() < 0.2 else spans


def away(row: TokenBatch, r: Random) -> TokenBatch:
    """Another prompt for the same targets: other known words, some of them padding."""
    words = row.given & (row.modality == Modality.TEXT)
    ids = torch.where(words, (row.ids + r.randint(1, 5)) % VOCABULARY.text[1], row.ids)
    gone = words & torch.tensor([[r.random() < 0.3 for _ in range(row.shape[1])]])
    return row.replace(ids=ids, valid=row.valid & ~gone, sample_ids=row.sample_ids.masked_fill(gone, -1))


def config_of(r: Random, ways: int) -> SamplerConfig:
    text, image = (modality_of(r, m) for m in (Modality.TEXT, Modality.IMAGE))
    start = r.uniform(0, 0.7)
    guidance = Guidance(
        scale=r.choice([1.0, 2.0, 4.0]),
        mode=r.choice(["constant", "ramp", "window"]),
        window=(start, r.uniform(start, 1)),
        hide=r.choice(["given", "other", "text", "image"]),
        text_scale=r.choice([None, 1.0, 2.5]),
        image_scale=r.choice([None, None, 1.0, 3.0]),
        further=(r.choice([1.5, 2.0]),) * max(0, ways - 1),
    )
    return SamplerConfig(
        text, image, guidance, r.choice(ORDERS), r.random() < 0.6, ends=r.choice([(), (4,)]), fill=r.choice([None, 5])
    )


def modality_of(r: Random, modality: Modality) -> ModalityDecoding:
    """Settings that go together, drawn until they do."""
    ids = range(*VOCABULARY.range_of(modality))
    while True:
        values: dict[str, Any] = dict(
            steps=r.randint(1, 9),
            rule=r.choice(list(RULES)),
            schedule=r.choice(["fixed", *SCHEDULES]),
            confidence=r.choice(CONFIDENCES),
            temperature=r.choice([0.0, 0.0, 0.7, 1.0]),
            choice_temperature=r.choice([0.0, 0.0, 0.8]),
            top_k=r.choice([None, None, 3]),
            top_p=r.choice([None, None, 0.8]),
            threshold=r.choice([0.2, 0.35, 0.6]),
            low_threshold=0.15,
            block_length=r.choice([None, 2, 3, 5]),
            block_order=r.choice(BLOCK_ORDERS if modality == Modality.IMAGE else ("sequence",)),
            blocks_in_flight=r.choice([1, 1, 2, 9]),
            flight_share=r.choice([0.0, 0.5]),
            flight_threshold=r.choice([0.2, 0.4]),
            remask=r.choice(["none", "none", "confidence", "remdm"]),
            remask_threshold=0.4,
            remask_budget=r.randint(0, 6),
            remask_cap=0.4,
            forbid=tuple(r.sample(list(ids)[3:-1], r.choice([0, 0, 2]))),
        )
        try:
            return ModalityDecoding(**values)
        except ValueError:
            continue


def policy_of(r: Random, model: str, held: bool) -> RefreshPolicy:
    """Any cache that suits the model; `held` makes every one of a call keep guidance for some passes."""
    causal = model == "block-causal"
    kind = r.choice(["none", "simple", "simple", "segments", "segments", *(["block-causal"] * causal)])
    policy: RefreshPolicy = NoCache()
    if kind == "simple":
        policy = ModalityCache(r.randint(2, 5), 1, r.choice(["text", "image"])) if r.random() < 0.15 else part_of(r)
    elif kind == "segments":
        policy = SegmentCache(*(part_of(r) for _ in range(4)))
    elif kind == "block-causal":
        policy = BlockCausalCache()
    return HeldGuidance(policy, r.choice([2, 3, 5]), r.choice([0, 1, 3])) if held else policy


def part_of(r: Random) -> RefreshPolicy:
    rule: dict[str, Any] = r.choice([{}, {"interval": r.randint(2, 5)}, {"drift": 0.4}, {"warmup": 2}])
    compat = r.choice([None, None, "upstream"])
    kinds = [
        lambda: NoCache(),
        lambda: PrefixCache(**rule),
        lambda: DualCache(**rule),
        lambda: VicinityCache(**{"warmup": 1, **rule}, look_back=r.randint(0, 3), look_ahead=r.randint(0, 3)),
        lambda: IntervalCache(r.randint(2, 6)),
        lambda: MaxLogitCache(r.choice([0.3, 0.8]), r.choice([0.0, 0.3]), r.randint(2, 5), compat),
        lambda: AdaptiveCache(
            r.randint(1, 5), r.randint(2, 5), r.choice([0.0, 0.3, 0.6]), r.choice([(), (0,), (1,), (0, 1)]), compat
        ),
    ]
    return r.choice(kinds)()


def check_rows(case: Case) -> tuple[int, int]:
    """Assert what must hold of a decode; rows compared, and rows whose batch decided something within rounding otherwise."""
    r = Random(-case.number - 1)
    model = model_of(case.model)
    alone = [
        case.decode(model, [i], [0] * len(case.rows), row.shape[1], bounded(case)) for i, row in enumerate(case.rows)
    ]
    for row, (ids,) in zip(case.rows, alone, strict=True):
        check_ids(case, row, ids)
    compared = near = 0
    for order, pads, length in layouts(case, r):
        together = case.decode(model, order, pads, length, bounded(case))
        for at, i in enumerate(order):
            compared += 1
            if not torch.equal(together[at], alone[i][0]):
                near += 1
                explain(case, i, order, pads, length, alone[i][0])
    return compared, near


def layouts(case: Case, r: Random) -> list[tuple[list[int], list[int], int]]:
    """As they are, padded on the right; and shuffled, with padding on both sides."""
    count, longest = len(case.rows), max(row.shape[1] for row in case.rows)
    pads = [r.randint(0, 5) for _ in case.rows]
    order = r.sample(range(count), count)
    return [(list(range(count)), [0] * count, longest), (order, pads, longest + 5 + r.randint(0, 7))]


def check_ids(case: Case, row: TokenBatch, ids: Tensor) -> None:
    """Known tokens stay, and what is written is a token of its modality that may be emitted."""
    assert torch.equal(ids[~row.targets[0]], row.ids[0][~row.targets[0]]), case
    fill = {EOS if case.config.fill is None else case.config.fill, *((EOS,) if case.config.stop_at_eos else ())}
    for modality, settings in ((Modality.TEXT, case.config.text), (Modality.IMAGE, case.config.image)):
        start, stop = VOCABULARY.range_of(modality)
        own = ids[row.targets[0] & (row.modality[0] == modality)]
        assert ((own >= start) & (own < stop)).all(), case
        assert not {VOCABULARY.mask_id, VOCABULARY.image_mask} & set(own.tolist()), case
        assert not (set(settings.forbid) - fill) & set(own.tolist()), case


def bounded(case: Case) -> Any:
    """A callback that fails once there were more passes than any rule and cache may need."""
    targets = max(int(row.targets.sum()) for row in case.rows)
    rules = (case.config.text, case.config.image)
    most = 8 * sum(max(s.steps, targets) + s.remask_budget + 2 for s in rules)

    def watch(step: int, state: Any) -> None:
        assert step < most, f"more than {most} passes: {case}"

    return watch


def explain(case: Case, i: int, order: list[int], pads: list[int], length: int, alone: Tensor) -> None:
    """Assert that a row differs from the row alone by rounding only.

    In float64 it may not differ; and a change of the weights by `ROUNDING` of their size must change it alone as well.
    """
    two = exact(case.model)
    own = case.decode(two, [i], [0] * len(case.rows), case.rows[i].shape[1])[0]
    assert torch.equal(case.decode(two, order, pads, length)[order.index(i)], own), f"row {i} depends on others: {case}"
    for number in range(PERTURBED):
        ids = case.decode(perturbed(case.model, number), [i], [0] * len(case.rows), case.rows[i].shape[1])[0]
        if not torch.equal(ids, alone):
            return
    raise AssertionError(f"row {i} differs from the row alone by more than rounding: {case}")
