"""The log of a job: append, and list. Streams of it: `streams`."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from service import outbox
from service.db import Database
from service.errors import NoSuchJob
from service.jsonable import jsonable
from service.models import EventRow, JobRow
from service.tail import State, progress_text
from service.views import EventView
from workers.contract import EventType, JobStatus


def append(session: Session, job_id: str, type: EventType, data: dict[str, Any], *, at: datetime, attempt: int | None = None) -> None:
    row = EventRow(job_id=job_id, type=type, at=at, attempt=attempt, data=jsonable(data))
    session.add(row)
    outbox.note(session, row)


def list_after(session: Session, job_id: str, *, after: int, limit: int) -> list[EventView]:
    """Events with an id above `after`, oldest first."""
    rows = session.scalars(select(EventRow).where(EventRow.job_id == job_id, EventRow.id > after).order_by(EventRow.id).limit(limit))
    return [EventView.of(row) for row in rows]


@dataclass(frozen=True)
class News:
    """Some events of a job, and where it is."""

    events: list[EventView]
    state: State


def look(database: Database, job_id: str, *, after: int, limit: int) -> News:
    with database.read() as session:
        row = session.execute(select(JobRow.status, JobRow.progress).where(JobRow.id == job_id, JobRow.deleted_at.is_(None))).one_or_none()
        if row is None:
            raise NoSuchJob(job_id)
        # the status is read before the events, so that a terminal one means that all events are there
        found = list_after(session, job_id, after=after, limit=limit)
    return News(found, State(JobStatus(row.status), progress_text(row.progress)))
