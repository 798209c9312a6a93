"""Lists of jobs, newest first, whose cost does not grow with the number of jobs.

Each filter has an index in which its jobs lie newest first; a list with one filter (and the project) walks down that. Of several filters
each index says how far back its next `MAX_SEEN` jobs reach; the list walks down the one that reaches furthest, looks at these jobs and no
more, and checks the other filters on each. So a page of several filters may have fewer jobs than asked for, even none, and a cursor.
"""

import base64
import binascii
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Row, SQLColumnExpression, and_, func, literal, select, tuple_
from sqlalchemy.orm import Session

from service.db import UtcDateTime
from service.errors import Invalid
from service.models import JobLabelRow, JobRow, JobWordRow
from service.search import LAST, words_of
from workers.contract import JobStatus

MAX_SEEN = 2000  # jobs that are looked at for one page
_ORDER = "newest"  # in cursors, so that one of another order is known
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_CLOCKS_DIFFER = timedelta(days=1)  # the API's and the dispatchers', at most
_LAST_DAY = datetime(9999, 12, 30, tzinfo=UTC)


class Place(NamedTuple):
    """Where in the order a job is, or was."""

    created_at: datetime
    job_id: str


@dataclass(frozen=True)
class Filters:
    """What jobs must be like; None and () are no demands. labels: `key` or `key:value`. text: beginnings of words of name and id."""

    project: str | None = None
    statuses: Sequence[JobStatus] = ()
    kind: str | None = None
    labels: Sequence[str] = ()
    text: str | None = None
    created_after: datetime | None = None
    created_before: datetime | None = None
    finished_after: datetime | None = None
    finished_before: datetime | None = None

    @property
    def is_of_finished(self) -> bool:
        return self.finished_after is not None or self.finished_before is not None

    @property
    def before(self) -> datetime | None:
        """When all were submitted: what has ended by a time was submitted before it, by clocks that differ."""
        ended = None if self.finished_before is None else min(self.finished_before, _LAST_DAY) + _CLOCKS_DIFFER
        return min((time for time in (self.created_before, ended) if time is not None), default=None)


class Page(NamedTuple):
    """Some jobs, as rows of the columns asked for, with `created_at` and `id`; and the cursor of what comes after them."""

    rows: list[Row[Any]]
    next_cursor: str | None


@dataclass(frozen=True)
class _Walk:
    """A way down an index: where its entries keep a job's time and id, and the entries' conditions; several are walked side by side.

    `filters`: those that it keeps to. `is_whole`: it is known to have no more than MAX_SEEN jobs.
    """

    created_at: SQLColumnExpression[datetime]
    job_id: SQLColumnExpression[str]
    arms: Sequence[ColumnElement[bool]]
    filters: frozenset[str]
    is_whole: bool = False


def list_jobs(session: Session, filters: Filters, *, columns: Iterable[str], limit: int, cursor: str | None = None) -> Page:
    """Invalid for a cursor that no page gave, or a text without a word."""
    below = None if cursor is None else _read_cursor(cursor)
    conditions = dict(_conditions(filters))
    walk, floor = _choose(session, filters, conditions, below)
    wanted = [getattr(JobRow, name) for name in dict.fromkeys([*columns, "created_at", "id"])]
    others = [condition for name, condition in conditions.items() if name not in walk.filters]
    rows: list[Row[Any]] = []
    for arm in walk.arms:
        query = select(*wanted).where(arm, JobRow.deleted_at.is_(None), *others, *_range(walk, filters, below, floor))
        if walk.job_id is not JobRow.id:
            query = query.where(JobRow.id == walk.job_id)
        rows += session.execute(query.order_by(walk.created_at.desc(), walk.job_id.desc()).limit(limit + 1)).all()
    rows.sort(key=lambda row: Place(row.created_at, row.id), reverse=True)
    if len(rows) > limit:
        last = rows[limit - 1]
        return Page(rows[:limit], _cursor(Place(last.created_at, last.id)))
    return Page(rows, None if floor is None else _cursor(floor))


def _choose(
    session: Session, filters: Filters, conditions: dict[str, ColumnElement[bool]], below: Place | None
) -> tuple[_Walk, Place | None]:
    """The way to walk, and the last place to look at; None: to the end."""
    walks = list(_walks(session, filters, below))
    for walk in walks:
        if walk.filters.issuperset(conditions) or walk.is_whole:
            return walk, None
    furthest: tuple[_Walk, Place] | None = None
    for walk in walks:
        floor = _floor(session, walk, filters, below)
        if floor is None:
            return walk, None
        if furthest is None or floor < furthest[1]:
            furthest = walk, floor
    assert furthest is not None
    return furthest


