"""The log of a job: append, list, and the stream of server-sent events."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from sqlalchemy import select
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from service import outbox
from service.db import Database
from service.errors import NoSuchJob, Problem
from service.jsonable import jsonable
from service.models import EventRow, JobRow
from service.views import EventView
from workers.contract import EventType, JobStatus, RunProgress

PAGE = 200
POLL_SECONDS = 0.5
HEARTBEAT_SECONDS = 15.0
AUTHORIZED_SECONDS = 15.0  # a token that is revoked ends its streams so much later


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
    """What a stream has to tell since its last look."""

    events: list[EventView]
    progress: RunProgress | None
    status: JobStatus


def look(database: Database, job_id: str, *, after: int) -> News:
    with database.read() as session:
        row = session.execute(select(JobRow.status, JobRow.progress).where(JobRow.id == job_id, JobRow.deleted_at.is_(None))).one_or_none()
        if row is None:
            raise NoSuchJob(job_id)
        # the status is read before the events, so that a terminal one means that all events are there
        events = list_after(session, job_id, after=after, limit=PAGE)
    progress = None if row.progress is None else RunProgress.model_validate(row.progress)
    return News(events, progress, JobStatus(row.status))


async def stream(
    database: Database,
    job_id: str,
    *,
    after: int,
    authorize: Callable[[], object],
    poll_seconds: float = POLL_SECONDS,
    clock: Callable[[], float] = time.monotonic,
) -> AsyncIterator[bytes]:
    """Server-sent events until the job has ended, or `authorize`, called again and again, raises a Problem: who comes back is told which.

    Between two looks it holds neither a session nor a thread.
    """
    told = ""
    spoke_at = authorized_at = clock()
    while True:
        if clock() - authorized_at >= AUTHORIZED_SECONDS:
            try:
                await run_in_threadpool(authorize)
            except Problem:
                return
            authorized_at = clock()
        news = await run_in_threadpool(look, database, job_id, after=after)
        for event in news.events:
            after = event.id
            yield format_sse_event(data_str=event.model_dump_json(), event="event", id=str(event.id))
        progress = news.progress.model_dump_json() if news.progress is not None else ""
        if progress != told:
            told = progress
            yield format_sse_event(data_str=progress, event="progress")
            spoke_at = clock()
        if len(news.events) == PAGE:
            continue
        if news.status.is_terminal:
            yield format_sse_event(data_str=f'{{"status":"{news.status}"}}', event="end")
            return
        if news.events:
            spoke_at = clock()
        elif clock() - spoke_at >= HEARTBEAT_SECONDS:
            yield KEEPALIVE_COMMENT
            spoke_at = clock()
        await asyncio.sleep(poll_seconds)
