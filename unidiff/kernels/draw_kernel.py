"""The Triton program of `fused_draw`: one position of the logits per program. Needs triton to import."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _guided(values, weights, banned, row, base, columns, rows, width, apart, STREAMS: tl.constexpr, BAN: tl.constexpr):
    """Logits of some columns of a position: streams mixed as in `guidance.mix`, banned tokens and columns past V -inf."""
    inside = columns < width
    conditional = tl.load(values + base + columns, mask=inside, other=float("-inf"))
    x = conditional
    for k in tl.static_range(1, STREAMS):
        weight = tl.load(weights + (k - 1) * rows + row)
        other = tl.load(values + k * apart + base + columns, mask=inside, other=float("-inf"))
        mixed = x + weight * (conditional - other)
        if k == 1:
            x = tl.where(weight == 0, x, mixed)
        else:
            x = mixed
    if STREAMS > 1:
        x = tl.where(conditional == float("-inf"), conditional, x)
    if BAN:
        hidden = tl.load(banned + columns, mask=inside, other=1)
        x = tl.where(hidden != 0, float("-inf"), x)
    return x


@triton.jit
def _sort_keys(x, columns):
    """int64 keys that descend with the float32 value, then ascend with the column, so that a sort is stable."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)  # -0 and 0 are a tie
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - columns).to(tl.int64)


@triton.jit
def _first_past(weights, u, order, LAST: tl.constexpr):
    """Entry whose stretch of the cumulative sum holds u times the total, and what of the target lies inside it."""
    cdf = tl.cumsum(weights, 0)
    target = u * tl.max(cdf, 0)
    chosen = tl.min(tl.where((cdf > target) & (weights > 0), order, LAST), 0)
    chosen = tl.minimum(chosen, tl.max(tl.where(weights > 0, order, 0), 0))
    return chosen, target - tl.sum(tl.where(order == chosen - 1, cdf, 0.0), 0)