def _floor(session: Session, walk: _Walk, filters: Filters, below: Place | None) -> Place | None:
    """The place of the last of the next MAX_SEEN jobs on a way; None where there are no more than these."""
    floors = []
    for arm in walk.arms:
        query = select(walk.created_at, walk.job_id).where(arm, *_range(walk, filters, below))
        last = query.order_by(walk.created_at.desc(), walk.job_id.desc()).offset(MAX_SEEN // len(walk.arms)).limit(1)
        if (found := session.execute(last).one_or_none()) is not None:
            floors.append(Place(*found))
    return max(floors, default=None)


def _range(walk: _Walk, filters: Filters, below: Place | None, floor: Place | None = None) -> Iterator[ColumnElement[bool]]:
    place = tuple_(walk.created_at, walk.job_id)
    if below is not None:
        yield place < _literal(below)
    if floor is not None:
        yield place >= _literal(floor)
    if filters.created_after is not None:
        yield walk.created_at > filters.created_after
    if filters.before is not None:
        yield walk.created_at < filters.before


def _literal(place: Place) -> Any:
    return tuple_(literal(place.created_at, UtcDateTime()), literal(place.job_id))


def _walks(session: Session, filters: Filters, below: Place | None) -> Iterator[_Walk]:
    """The ways that there are, those along one filter first."""
    there = JobRow.deleted_at.is_(None)  # the condition of these indexes
    of_project = [] if filters.project is None else [JobRow.project == filters.project]
    if filters.kind is not None:
        yield _Walk(JobRow.created_at, JobRow.id, [and_(there, *of_project, JobRow.kind == filters.kind)], frozenset({"project", "kind"}))
    if filters.statuses:
        arms = [and_(there, *of_project, JobRow.status == status) for status in dict.fromkeys(filters.statuses)]
        yield _Walk(JobRow.created_at, JobRow.id, arms, frozenset({"project", "statuses"}))
    label_of_project = [] if filters.project is None else [JobLabelRow.project == filters.project]
    for number, label in enumerate(filters.labels):
        arm = and_(*label_of_project, JobLabelRow.label == label)
        yield _Walk(JobLabelRow.created_at, JobLabelRow.job_id, [arm], frozenset({"project", f"label {number}"}))
    if filters.text is not None and (of_word := _walk_of_word(session, filters, below)) is not None:
        yield of_word
    if filters.is_of_finished and (of_times := _walk_of_times(session, filters)) is not None:
        yield of_times
    yield _Walk(JobRow.created_at, JobRow.id, [and_(there, *of_project)], frozenset({"project"}))


def _walk_of_word(session: Session, filters: Filters, below: Place | None) -> _Walk | None:
    """Along the longest word of the text; None where too many jobs have one that begins so: then others are walked, and looked at."""
    assert filters.text is not None
    word = max(_words(filters.text), key=len)
    begins_so = and_(JobWordRow.word >= word, JobWordRow.word < word + LAST)
    counted = select(JobWordRow.job_id).where(begins_so).limit(MAX_SEEN + 1).subquery()
    if (session.scalar(select(func.count()).select_from(counted)) or 0) > MAX_SEEN:
        return None
    along = _Walk(JobWordRow.created_at, JobWordRow.job_id, [begins_so], frozenset())
    query = select(JobWordRow.created_at, JobWordRow.job_id).where(begins_so, *_range(along, filters, below))
    found = query.distinct().cte("found")
    return _Walk(found.c.created_at, found.c.job_id, [literal(True)], frozenset(), is_whole=True)


def _walk_of_times(session: Session, filters: Filters) -> _Walk | None:
    """Along the times at which jobs have ended; None where too many ended between them: then others are walked, and looked at."""
    of_project = [] if filters.project is None else [JobRow.project == filters.project]
    ended = and_(JobRow.deleted_at.is_(None), JobRow.finished_at.is_not(None), *of_project, *_finished(filters, JobRow.finished_at))
    counted = select(JobRow.id).where(ended).limit(MAX_SEEN + 1).subquery()
    if (session.scalar(select(func.count()).select_from(counted)) or 0) > MAX_SEEN:
        return None
    found = select(JobRow.created_at, JobRow.id).where(ended).cte("found").prefix_with("MATERIALIZED")  # or it might walk all jobs
    return _Walk(found.c.created_at, found.c.id, [literal(True)], frozenset({"project", "finished"}), is_whole=True)


def _finished(filters: Filters, finished_at: SQLColumnExpression[datetime | None]) -> Iterator[ColumnElement[bool]]:
    if filters.finished_after is not None:
        yield finished_at > filters.finished_after
    if filters.finished_before is not None:
        yield finished_at < filters.finished_before


def _conditions(filters: Filters) -> Iterator[tuple[str, ColumnElement[bool]]]:
    """Each filter on a job that was found on another's way. `|| ''` keeps a database from taking another index than the one chosen."""
    if filters.project is not None:
        yield "project", JobRow.project + "" == filters.project
    if filters.kind is not None:
        yield "kind", JobRow.kind + "" == filters.kind
    if filters.statuses:
        yield "statuses", (JobRow.status + "").in_(filters.statuses)
    for number, label in enumerate(filters.labels):
        has = select(JobLabelRow.job_id).where(JobLabelRow.job_id == JobRow.id, JobLabelRow.label == label)
        yield f"label {number}", has.correlate(JobRow).exists()
    if filters.is_of_finished:
        yield "finished", and_(*_finished(filters, JobRow.finished_at))
    if filters.text is not None:
        yield "text", and_(*(JobRow.words.contains(f" {word}", autoescape=True) for word in _words(filters.text)))


def _words(text: str) -> list[str]:
    words = words_of(text)
    if not words:
        raise Invalid("text", "there is no letter and no digit in it; write the beginnings of words of a job's name or id")
    return words


def _cursor(place: Place) -> str:
    microseconds = (place.created_at - _EPOCH) // _MICROSECOND
    return base64.urlsafe_b64encode(f"{_ORDER}|{microseconds}|{place.job_id}".encode()).decode().rstrip("=")


def _read_cursor(cursor: str) -> Place:
    try:
        text = base64.b64decode(cursor.encode("ascii") + b"=" * (-len(cursor) % 4), altchars=b"-_", validate=True).decode("ascii")
    except (ValueError, binascii.Error):
        text = ""
    match = re.fullmatch(rf"{_ORDER}\|([0-9]{{1,17}})\|([a-z0-9]{{1,40}})", text)
    if match is None:
        raise Invalid("cursor", "it is none of ours; take next_cursor from an answer, or leave it out")
    return Place(_EPOCH + int(match[1]) * _MICROSECOND, match[2])
