"""The series of a run: what reports brought, in columns that grow together, and read back as one curve for each name.

A report is one small row, a batch, at first. When a stream (a start of the workers) has many, they become one batch, whose columns are rows
of their own, and many of those a larger one; a batch knows from which report to which it reaches, so that a late repeat changes nothing.
Batches are ordered by attempt, incarnation and sequence, and the newest value of a step counts. A stream that begins at a step takes back
all that earlier ones told of later steps: the run has gone on from there.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
from sqlalchemy import ColumnElement, and_, delete, func, insert, select, update
from sqlalchemy.orm import Session

from service import columns
from service.columns import Column
from service.db import utc_now
from service.errors import Invalid
from service.models import MetricBatchRow, MetricColumnRow, MetricSummaryRow
from service.views import Series
from workers.contract import MAX_INTEGER, Points

DEFAULT_MAX_POINTS = 1000
MAX_MAX_POINTS = 20_000  # of one series
MAX_ANSWER_POINTS = 500_000  # of all series together
MAX_SERIES = 256  # of one job
KEPT_POINTS = 10_000  # of each series of a job that ended long ago
_MANY = 32  # batches of a level that become one of the next
_FULL_POINTS = 2**18  # a batch of so many stays as it is: at most some megabytes are written at once
_FULL = 100  # its level, above all others
_FETCHED = 16  # columns at once
_CORE: dict[str, Any] = {"synchronize_session": False}  # no such row is in the session

_KEY = (MetricBatchRow.attempt, MetricBatchRow.incarnation, MetricBatchRow.sequence)


Stream = tuple[int, int]  # one start of the workers: attempt and incarnation


class Key(NamedTuple):
    """Of a batch, within its job."""

    attempt: int
    incarnation: int
    sequence: int


class Batch(NamedTuple):
    """As it lies in the database. first_step None: it told no points."""

    key: Key
    first_sequence: int
    num_points: int
    first_step: int | None
    points: bytes | None


def append(session: Session, job_id: str, *, attempt: int, incarnation: int, sequence: int, points: Points | None) -> bool:
    """Keep a report's points. False where this report was here before: nothing is changed then. Raises Invalid: too many series."""
    key = Key(attempt, incarnation, sequence)
    with session.no_autoflush:  # what the session holds is none of these rows, and not complete
        if _is_known(session, job_id, key):
            return False
        found = columns.of_points(points) if points is not None else {}
        if found:
            _note(session, job_id, found)
        _insert(session, job_id, key, found, first_sequence=sequence, level=0, points=columns.pack(found) if found else None)
        if sequence % _MANY == _MANY - 1:
            _compact(session, job_id, attempt=attempt, incarnation=incarnation)
    return True


def version(session: Session, job_id: str) -> int:
    """Another number whenever the series are others."""
    summary = session.get(MetricSummaryRow, job_id)
    return summary.version if summary is not None else 0


