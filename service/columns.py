"""Series as columns: steps and values as arrays; packed into bytes, joined, and down-sampled. Knows no database."""

import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from workers.contract import Points

MIN_MAX_POINTS = 5  # the first, and of one bucket: lowest, highest, last, and one that is not finite
_PER_BUCKET = 4
_T = TypeVar("_T", bound=np.generic)

# The bytes of a column, little-endian: the types of its gaps between steps and of its values, its length, its first step; then the gaps
# after it and the values. The types are the narrowest that hold them exactly. Migration 0005 reads and writes the same.
_HEADER = struct.Struct("<ccIq")
_GAP_TYPES = "BHIQ"
_ENTRY = struct.Struct("<HI")  # of a pack: lengths of name and column, before both


@dataclass(frozen=True)
class Column:
    """Points of one series: steps, each larger than the one before, and the value at each."""

    steps: NDArray[np.int64]
    values: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.steps)

    def between(self, low: int, high: int) -> "Column":
        """Its points at the steps `low` to `high`, both included."""
        begin, end = np.searchsorted(self.steps, low, side="left"), np.searchsorted(self.steps, high, side="right")
        return Column(self.steps[begin:end], self.values[begin:end])

    def to_bytes(self) -> bytes:
        gaps = np.diff(self.steps)
        widest = int(gaps.max(initial=0))
        gap_type = next(kind for kind in _GAP_TYPES if widest <= np.iinfo(kind).max)
        with np.errstate(over="ignore"):
            narrow = self.values.astype("<f4")
        value_type = "f" if np.array_equal(narrow.astype(np.float64), self.values, equal_nan=True) else "d"  # losses come from float32
        header = _HEADER.pack(gap_type.encode(), value_type.encode(), len(self), int(self.steps[0]))
        return header + gaps.astype(f"<{gap_type}").tobytes() + self.values.astype(f"<{value_type}").tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Column":
        gap_type, value_type, length, first = _HEADER.unpack_from(data)
        gaps = np.frombuffer(data, f"<{gap_type.decode()}", length - 1, _HEADER.size)
        values = np.frombuffer(data, f"<{value_type.decode()}", length, _HEADER.size + gaps.nbytes)
        steps = np.empty(length, np.int64)
        steps[0] = first
        np.cumsum(gaps, dtype=np.int64, out=steps[1:])
        steps[1:] += first
        return cls(steps, values.astype(np.float64))

    def downsample(self, max_points: int) -> "Column":
        """At most `max_points`, five or more: the first and, of each bucket of neighbours, the lowest, the highest, the last and one that
        is not finite, so that no spike and no NaN is lost."""
        length = len(self)
        if length <= max_points:
            return self
        size = -(-length // ((max_points - 1) // _PER_BUCKET))  # of a bucket, rounded up
        starts = np.arange(0, length, size)
        is_finite = np.isfinite(self.values)
        lowest = starts + _buckets(np.where(is_finite, self.values, np.inf), size, fill=np.inf).argmin(axis=1)
        highest = starts + _buckets(np.where(is_finite, self.values, -np.inf), size, fill=-np.inf).argmax(axis=1)
        last = np.minimum(starts + size, length) - 1
        strange = _buckets(~is_finite, size, fill=0)
        strange_first = (starts + strange.argmax(axis=1))[strange.any(axis=1)]
        kept = np.unique(np.concatenate([[0], lowest, highest, last, strange_first]))
        return Column(self.steps[kept], self.values[kept])


def _buckets(values: NDArray[_T], size: int, *, fill: float) -> NDArray[_T]:
    """One row for each `size` neighbours, the last one filled up."""
    return np.pad(values, (0, -len(values) % size), constant_values=fill).reshape(-1, size)


def of_points(points: Points) -> dict[str, Column]:
    """A report's series. Steps may come in any order, and twice: then the later one counts. A step without a value is no point."""
    steps = np.array(points.steps, np.int64)
    found = {name: _column(steps, values) for name, values in points.series.items()}
    return {name: column for name, column in found.items() if len(column)}


def _column(steps: NDArray[np.int64], told: Sequence[float | None]) -> Column:
    values = np.array(told, np.float64)  # None becomes NaN, which may also be told
    if np.isnan(values).any():
        is_told = np.fromiter((value is not None for value in told), bool, len(told))
        steps, values = steps[is_told], values[is_told]
    return _by_step(steps, values)


def join(columns: Sequence[Column]) -> Column:
    """One column of several, oldest first: of a step that more than one has, the newest counts."""
    if len(columns) == 1:
        return columns[0]
    return _by_step(np.concatenate([column.steps for column in columns]), np.concatenate([column.values for column in columns]))


def _by_step(steps: NDArray[np.int64], values: NDArray[np.float64]) -> Column:
    """A column of points in any order; of several at one step, the last counts."""
    gaps = np.diff(steps)
    if (gaps > 0).all():
        return Column(steps, values)
    if (gaps < 0).any():
        order = np.argsort(steps, kind="stable")
        steps, values = steps[order], values[order]
        gaps = np.diff(steps)
    is_last = np.append(gaps > 0, True)
    return Column(steps[is_last], values[is_last])


def pack(columns: Mapping[str, Column]) -> bytes:
    """All of a report's columns as one value."""
    parts = []
    for name, column in columns.items():
        encoded, data = name.encode(), column.to_bytes()
        parts += [_ENTRY.pack(len(encoded), len(data)), encoded, data]
    return b"".join(parts)


def unpack(data: bytes, *, names: Collection[str] | None = None) -> dict[str, Column]:
    """The columns of a pack with these names; None: all."""
    found, place = {}, 0
    while place < len(data):
        name_length, length = _ENTRY.unpack_from(data, place)
        begin = place + _ENTRY.size + name_length
        name = data[begin - name_length : begin].decode()
        place = begin + length
        if names is None or name in names:
            found[name] = Column.from_bytes(data[begin:place])
    return found
