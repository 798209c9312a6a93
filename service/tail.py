"""The end of the log of all jobs: each new event once, in the order of ids, and none passed by.

On PostgreSQL an event may come to be seen after one with a higher id, of another job: an id is given when a row is written, and seen when
its transaction is committed. So those behind a gap are settled only when whoever might fill it has ended. Of one job they are seen in
order: whoever writes its events holds its row.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from fastapi.sse import format_sse_event
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.db import Database, ended_before, next_transaction
from service.models import EventRow, JobRow
from service.views import EventView, JobEventView
from workers.contract import JobStatus, RunProgress

_START_WINDOW = 500  # events before the last one that may still be seen late when the tail is first read
_PAGE = 1000


@dataclass(frozen=True)
class Told:
    """An event as streams send it: made once, and shared by all of them."""

    view: JobEventView

    @property
    def id(self) -> int:
        return self.view.id

    @cached_property
    def of_job(self) -> bytes:
        return message_of(EventView.model_validate(self.view))

    @cached_property
    def of_all(self) -> bytes:
        return message_of(self.view)


@dataclass(frozen=True)
class State:
    """Where a job is. `progress`: as JSON; empty where there is none."""

    status: JobStatus
    progress: str


@dataclass(frozen=True)
class Batch:
    """What is new since the last look."""

    seen: list[Told] = field(default_factory=list)  # for the first time; of each job in order
    settled: list[Told] = field(default_factory=list)  # in the order of ids, over all jobs
    states: dict[str, State] = field(default_factory=dict)  # of the jobs that were asked for, and exist


class Tail:
    """Reads from where it was made, or first read."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.horizon = -1  # all events up to this id are settled
        self._last_before: int | None = None  # what was there when it was first read
        self._waiting: dict[int, Told] = {}  # seen, not settled
        self._mark = (0, 0)  # events up to the first are settled when all transactions below the second have ended
        self._progress: dict[str, tuple[dict[str, Any], str]] = {}

    @property
    def has_begun(self) -> bool:
        """Whether what was there at first is settled, so that only new events come."""
        return self._last_before is not None and self.horizon >= self._last_before

    def read(self, job_ids: Collection[str]) -> Batch:
        """One look, in one snapshot: a status that is terminal means that all the job's events are there."""
        with self._database.read() as session:
            all_ended_before = ended_before(session)
            if self.horizon < 0:
                self.horizon = max((session.scalar(select(func.max(EventRow.id))) or 0) - _START_WINDOW, 0)
            states = self._states(session, job_ids)
            seen = [told for told in self._rows(session) if told.id not in self._waiting]
            self._waiting |= {told.id: told for told in seen}
            if self._last_before is None:
                self._last_before = max(self._waiting, default=self.horizon)
            settled = self._settle(all_ended_before)
            if self._waiting and self._mark[0] <= self.horizon:  # after the rows: whoever has taken a lower id has a lower number
                self._mark = max(self._waiting), next_transaction(session)
        return Batch(seen, settled, states)

    def _rows(self, session: Session) -> list[Told]:
        found: list[Told] = []
        while True:
            after = found[-1].id if found else self.horizon
            page = list_all_after(session, None, after=after, limit=_PAGE)
            found += [Told(view) for view in page]
            if len(page) < _PAGE:
                return found

    def _settle(self, all_ended_before: int) -> list[Told]:
        upto, transaction = self._mark
        done: list[Told] = []
        for number in sorted(self._waiting):
            if number != self.horizon + 1 and not (number <= upto and all_ended_before >= transaction):
                break
            self.horizon = number
            done.append(self._waiting.pop(number))
        return done

    def _states(self, session: Session, job_ids: Collection[str]) -> dict[str, State]:
        asked = select(JobRow.id, JobRow.status, JobRow.progress).where(JobRow.id.in_(job_ids), JobRow.deleted_at.is_(None))
        rows = session.execute(asked).all() if job_ids else []
        known, self._progress = self._progress, {}
        states = {}
        for row in rows:
            raw, text = known.get(row.id, (None, ""))
            if raw != row.progress:
                text = progress_text(row.progress)
            if row.progress is not None:
                self._progress[row.id] = (row.progress, text)
            states[row.id] = State(JobStatus(row.status), text)
        return states


def list_all_after(session: Session, project: str | None, *, after: int, limit: int, upto: int | None = None) -> list[JobEventView]:
    """Events of all jobs of a project (None: of all), by their ids."""
    query = (
        select(EventRow, JobRow.project).join(JobRow, JobRow.id == EventRow.job_id).where(EventRow.id > after, JobRow.deleted_at.is_(None))
    )
    if upto is not None:
        query = query.where(EventRow.id <= upto)
    if project is not None:
        query = query.where(JobRow.project == project)
    return [JobEventView.of(row, in_project) for row, in_project in session.execute(query.order_by(EventRow.id).limit(limit))]


def progress_text(raw: dict[str, Any] | None) -> str:
    return "" if raw is None else RunProgress.model_validate(raw).model_dump_json()


def message_of(view: EventView) -> bytes:
    return format_sse_event(data_str=view.model_dump_json(), event="event", id=str(view.id))
