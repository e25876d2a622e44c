"""Random cases over everything the sampler can do: rows do not depend on each other, and decodes end with what they promise."""

from __future__ import annotations

import pytest
from sampler_space import case_of, check_rows

FAST, SLOW = range(120), range(120, 2520)
WITHIN_ROUNDING = 0.01  # share of rows that may differ, all of them by a decision that rounding can change


def check(numbers: range) -> None:
    results = [check_rows(case_of(number)) for number in numbers]
    compared, near = map(sum, zip(*results, strict=True))
    print(f"cases {numbers}: {compared} rows compared, {near} decided within rounding")
    assert compared > 4 * len(results)
    assert near <= WITHIN_ROUNDING * compared


@pytest.mark.parametrize("part", range(4))
def test_rows_do_not_depend_on_each_other(part):
    check(FAST[part::4])


@pytest.mark.slow
@pytest.mark.parametrize("part", range(24))
def test_rows_do_not_depend_on_each_other_in_any_case(part):
    check(SLOW[part::24])