def read(
    session: Session,
    job_id: str,
    *,
    names: Collection[str] | None = None,
    from_step: int = 0,
    to_step: int = MAX_INTEGER,
    max_points: int = DEFAULT_MAX_POINTS,
) -> dict[str, Series]:
    """Each series in the order of its steps, at most `max_points` of them, and of many long ones fewer."""
    summary = session.get(MetricSummaryRow, job_id)
    wanted = frozenset(summary.names if summary is not None else ()).intersection(*([] if names is None else [names]))
    max_points = max(min(max_points, MAX_ANSWER_POINTS // max(len(wanted), 1)), columns.MIN_MAX_POINTS)
    found = {}
    for name, curve in _curves_of_job(session, job_id, names=wanted, low=from_step, high=to_step):
        shown = curve.downsample(max_points)
        found[name] = Series(steps=shown.steps.tolist(), values=shown.values.tolist())
    return dict(sorted(found.items()))


def values_at(session: Session, job_id: str, name: str, steps: Sequence[int]) -> list[float | None]:
    """Of one series the newest value at each of `steps`, or before it; None where there is none yet."""
    for _, curve in _curves_of_job(session, job_id, names=frozenset({name})):
        places = np.searchsorted(curve.steps, steps, side="right") - 1
        return [float(curve.values[place]) if place >= 0 else None for place in places]
    return [None] * len(steps)


def thin(session: Session, job_id: str) -> None:
    """Keep of each series of a job that has ended, whose row is locked, what shows its course. A repeat changes nothing."""
    summary = session.get(MetricSummaryRow, job_id)
    if summary is None or not summary.is_whole:
        return
    summary.is_whole, summary.version = False, summary.version + 1
    kept = {name: curve.downsample(KEPT_POINTS) for name, curve in _curves_of_job(session, job_id, names=frozenset(summary.names))}
    in_job = MetricBatchRow.job_id == job_id
    newest = session.execute(select(*_KEY).where(in_job).order_by(*(part.desc() for part in _KEY)).limit(1)).one()
    session.execute(delete(MetricColumnRow).where(MetricColumnRow.job_id == job_id))
    session.execute(delete(MetricBatchRow).where(in_job))
    _add_large(session, job_id, Key(*newest), kept, first_sequence=0, level=_FULL)


def _is_known(session: Session, job_id: str, key: Key) -> bool:
    """Whether a batch has this report in it: the first one that ends with it or later."""
    first_sequence = session.scalar(
        select(MetricBatchRow.first_sequence)
        .where(_in_stream(job_id, key.attempt, key.incarnation), MetricBatchRow.sequence >= key.sequence)
        .order_by(MetricBatchRow.sequence)
        .limit(1)
    )
    return first_sequence is not None and first_sequence <= key.sequence


def _in_stream(job_id: str, attempt: int, incarnation: int) -> ColumnElement[bool]:
    table = MetricBatchRow
    return and_(table.job_id == job_id, table.attempt == attempt, table.incarnation == incarnation)


def _note(session: Session, job_id: str, told: Collection[str]) -> None:
    """That these series have new points. Raises Invalid."""
    in_job, now = MetricSummaryRow.job_id == job_id, {"version": MetricSummaryRow.version + 1, "changed_on": utc_now().date()}
    names = session.scalar(update(MetricSummaryRow).where(in_job).values(now).returning(MetricSummaryRow.names), execution_options=_CORE)
    new = sorted(set(told).difference(names or ()))
    if len(names or ()) + len(new) > MAX_SERIES:
        raise Invalid("points.series", f"a job has at most {MAX_SERIES} series; this one would have {len(names or ()) + len(new)}")
    if names is None:
        session.execute(insert(MetricSummaryRow), [{"job_id": job_id, "names": new, "is_whole": True, **now, "version": 1}])
    elif new:
        session.execute(update(MetricSummaryRow).where(in_job).values(names=[*names, *new]), execution_options=_CORE)


def _compact(session: Session, job_id: str, *, attempt: int, incarnation: int) -> None:
    """Make one of a stream's newest batches where there are many, or much in them, and so on with the larger ones that come of it."""
    table, in_stream = MetricBatchRow, _in_stream(job_id, attempt, incarnation)
    for level in range(_FULL):
        behind = select(func.coalesce(func.max(table.sequence), -1)).where(in_stream, table.level > level).scalar_subquery()
        batches = _batches(session, and_(in_stream, table.sequence > behind))
        num_points = sum(batch.num_points for batch in batches)
        if len(batches) < 2 or (len(batches) < _MANY and num_points < _FULL_POINTS):
            return
        _merge(session, job_id, batches, level=_FULL if num_points >= _FULL_POINTS else level + 1)


def _merge(session: Session, job_id: str, batches: Sequence[Batch], *, level: int) -> None:
    """Put one batch in the place of several that follow each other in a stream."""
    key = batches[-1].key
    in_batches, in_columns = (
        and_(
            table.job_id == job_id,
            table.attempt == key.attempt,
            table.incarnation == key.incarnation,
            table.sequence.between(batches[0].key.sequence, key.sequence),
        )
        for table in (MetricBatchRow, MetricColumnRow)
    )
    found = {name: curve for name, curve in _curves(batches, _stored(session, in_columns)) if len(curve)}
    session.execute(delete(MetricBatchRow).where(in_batches))
    session.execute(delete(MetricColumnRow).where(in_columns))
    _add_large(session, job_id, key, found, first_sequence=batches[0].first_sequence, level=level)


def _add_large(session: Session, job_id: str, key: Key, found: Mapping[str, Column], *, first_sequence: int, level: int) -> None:
    """A batch whose columns are rows of their own."""
    rows = [
        {
            "job_id": job_id,
            "name": name,
            **key._asdict(),
            "first_step": int(curve.steps[0]),
            "last_step": int(curve.steps[-1]),
            "data": curve.to_bytes(),
        }
        for name, curve in found.items()
    ]
    _insert(session, job_id, key, found, first_sequence=first_sequence, level=level)
    if rows:
        session.execute(insert(MetricColumnRow), rows)


def _insert(session: Session, job_id: str, key: Key, found: Mapping[str, Column], **values: int | bytes | None) -> None:
    row = {
        "job_id": job_id,
        **key._asdict(),
        "num_points": sum(map(len, found.values())),
        "first_step": min((int(column.steps[0]) for column in found.values()), default=None),
        **values,
    }
    session.execute(insert(MetricBatchRow), [row])


def _batches(session: Session, condition: ColumnElement[bool]) -> list[Batch]:
    """Oldest first."""
    table = MetricBatchRow
    rows = session.execute(
        select(*_KEY, table.first_sequence, table.num_points, table.first_step, table.points).where(condition).order_by(*_KEY)
    )
    return [
        Batch(Key(row.attempt, row.incarnation, row.sequence), row.first_sequence, row.num_points, row.first_step, row.points)
        for row in rows
    ]


def _stored(session: Session, condition: ColumnElement[bool]) -> Iterator[tuple[str, Key, Column]]:
    """Columns that are rows of their own, by name; a few at a time."""
    table = MetricColumnRow
    key = (table.attempt, table.incarnation, table.sequence)
    query = select(table.name, *key, table.data).where(condition).order_by(table.name, *key)
    for name, attempt, incarnation, sequence, data in session.execute(query, execution_options={"yield_per": _FETCHED}):
        yield name, Key(attempt, incarnation, sequence), Column.from_bytes(data)


def _curves_of_job(
    session: Session, job_id: str, *, names: frozenset[str], low: int = 0, high: int = MAX_INTEGER
) -> Iterator[tuple[str, Column]]:
    """Of each series its points at the steps `low` to `high`, one series after the other: they are not all in memory."""
    batches = _batches(session, and_(MetricBatchRow.job_id == job_id, MetricBatchRow.first_step.is_not(None)))
    table = MetricColumnRow
    stored = _stored(session, and_(table.job_id == job_id, table.name.in_(names), table.first_step <= high, table.last_step >= low))
    for name, curve in _curves(batches, stored, names=names):
        if len(shown := curve.between(low, high)):
            yield name, shown


def _curves(
    batches: Sequence[Batch], stored: Iterable[tuple[str, Key, Column]], *, names: frozenset[str] | None = None
) -> Iterator[tuple[str, Column]]:
    """What batches, oldest first, say together of these series (None: all). `stored`: the columns of the large ones, by name."""
    limits = _limits(batches)
    small: dict[str, list[tuple[Key, Column]]] = defaultdict(list)
    for batch in batches:
        for name, column in columns.unpack(batch.points or b"", names=names).items():
            small[name].append((batch.key, column))
    for name, group in groupby(stored, key=itemgetter(0)):
        yield name, _joined([*((key, column) for _, key, column in group), *small.pop(name, [])], limits)
    for name, parts in small.items():
        yield name, _joined(parts, limits)


def _limits(batches: Sequence[Batch]) -> dict[Stream, int]:
    """Up to which step each stream counts: the first step of those after it."""
    limits, limit = {}, MAX_INTEGER
    for stream, group in groupby(reversed(batches), key=lambda batch: batch.key[:2]):
        limits[stream] = limit
        limit = min(limit, *(batch.first_step for batch in group if batch.first_step is not None), MAX_INTEGER)
    return limits


def _joined(parts: list[tuple[Key, Column]], limits: Mapping[Stream, int]) -> Column:
    return columns.join([column.between(0, limits[key[:2]]) for key, column in sorted(parts, key=itemgetter(0))])
