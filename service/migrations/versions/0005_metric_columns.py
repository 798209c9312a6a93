"""Series as columns: the batches of JSON become larger ones of bytes, as `service.columns` writes them, and back."""

import math
import struct
from array import array
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import accumulate, groupby, pairwise
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_HEADER = struct.Struct("<ccIq")
_ENTRY = struct.Struct("<HI")
_FULL_POINTS, _FULL = 2**18, 100  # of a batch, and its level
_KNOWN = 1000  # reports before a batch's last one that the older schema knows again
_FETCHED = 100
_KEY = ("job_id", "attempt", "incarnation", "sequence")
Curves = dict[str, dict[int, float]]


def upgrade() -> None:
    _rename("metric_batches", "metric_batches_json")
    _create("metric_batches", _batch_columns())
    _create("metric_columns", _column_columns(), primary_key=("job_id", "name", *_KEY[1:]))
    op.create_table(
        "metric_summaries",
        sa.Column("job_id", sa.String(40), nullable=False),
        sa.Column("names", sa.JSON(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("changed_on", sa.Date(), nullable=False),
        sa.Column("is_whole", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_metric_summaries_job_id_jobs")),
        sa.PrimaryKeyConstraint("job_id", name=op.f("pk_metric_summaries")),
    )
    where: dict[str, Any] = {"sqlite_where": sa.text("is_whole"), "postgresql_where": sa.text("is_whole")}
    op.create_index("ix_metric_summaries_changed_on", "metric_summaries", ["changed_on"], **where)
    old = _table("metric_batches_json", _json_columns())
    for job_id, reports in groupby(_rows(old), key=lambda row: row.job_id):
        names: set[str] = set()
        for _, stream in groupby(reports, key=lambda row: row[:3]):
            names |= _merge(stream)
        if names:
            values = {"job_id": job_id, "names": sorted(names), "version": 1, "changed_on": datetime.now(UTC).date(), "is_whole": True}
            op.get_bind().execute(sa.insert(_SUMMARIES), [values])
    op.drop_table("metric_batches_json")


def downgrade() -> None:
    _rename("metric_batches", "metric_batches_new")
    _create("metric_batches", _json_columns())
    for batch in _rows(_table("metric_batches_new", _batch_columns())):
        _write_json(batch, _columns_of(batch))
    for table in ("metric_batches_new", "metric_columns", "metric_summaries"):
        op.drop_table(table)


def _key_columns() -> list[sa.Column[Any]]:
    return [
        sa.Column("job_id", sa.String(40), nullable=False),
        sa.Column("attempt", sa.Integer(), autoincrement=False, nullable=False),
        *(sa.Column(name, sa.BigInteger(), autoincrement=False, nullable=False) for name in ("incarnation", "sequence")),
    ]


def _batch_columns() -> list[sa.Column[Any]]:
    return [
        *_key_columns(),
        sa.Column("first_sequence", sa.BigInteger(), nullable=False),
        sa.Column("level", sa.Integer(), nullable=False),
        sa.Column("num_points", sa.Integer(), nullable=False),
        sa.Column("first_step", sa.BigInteger()),
        sa.Column("points", sa.LargeBinary()),
    ]


def _column_columns() -> list[sa.Column[Any]]:
    return [
        *_key_columns(),
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("first_step", sa.BigInteger(), nullable=False),
        sa.Column("last_step", sa.BigInteger(), nullable=False),
        sa.Column("data", sa.LargeBinary(), nullable=False),
    ]


def _json_columns() -> list[sa.Column[Any]]:
    return [
        *_key_columns(),
        sa.Column("points", sa.JSON(none_as_null=True)),
        sa.Column("first_step", sa.BigInteger()),
        sa.Column("last_step", sa.BigInteger()),
    ]


def _table(name: str, columns: list[sa.Column[Any]]) -> sa.Table:
    return sa.Table(name, sa.MetaData(), *columns)


_BATCHES = _table("metric_batches", _batch_columns())
_JSON_BATCHES = _table("metric_batches", _json_columns())
_COLUMNS = _table("metric_columns", _column_columns())
_SUMMARIES = sa.table(
    "metric_summaries",
    *(sa.column("job_id"), sa.column("names", sa.JSON()), sa.column("version"), sa.column("changed_on", sa.Date()), sa.column("is_whole")),
)


def _create(name: str, columns: list[sa.Column[Any]], *, primary_key: tuple[str, ...] = _KEY) -> None:
    op.create_table(
        name,
        *columns,
        sa.ForeignKeyConstraint(["job_id", "attempt"], ["attempts.job_id", "attempts.number"], name=op.f(f"fk_{name}_job_id_attempts")),
        sa.PrimaryKeyConstraint(*primary_key, name=op.f(f"pk_{name}")),
    )


def _rename(name: str, to: str) -> None:
    op.rename_table(name, to)
    if op.get_bind().dialect.name == "postgresql":  # where a key's name is an index's
        op.execute(f"ALTER TABLE {to} RENAME CONSTRAINT pk_{name} TO pk_{to}")


def _rows(table: sa.Table) -> Iterator[Any]:
    """In the order of their keys; a few at a time are in memory."""
    query = sa.select(table).order_by(*(table.c[name] for name in _KEY))
    yield from op.get_bind().execute(query, execution_options={"yield_per": _FETCHED})


def _merge(stream: Iterator[Any]) -> set[str]:
    """Writes what a start of the workers told as few batches; answers the names of its series."""
    curves: Curves = {}
    names: set[str] = set()
    first = last = None
    for report in stream:
        first, last = first or report, report
        _add(curves, report.points)
        if sum(map(len, curves.values())) >= _FULL_POINTS:
            _write(curves, first=first.sequence, last=last)
            names |= curves.keys()
            curves, first = {}, None
    if first is not None:
        _write(curves, first=first.sequence, last=last)
    return names | curves.keys()


def _add(curves: Curves, points: Any) -> None:
    for name, values in (points or {"series": {}})["series"].items():
        told = {step: float(value) for step, value in zip(points["steps"], values, strict=True) if value is not None}
        if told:
            curves.setdefault(name, {}).update(told)


def _write(curves: Curves, *, first: int, last: Any) -> None:
    key = {"job_id": last.job_id, "attempt": last.attempt, "incarnation": last.incarnation, "sequence": last.sequence}
    columns = [
        {**key, "name": name, "first_step": min(curve), "last_step": max(curve), "data": _encode(curve)} for name, curve in curves.items()
    ]
    num_points, first_step = sum(map(len, curves.values())), min((column["first_step"] for column in columns), default=None)
    batch = {"first_sequence": first, "level": _FULL, "num_points": num_points, "first_step": first_step, "points": None}
    op.get_bind().execute(sa.insert(_BATCHES), [key | batch])
    if columns:
        op.get_bind().execute(sa.insert(_COLUMNS), columns)


def _encode(column: dict[int, float]) -> bytes:
    steps = sorted(column)
    gaps = array("Q", (later - step for step, later in pairwise(steps)))
    return _HEADER.pack(b"Q", b"d", len(steps), steps[0]) + gaps.tobytes() + array("d", map(column.__getitem__, steps)).tobytes()


def _decode(data: bytes) -> dict[int, float]:
    gap_type, value_type, length, first = _HEADER.unpack_from(data)
    gaps, values = array(gap_type.decode()), array(value_type.decode())
    end = _HEADER.size + (length - 1) * gaps.itemsize
    gaps.frombytes(data[_HEADER.size : end])
    values.frombytes(data[end:])
    return dict(zip(accumulate(gaps, initial=first), values, strict=True))


def _columns_of(batch: Any) -> Curves:
    if batch.points is None:
        here = [_COLUMNS.c[name] == getattr(batch, name) for name in _KEY]
        return {row.name: _decode(row.data) for row in op.get_bind().execute(sa.select(_COLUMNS).where(*here))}
    found, place = {}, 0
    while place < len(batch.points):
        name_length, length = _ENTRY.unpack_from(batch.points, place)
        begin = place + _ENTRY.size + name_length
        place = begin + length
        found[batch.points[begin - name_length : begin].decode()] = _decode(batch.points[begin:place])
    return found


def _write_json(batch: Any, curves: Curves) -> None:
    """The batch, and before it reports without points: so a repeat of one of those changes nothing."""
    steps = sorted({step for column in curves.values() for step in column})
    series = {name: [_as_json(column.get(step)) for step in steps] for name, column in curves.items()}
    empty = {"job_id": batch.job_id, "attempt": batch.attempt, "incarnation": batch.incarnation}
    empty |= {"points": None, "first_step": None, "last_step": None}
    whole = {"points": {"steps": steps, "series": series}, "first_step": steps[0], "last_step": steps[-1]} if steps else {}
    first = max(batch.first_sequence, batch.sequence - _KNOWN)
    rows = [empty | {"sequence": sequence} for sequence in range(first, batch.sequence)]
    op.get_bind().execute(sa.insert(_JSON_BATCHES), [*rows, empty | {"sequence": batch.sequence} | whole])


def _as_json(value: float | None) -> float | str | None:
    if value is None or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
