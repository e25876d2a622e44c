"""Random cases over everything the sampler can do: rows do not depend on each other, and decodes end with what they promise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pipeline_space import check_call
from sampler_space import case_of, check_rows

FAST, SLOW = range(120), range(120, 2520)  # cases of the sampler, by their numbers
FAST_CALLS, SLOW_CALLS = range(24), range(24, 424)  # calls of a pipeline, with candidates and "auto"
WITHIN_ROUNDING = 0.01  # share of rows that may differ, all of them by a decision that rounding can change


def check(one: Callable[[int], tuple[int, int]], numbers: range) -> None:
    compared, near = map(sum, zip(*map(one, numbers), strict=True))
    print(f"{numbers}: {compared} rows compared, {near} decided within rounding")
    assert compared >= 2 * len(numbers)
    assert near <= WITHIN_ROUNDING * compared


def sampler_case(number: int) -> tuple[int, int]:
    return check_rows(case_of(number))


@pytest.mark.parametrize("part", range(4))
def test_rows_do_not_depend_on_each_other(part):
    check(sampler_case, FAST[part::4])


def test_rows_of_calls_do_not_depend_on_each_other():
    check(check_call, FAST_CALLS)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(24))
def test_rows_do_not_depend_on_each_other_in_any_case(part):
    check(sampler_case, SLOW[part::24])


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_rows_of_calls_do_not_depend_on_each_other_in_any_case(part):
    check(check_call, SLOW_CALLS[part::4])


@pytest.mark.parametrize("number", [1288, 1539])
def test_a_guided_stream_that_no_row_uses_yet_is_not_asked_for(number):
    """Rows that are guided have nothing to fill in the first passes; an append-only cache has no features of theirs."""
    sampler_case(number)
