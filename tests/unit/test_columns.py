"""Columns against the plain way to say the same: dicts of value by step."""

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service import columns
from service.columns import Column
from workers.contract import MAX_INTEGER, Points

STEPS = st.integers(0, 40)
VALUES = st.floats(width=64) | st.floats(width=32)
TOLD = st.lists(st.tuples(STEPS | st.integers(0, MAX_INTEGER), VALUES | st.none()), max_size=30)


def column_of(values: dict[int, float]) -> Column:
    return Column(np.array(list(values), np.int64), np.array(list(values.values()), np.float64))


def as_dict(column: Column) -> dict[int, str]:
    """NaN is not equal to itself; its name is."""
    return {step: repr(value) for step, value in zip(column.steps.tolist(), column.values.tolist(), strict=True)}


@given(TOLD, TOLD)
def test_a_report_is_its_points_by_step(losses: list[tuple[int, float | None]], others: list[tuple[int, float | None]]) -> None:
    """Whatever the order of its steps; the later of two values of a step counts, and None is no value."""
    told = [(step, value, None) for step, value in losses] + [(step, None, value) for step, value in others]
    series = {"loss": [loss for _, loss, _ in told], "other": [other for _, _, other in told]}
    found = columns.of_points(Points(steps=[step for step, *_ in told], series=series))
    expected = {
        name: {step: repr(value) for step, value in points if value is not None} for name, points in (("loss", losses), ("other", others))
    }
    assert {name: as_dict(column) for name, column in found.items()} == {name: points for name, points in expected.items() if points}
    assert all(column.steps.tolist() == sorted(column.steps.tolist()) for column in found.values())


@given(st.dictionaries(st.integers(0, MAX_INTEGER), VALUES, min_size=1))
def test_bytes_hold_a_column_exactly(values: dict[int, float]) -> None:
    column = column_of(dict(sorted(values.items())))
    assert as_dict(Column.from_bytes(column.to_bytes())) == as_dict(column)
    packed = columns.pack({"a": column, "b": column})
    assert {name: as_dict(found) for name, found in columns.unpack(packed).items()} == {"a": as_dict(column), "b": as_dict(column)}
    assert columns.unpack(packed, names=frozenset({"b"})).keys() == {"b"}


def test_what_float32_holds_takes_five_bytes() -> None:
    steps = np.arange(1000, dtype=np.int64)
    assert len(Column(steps, np.sqrt(steps, dtype=np.float32).astype(np.float64)).to_bytes()) < 5100
    assert len(Column(steps, np.sqrt(steps, dtype=np.float64)).to_bytes()) < 9100


def shown_by_hand(values: list[float], max_points: int) -> list[int]:
    """The places that are kept, bucket for bucket."""
    if len(values) <= max_points:
        return list(range(len(values)))
    size = math.ceil(len(values) / ((max_points - 1) // 4))
    kept = {0}
    for begin in range(0, len(values), size):
        places = range(begin, min(begin + size, len(values)))
        finite = [place for place in places if math.isfinite(values[place])]
        kept |= {places[-1], *[place for place in places if not math.isfinite(values[place])][:1]}
        if finite:
            kept |= {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)}
    return sorted(kept)


@given(st.lists(st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 1.0]) | VALUES, max_size=200), st.integers(5, 60))
def test_a_column_is_downsampled_as_by_hand(values: list[float], max_points: int) -> None:
    column = column_of(dict(enumerate(values, start=7)))
    shown = column.downsample(max_points)
    assert as_dict(shown) == {place + 7: repr(values[place]) for place in shown_by_hand(values, max_points)}
    assert len(shown) <= max_points


@pytest.mark.parametrize("max_points", [5, 10, 100, 1000])
def test_no_spike_and_no_nan_is_lost(max_points: int) -> None:
    generator = random.Random(0)
    values = {step: generator.random() for step in range(10_000)}
    values |= {777: 50.0, 4321: -50.0, 6000: math.nan, 9000: math.inf}
    shown = column_of(values).downsample(max_points)
    assert len(shown) <= max_points
    assert {0, 777, 4321, 9999} <= set(shown.steps.tolist())
    assert not np.isfinite(shown.values).all()


BATCHES = st.lists(st.dictionaries(STEPS, VALUES, min_size=1, max_size=10), max_size=8)


@given(BATCHES, st.data())
def test_batches_are_one_curve_however_they_were_merged(batches: list[dict[int, float]], data: st.DataObject) -> None:
    expected: dict[int, float] = {}
    for batch in batches:
        expected |= batch
    parts = [column_of(dict(sorted(batch.items()))) for batch in batches]
    while len(parts) > 1:
        begin = data.draw(st.integers(0, len(parts) - 2))
        end = data.draw(st.integers(begin + 2, len(parts)))
        parts[begin:end] = [columns.join(parts[begin:end])]
    assert [as_dict(column) for column in parts] == ([as_dict(column_of(dict(sorted(expected.items()))))] if batches else [])
