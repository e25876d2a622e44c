"""How much faster a cache can be: the work of every pass of a decode, and the ratio to the same decode without a cache.

`expected_passes` gives what a policy must compute, pass by pass, for one row with a fixed quota; `DecodeStats` of such a
decode equals it exactly. `speedup_bound` is the ratio of FLOPs, or of times where the rate of matrix products at each
number of rows is known (small products run slower: the corrected bound). `Policy.reference_bound` are the closed formulas
of the papers, which count tokens alone.
"""

from __future__ import annotations

from collections.abc import Callable

from unidiff.decoding.cache.base import Policy
from unidiff.decoding.cache.none import NoCache
from unidiff.decoding.row_decode import RowDecode, RowWork, moments
from unidiff.models.denoiser import DenoiserTraits

Rate = Callable[[int], float]
"""FLOP/s of the model's matrix products at a number of rows."""


def expected_passes(policy: Policy, decode: RowDecode, layers: int) -> list[RowWork]:
    """What each pass has to compute in a row without guidance.

    Raises:
        ValueError: a policy whose work depends on the model's answers, or is not known.
    """
    return [policy.row_work(decode, moment, layers) for moment in moments(decode)]


def speedup_bound(policy: Policy, decode: RowDecode, traits: DenoiserTraits, rate: Rate | None = None) -> float:
    """Time without a cache over time with it, if all time were spent in matrix products.

    Args:
        traits: of the model.
        rate: FLOP/s at a number of rows, for the corrected bound; None takes the same for all numbers.
    """
    plain, cached = (
        sum(pass_seconds(p, traits, rate) for p in expected_passes(kind, decode, len(traits.layers)))
        for kind in (NoCache(), policy)
    )
    return plain / cached


def pass_seconds(work: RowWork, traits: DenoiserTraits, rate: Rate | None = None) -> float:
    """FLOPs of a pass over the rate at the rows of each product; attention counts at the rate of its query rows."""
    at = (lambda rows: 1.0) if rate is None else rate
    total = traits.head_flops(work.head, work.ids) / at(work.head) if work.head else 0.0
    for layer, w in zip(traits.layers, work.layers, strict=True):
        parts = (
            (w.qk, layer.query_key + work.keys * layer.pair),
            (w.v, layer.value),
            (w.out, layer.output + layer.feed_forward),
        )
        total += sum(rows * each / at(rows) for rows, each in parts if rows)
    return total
