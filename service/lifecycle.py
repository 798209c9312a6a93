"""The only writer of a job's status: one guarded UPDATE, and its event in the same transaction."""

from datetime import datetime
from enum import Enum, auto
from typing import Any

from sqlalchemy import and_, case, literal, select, update
from sqlalchemy.engine import CursorResult
from sqlalchemy.orm import Session

from service import events, leases
from service.db import UtcDateTime
from service.models import JobRow
from workers.contract import EventType, JobStatus, Reason

ALLOWED: dict[JobStatus, frozenset[JobStatus]] = {
    JobStatus.QUEUED: frozenset({JobStatus.STARTING, JobStatus.PAUSED, JobStatus.CANCELLED, JobStatus.FAILED}),
    JobStatus.STARTING: frozenset({JobStatus.RUNNING, JobStatus.RECOVERING, JobStatus.PAUSING, JobStatus.STOPPING, JobStatus.FAILED}),
    JobStatus.RUNNING: frozenset({JobStatus.FINALIZING, JobStatus.RECOVERING, JobStatus.PAUSING, JobStatus.STOPPING, JobStatus.FAILED}),
    JobStatus.FINALIZING: frozenset({JobStatus.SUCCEEDED, JobStatus.RECOVERING, JobStatus.PAUSED, JobStatus.STOPPING, JobStatus.FAILED}),
    JobStatus.RECOVERING: frozenset({JobStatus.STARTING, JobStatus.PAUSED, JobStatus.STOPPING}),
    JobStatus.PAUSING: frozenset({JobStatus.PAUSED, JobStatus.FINALIZING, JobStatus.RECOVERING, JobStatus.STOPPING, JobStatus.FAILED}),
    JobStatus.PAUSED: frozenset({JobStatus.QUEUED, JobStatus.CANCELLED}),
    JobStatus.STOPPING: frozenset({JobStatus.FINALIZING, JobStatus.CANCELLED, JobStatus.FAILED}),
    JobStatus.SUCCEEDED: frozenset(),
    JobStatus.CANCELLED: frozenset(),
    JobStatus.FAILED: frozenset(),
}


class Outcome(Enum):
    """What became of a transition."""

    DONE = auto()
    ALREADY_THERE = auto()
    ILLEGAL = auto()
    LOST_LEASE = auto()


class Overtaken(Exception):
    """The job is not where it was when this was decided: decide anew."""


def transition(
    session: Session,
    job_id: str,
    *,
    to: JobStatus,
    now: datetime,
    reason: Reason | None = None,
    detail: str | None = None,
    lease: str | None = None,
    **changes: Any,
) -> Outcome:
    """Move a job to another status, with other columns that change along. With `lease`, only while that lease holds."""
    before = session.execute(select(JobRow.status, JobRow.started_at).where(JobRow.id == job_id).with_for_update()).one()
    values: dict[str, Any] = {
        "status": to,
        "reason": reason,
        "detail": detail,
        "waiting_since": None,
        "version": JobRow.version + 1,
    } | changes
    if to is JobStatus.RUNNING and before.started_at is None:
        values["started_at"] = now
    if to.is_terminal:
        has_saved = and_(JobRow.keep.is_not(None), JobRow.attempt > 0)  # perhaps only half of a state, the last time
        values |= {"finished_at": now, "due_at": None, "prune_at": case((has_saved, literal(now, UtcDateTime())))}
    allowed_from = [status for status, targets in ALLOWED.items() if to in targets]
    statement = update(JobRow).where(JobRow.id == job_id, JobRow.status.in_(allowed_from)).values(values)
    if lease is not None:
        statement = statement.where(JobRow.lease_token == lease)
    if _count(session, statement) == 0:
        return _classify(session, job_id, to=to, lease=lease)
    data = {"from": before.status, "to": to, "reason": reason, "detail": detail}
    events.append(session, job_id, EventType.STATUS_CHANGED, data, at=now, attempt=_attempt(session, job_id))
    if to.is_terminal:
        _wake_those_that_wait_for(session, job_id, now)
    return Outcome.DONE


def set_reason(
    session: Session, job_id: str, *, reason: Reason | None, detail: str | None, now: datetime, lease: str | None = None
) -> Outcome:
    """Say why a job waits, or that it no longer does. Another detail of the same reason is no event: what is free changes all the time."""
    row = session.execute(
        select(JobRow.reason, JobRow.detail, JobRow.lease_token, JobRow.status).where(JobRow.id == job_id).with_for_update()
    ).one()
    if lease is not None and row.lease_token != lease:
        return Outcome.LOST_LEASE
    if (row.reason, row.detail) == (reason, detail):
        return Outcome.ALREADY_THERE
    if JobStatus(row.status).is_terminal:
        return Outcome.ILLEGAL
    session.execute(update(JobRow).where(JobRow.id == job_id).values(reason=reason, detail=detail, version=JobRow.version + 1))
    if row.reason != reason:
        data = {"reason": reason, "detail": detail}
        events.append(session, job_id, EventType.REASON_CHANGED, data, at=now, attempt=_attempt(session, job_id))
    return Outcome.DONE


def _wake_those_that_wait_for(session: Session, job_id: str, now: datetime) -> None:
    waits = and_(JobRow.waits_for == job_id, JobRow.due_at.is_not(None))
    leases.lock(session, waits)
    session.execute(update(JobRow).where(waits).values(due_at=now))


def _classify(session: Session, job_id: str, *, to: JobStatus, lease: str | None) -> Outcome:
    row = session.execute(select(JobRow.status, JobRow.lease_token).where(JobRow.id == job_id)).one()
    if lease is not None and row.lease_token != lease:
        return Outcome.LOST_LEASE
    return Outcome.ALREADY_THERE if row.status == to else Outcome.ILLEGAL


def _attempt(session: Session, job_id: str) -> int | None:
    return session.execute(select(JobRow.attempt).where(JobRow.id == job_id)).scalar_one() or None


def _count(session: Session, statement: Any) -> int:
    result = session.execute(statement, execution_options={"synchronize_session": False})
    assert isinstance(result, CursorResult)
    return result.rowcount
