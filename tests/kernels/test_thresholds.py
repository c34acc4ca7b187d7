"""Thresholds travel through a float[] and come back, or say what is wrong."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparge_kernels.thresholds import NEVER_SKIP, PV_DROP_BUDGET, Thresholds, pack, unpack

ENTRIES = st.builds(
    Thresholds,
    topk=st.none() | st.floats(0, 1, exclude_min=True),
    cdf=st.floats(0, 1, exclude_min=True),
    similarity=st.floats(-1, 1),
    pv=st.none() | st.just(NEVER_SKIP) | st.floats(-1e3, 0, exclude_max=True),
)


@given(st.lists(ENTRIES, min_size=2, max_size=5))
def test_unpack_undoes_pack(entries):
    assert unpack(tuple(pack(entries)), len(entries)) == entries


def test_packed_numbers_are_finite_and_row_major():
    numbers = pack([Thresholds(None, 0.9, 0.5, None), Thresholds(0.3, 1.0, -1.0, NEVER_SKIP)])
    assert numbers == [0.0, 0.9, 0.5, 0.0, 0.3, 1.0, -1.0, NEVER_SKIP]
    assert all(math.isfinite(number) for number in numbers)


def test_one_entry_serves_all_heads():
    entry = Thresholds(None, 0.9, 0.5, None)
    assert unpack(tuple(pack([entry])), 3) == [entry] * 3


@pytest.mark.parametrize("count", [0, 3, 5, 8, 16], ids=lambda count: f"{count}-numbers")
def test_a_wrong_count_is_refused_with_the_allowed_counts(count):
    with pytest.raises(ValueError, match=rf"{count} numbers; 4 .* or 12"):
        unpack((0.5,) * count, 3)


@pytest.mark.parametrize(
    "field, value",
    [
        *(("topk", value) for value in (-0.1, 1.1, math.nan)),
        *(("cdf", value) for value in (0.0, 1.1, math.nan)),
        *(("similarity", value) for value in (-1.5, 1.5, math.nan)),
        *(("pv", value) for value in (1.0, -math.inf, math.nan)),
    ],
)
def test_a_number_out_of_range_is_refused_by_name(field, value):
    numbers = dict(zip(("topk", "cdf", "similarity", "pv"), [0.5, 0.5, 0.5, -1.0], strict=True))
    numbers[field] = value
    with pytest.raises(ValueError, match=f"{field}="):
        unpack(tuple(numbers.values()), 1)


def test_default_lambda_is_the_certificate_of_the_call():
    assert Thresholds(None, 0.9, 0.5, None).skip_below(32768) == math.log(PV_DROP_BUDGET / 32768)
    assert Thresholds(None, 0.9, 0.5, -3.0).skip_below(32768) == -3.0