@triton.jit
def draw_kernel(
    values,  # [STREAMS, B, n, V]
    weights,  # [STREAMS - 1, B], s - 1
    banned,  # uint8 [V]
    uniforms,  # float64 [B * n]
    temperature,  # float64 [1]: a plain float argument would arrive as float32
    tokens,  # int64 [B * n]
    probabilities,  # float64 [B * n]
    confidences,  # float64 [B * n]
    sounds,  # bool [B * n]
    rows,
    positions,
    width,
    top_k,
    STREAMS: tl.constexpr,
    BAN: tl.constexpr,
    GREEDY: tl.constexpr,
    TEMPERED: tl.constexpr,
    MEASURE: tl.constexpr,  # 0 probability, 1 margin, 2 entropy
    TOP: tl.constexpr,  # 0, or a power of two >= top_k
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    SLOTS: tl.constexpr,  # a power of two >= BLOCKS
):
    place = tl.program_id(0).to(tl.int64)
    row = place // positions
    base = place * width
    apart = tl.num_programs(0).to(tl.int64) * width
    u = tl.load(uniforms + place)
    heat = tl.load(temperature)
    slot = tl.arange(0, SLOTS)
    best = tl.full([SLOTS], float("-inf"), tl.float64)  # per block: largest logit,
    mass = tl.zeros([SLOTS], tl.float64)  # sum of exp(x - best),
    hot = tl.zeros([SLOTS], tl.float64)  # the same at the temperature of the draw,
    extra = tl.full([SLOTS], float("-inf"), tl.float64)  # second largest logit or sum of exp(x - best) (x - best)
    ranked = tl.full([TOP if TOP else 1], -0x7FFFFFFFFFFFFFFF, tl.int64)
    broken = tl.zeros([], tl.int32)
    # 1. the one pass over the logits
    for b in range(0, BLOCKS):
        columns = b * BLOCK + tl.arange(0, BLOCK)
        x = _guided(values, weights, banned, row, base, columns, rows, width, apart, STREAMS, BAN)
        broken += tl.sum((x != x).to(tl.int32), 0)
        if TOP:
            part = tl.topk(_sort_keys(x, columns), TOP)
            ranked = tl.sort(
                tl.maximum(ranked, tl.flip(part, 0)), descending=True
            )  # two sorted lists merge bitonically
        x = x.to(tl.float64)
        peak = tl.max(x, 0)
        ground = tl.where(peak == float("-inf"), 0.0, peak)
        e = tl.exp(x - ground)
        here = slot == b
        best = tl.where(here, peak, best)
        mass = tl.where(here, tl.sum(e, 0), mass)
        if TEMPERED:
            hot = tl.where(here, tl.sum(tl.exp((x - ground) / heat), 0), hot)
        if MEASURE == 1:
            lead = tl.min(tl.where(x == peak, columns, BLOCK * BLOCKS), 0)
            extra = tl.where(here, tl.max(tl.where(columns == lead, float("-inf"), x), 0), extra)
        if MEASURE == 2:
            extra = tl.where(here, tl.sum(tl.where(e > 0, e * (x - ground), 0.0), 0), extra)
    # 2. blocks brought to the common maximum
    peak = tl.max(best, 0)
    ground = tl.where(peak == float("-inf"), 0.0, peak)
    share = tl.exp(best - ground)
    total = tl.sum(mass * share, 0)
    # 3. the token: from the ranked list, or from the one block that holds it, read once more
    if TOP:
        rank = tl.arange(0, TOP)
        ordered = (ranked >> 32).to(tl.int32)
        kept = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True).to(tl.float64)
        real = (rank < top_k) & (kept > float("-inf"))
        chosen, _ = _first_past(tl.where(real, tl.exp((kept - ground) / heat), 0.0), u, rank, TOP)
        token = tl.sum(tl.where(rank == chosen, 0x7FFFFFFF - (ranked & 0x7FFFFFFF), 0), 0).to(tl.int32)
        value = tl.sum(tl.where(rank == chosen, kept, 0.0), 0)
    else:
        if GREEDY:
            chosen = tl.min(tl.where(best == peak, slot, SLOTS - 1), 0)
            rest = u
        elif TEMPERED:
            chosen, rest = _first_past(hot * tl.exp((best - ground) / heat), u, slot, SLOTS - 1)
        else:
            chosen, rest = _first_past(mass * share, u, slot, SLOTS - 1)
        columns = chosen * BLOCK + tl.arange(0, BLOCK)
        x = _guided(values, weights, banned, row, base, columns, rows, width, apart, STREAMS, BAN).to(tl.float64)
        if GREEDY:
            token = tl.min(tl.where(x == peak, columns, BLOCK * BLOCKS), 0)
        else:
            if TEMPERED:
                e = tl.exp((x - ground) / heat)
            else:
                e = tl.exp(x - ground)
            past = (tl.cumsum(e, 0) > rest) & (e > 0)
            token = tl.min(tl.where(past, columns, BLOCK * BLOCKS), 0)
            token = tl.minimum(token, tl.max(tl.where(e > 0, columns, 0), 0))  # the sums round differently
        value = tl.sum(tl.where(columns == token, x, 0.0), 0)
    probability = tl.exp(value - ground) / total
    confidence = probability
    if MEASURE == 1:
        lead = tl.min(tl.where(best == peak, slot, SLOTS), 0)
        runner = tl.maximum(tl.max(tl.where(slot == lead, float("-inf"), best), 0), tl.max(extra, 0))
        confidence = 1 / total - tl.exp(runner - ground) / total
    if MEASURE == 2:
        spread = tl.where(share > 0, share * (extra + (best - ground) * mass), 0.0)
        confidence = tl.sum(spread, 0) / total - tl.log(total)
    tl.store(tokens + place, tl.minimum(tl.maximum(token, 0), width - 1).to(tl.int64))
    tl.store(probabilities + place, probability)
    tl.store(confidences + place, confidence)
    tl.store(sounds + place, (broken == 0) & (peak > float("-inf")) & (peak < float("inf")))
